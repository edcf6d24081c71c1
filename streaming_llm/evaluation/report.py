"""Shows and stores what an evaluation found: tables, files written in one step, empty figures for `plots`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..stats import format_bytes
from .errors import EvaluationError
from .streaming import MethodResult

TIME_CAPTION = (
    "'compaction' is the time of all compactions over the rest of the forward passes' time, from the first compaction "
    "on; 'decode' columns: tokens fed one by one after the stream."
)


def cell(value: Any, form: str | Callable[[Any], str]) -> str:
    """A figure as `form` has it, a dash for None."""
    return "-" if value is None else form(value) if callable(form) else form.format(value)


# A column's head, and how a result reads in it; a dash where there is nothing to compare to.
Columns = Mapping[str, Callable[[Any], str]]
COLUMNS: dict[str, Callable[[MethodResult], str]] = {
    "method": lambda result: result.method,
    "perplexity": lambda result: f"{result.perplexity:.2f}",
    "KL to full": lambda result: cell(result.kl, "{:.4f}"),
    "gap recovered": lambda result: cell(result.gap_recovered, "{:.1%}"),
    "cache": lambda result: format_bytes(result.cache_bytes - result.archive_bytes),
    "archive": lambda result: cell(result.archive_bytes or None, format_bytes),
}
TIME_COLUMNS: dict[str, Callable[[MethodResult], str]] = {
    "method": lambda result: result.method,
    "tokens held": lambda result: f"{result.held_tokens:,}",
    "tokens/s": lambda result: f"{result.timing.tokens_per_second:.0f}",
    "compaction": lambda result: cell(result.timing.compaction_share, "{:.1%}"),
    "decode tokens/s": lambda result: cell(result.timing.decode_tokens_per_second, "{:.1f}"),
    "decode compaction": lambda result: cell(result.timing.decode_compaction_share, "{:.2%}"),
}


def print_tables(results: Mapping[str, MethodResult], title: str, caption: str, console=None) -> None:
    """Print the comparison, and below it what compaction costs, to the terminal (needs `rich`)."""
    # Two tables: together they would not fit a terminal of 80 columns.
    print_columns(results.values(), COLUMNS, title, caption, console)
    print_columns(results.values(), TIME_COLUMNS, "Speed, and what compaction costs", TIME_CAPTION, console)


def print_columns(rows: Iterable[Any], columns: Columns, title: str, caption: str, console=None) -> None:
    """Print a table without a frame, a line for each of `rows` (needs `rich`)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.collapse_padding = True  # for a terminal of 80 columns
    table.title_justify = table.caption_justify = "left"
    for index, column in enumerate(columns):
        table.add_column(column.replace(" ", "\n", 1), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    console.print()
    console.print(table)


def markdown_table(results: Mapping[str, MethodResult]) -> str:
    """Both tables as one, in Markdown."""
    return markdown_columns(results.values(), COLUMNS | TIME_COLUMNS)


def markdown_columns(rows: Iterable[Any], columns: Columns) -> str:
    """A table in Markdown, a line for each of `rows`."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[show(row) for show in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Progress:
    """A progress bar on a terminal, and a line every `log_every` tokens anywhere."""

    def __init__(self, console, total: int, log_every: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.console = console
        self.log_every = log_every
        self.total = total
        self.logged = 0

    def __enter__(self):
        self.bar.start()
        self.task = self.bar.add_task("tokens", total=self.total)
        return self.on_chunk

    def on_chunk(self, tokens: int, perplexities: dict[str, float]) -> None:
        """Told after each chunk: tokens read, and the running perplexity by method."""
        self.bar.update(self.task, completed=tokens)
        if self.log_every and tokens // self.log_every > self.logged:
            self.logged = tokens // self.log_every
            running = ", ".join(f"{name} {value:.2f}" for name, value in perplexities.items()) or "not scored yet"
            self.console.print(f"{tokens:,} tokens: perplexity {running}", soft_wrap=True, highlight=False)

    def tell(self, text: str) -> None:
        """Say what is done now, where lines are printed at all."""
        if self.log_every:
            self.console.print(text, soft_wrap=True, highlight=False)

    def __exit__(self, *_) -> None:
        self.bar.stop()


def results_document(results: Mapping[str, MethodResult], settings: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The `document` of one result a method."""
    measured, timing = {}, {}
    for name, result in results.items():
        entry = dataclasses.asdict(result)
        timing[name] = entry.pop("timing")
        del entry["method"]
        measured[name] = entry
    return document(settings, device, measured, timing)


def document(settings: Mapping[str, Any], device: Any, results: Any, timing: Any) -> dict[str, Any]:
    """What a file of results holds: all but `timing` is the same when a run is repeated on the same machine."""
    return {"settings": dict(settings), "environment": environment(device), "results": results, "timing": timing}


def environment(device: Any) -> dict[str, Any]:
    """Versions and hardware a result depends on."""
    cuda = getattr(device, "type", str(device)) == "cuda"
    return {
        "streaming_llm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: it is there whole, or as it was before."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(temporary)` fill a file beside `path`, then put it in its place; nothing is left of a failed write."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def prepare_output(directory: Path) -> None:
    """Create the output directory and see that it can be written, before any time is spent on the results."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise EvaluationError(f"can't write to output_dir {directory}: {error.strerror or error}") from error


def keep_earlier(paths: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Give files of an earlier run another name, `results-1.json`, all the same number; gives the old and new paths."""
    paths = list(paths)
    there, number = [path for path in paths if path.exists()], 1
    while any(path.with_stem(f"{path.stem}-{number}").exists() for path in paths):
        number += 1
    return [(path, path.rename(path.with_stem(f"{path.stem}-{number}"))) for path in there]


def new_figure(width: float, height: float):
    """An empty figure, its size in inches (needs `matplotlib`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: a window's toolkit is not needed to write a file, nor a global figure.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG, in one step."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def grid(axes) -> None:
    """A light grid behind the lines, and no frame above and to the right; thousands of tokens with a comma."""
    axes.grid(True, color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
