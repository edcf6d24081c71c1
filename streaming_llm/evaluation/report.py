"""Shows and stores what an evaluation found: a table, `results.json` and `perplexity.png`."""

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

# Okabe and Ito's colours, told apart with any colour vision; the line style tells the rest of the lines apart.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")

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


def line_look(index: int, width: float) -> dict[str, Any]:
    """Colour, style and width of the line with that index."""
    turn, colour = divmod(index, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": STYLES[(colour + turn) % len(STYLES)], "linewidth": width}


def grid(axes) -> None:
    """A light grid behind the lines, and no frame above and to the right; thousands of tokens with a comma."""
    axes.grid(True, color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def plot(path: Path, results: Mapping[str, MethodResult], title: str, score_from: int) -> None:
    """Draw running perplexity and cache size over the tokens read, one line a method (needs `matplotlib`).

    `score_from`: the first scored token; what comes before is shaded, as it has no perplexity.
    """
    figure = new_figure(9, 7)
    upper, lower = figure.subplots(2, 1, sharex=True)
    visible: list[float] = []
    for index, (name, result) in enumerate(results.items()):
        curve = result.curve
        look = line_look(index, 1.8)
        points = [(t, p) for t, p in zip(curve.tokens, curve.perplexity, strict=True) if p is not None]
        upper.plot([t for t, _ in points], [p for _, p in points], label=name, **look)
        # The mean of the first few tokens swings wildly and would set the scale: it may leave the picture.
        visible.extend(p for _, p in points[len(points) // 10 :])
        lower.plot(curve.tokens, [size / 2**20 for size in curve.cache_bytes], label=name, **look)
    if visible:
        low, high = min(visible), max(visible)
        margin = 0.08 * (high - low) or 0.05 * high
        upper.set_ylim(low - margin, high + margin)
    for axes in (upper, lower):
        axes.axvspan(0, score_from, color="0.93", zorder=0)
        grid(axes)
        axes.margins(x=0)
    upper.set_title(title, loc="left", fontsize=11)
    upper.set_ylabel("running perplexity\n(scored tokens so far)")
    lower.set_ylabel("cache size (MiB)")
    lower.set_xlabel("tokens read")
    lower.set_ylim(bottom=0)
    if score_from > 1:
        upper.text(score_from / 2, 0.5, "not scored", transform=upper.get_xaxis_transform(), ha="center", color="0.4")
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path)
