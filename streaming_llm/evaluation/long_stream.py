"""A stream many times the trained length: perplexity along it, memory and time at its start and at its end.

Every method reads the stream on its own, so that what the process holds is what that method needs. The full cache is taken
only some way past the trained length: its time grows with the square of the text, and what it shows is shown by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import ADMSConfig
from ..stats import format_bytes
from . import flags, plots, report, streaming
from .errors import EvaluationError
from .methods import Plan, cache_factory, plan_methods
from .reading import BIN, EIGHTHS, LongResult, Part, compare_to_baseline, stream_method
from .run import ModelRun

# The full cache, begun anew at each eighth: how hard the text is there.
RESTARTED = "restarted"
DEFAULT_METHODS = ("full", "streaming", "adms_low_rank", "adms", "adms_recall")
# 1,028 tokens a head: 4 sinks, and half each for the recent window and what stands for the rest.
RECENT = MIDDLE = 512


@dataclass
class LongArguments(flags.Output, flags.Text, flags.TextName, flags.Model):
    """The flags beside the settings of the cache."""

    num_eval_tokens: int = flags.count("tokens of the stream (%(default)s)", 65536)
    methods: list[str] = flags.methods(DEFAULT_METHODS)
    full_tokens: int = flags.count(
        "tokens of the stream that the full cache reads: its time grows with their square (%(default)s)", 12288
    )
    restarted: flags.Switch = flags.switch(
        "also read each eighth by itself, with a full cache begun anew: how hard the text is there"
    )
    memory_from: int = flags.count("compare the memory at the end to that after N tokens (%(default)s)", 4096)
    output_dir: str = flags.directory("results/long_stream")
    markdown: flags.Switch = flags.switch("print the tables in Markdown too")


def own_positions(plans: Sequence[Plan], given: Mapping[str, Any]) -> list[Plan]:
    """The plans, StreamingLLM with positions within its cache, as its paper has them, unless positions were asked for."""
    if "position_policy" not in ADMSConfig.setting_names() or {"position_policy", "enable_pos_shift"} & set(given):
        return list(plans)
    own = {"position_policy": "cache"}
    return [
        dataclasses.replace(plan, settings=plan.settings | own) if plan.method.name == streaming.BASELINE else plan
        for plan in plans
    ]


def _perplexity(part: Part) -> str:
    value = part.perplexity
    if value is None:
        return "-"
    text = f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
    return text if part.whole else f"{text}*"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


# A line's head, and how a result reads in it. A column is a method: with eight eighths the other way would be too wide.
PERPLEXITIES: dict[str, Callable[[LongResult], str]] = {
    **{f"eighth {number + 1}": lambda result, n=number: _perplexity(result.eighths[n]) for number in range(EIGHTHS)},
    "worst / first eighth": lambda result: report.cell(result.worst_over_first, "{:.3f}"),
    "last / streaming's last": lambda result: report.cell(result.last_over_baseline, "{:.3f}"),
}
COSTS: dict[str, Callable[[LongResult], str]] = {
    "tokens read": lambda result: f"{result.tokens:,}",
    "most tokens held": lambda result: f"{result.held_tokens:,}",
    "cache, early": lambda result: report.cell(result.cache_bytes_start, format_bytes),
    "cache, end": lambda result: report.cell(result.cache_bytes_end, format_bytes),
    "archive in it": lambda result: report.cell(result.archive_bytes_end or None, format_bytes),
    "resident, early": lambda result: report.cell(result.timing.resident_start, format_bytes),
    "resident, end": lambda result: report.cell(result.timing.resident_end, format_bytes),
    "resident, growth": lambda result: report.cell(result.timing.resident_growth, "{:+.2%}"),
    "ms/token, 2nd tenth": lambda result: report.cell(result.timing.median[1], _milliseconds),
    "ms/token, last tenth": lambda result: report.cell(result.timing.median[-1], _milliseconds),
    "last / 2nd tenth": lambda result: report.cell(result.timing.tail_over_head, "{:.3f}"),
    "tokens/s": lambda result: f"{result.timing.tokens_per_second:.0f}",
}


def by_method(results: Mapping[str, LongResult]) -> report.Columns:
    """Columns for lines of `PERPLEXITIES` or `COSTS`: the line's head, and each method's figure."""
    columns: dict[str, Callable[[Any], str]] = {"": lambda line: line[0]}
    return columns | {name: lambda line, result=result: line[1](result) for name, result in results.items()}


def markdown(results: Mapping[str, LongResult]) -> str:
    """Both tables as one, in Markdown."""
    return report.markdown_columns((PERPLEXITIES | COSTS).items(), by_method(results))


def plot(path: Path, results: Mapping[str, LongResult], title: str, trained_length: int | None) -> None:
    """Draw the perplexity of each `BIN` tokens, one line a method, the trained length marked (needs `matplotlib`)."""
    from matplotlib.ticker import ScalarFormatter

    figure = report.new_figure(9, 5)
    axes = figure.subplots()
    longest = max(result.tokens for result in results.values())
    looks = plots.line_looks(results)
    for name, result in results.items():
        parts = [part for part in result.bins if part.scored]
        # A bin's value stands for all of it: a line between the middles of the bins.
        axes.plot(
            [(part.start + part.end) / 2 for part in parts], [part.perplexity for part in parts], label=name, **looks[name]
        )
    if trained_length is not None and trained_length < longest:
        # Named in the legend: no place within the axes is sure to be free.
        label = f"trained length, {trained_length:,}"
        axes.axvline(trained_length, color="0.35", linewidth=1.2, linestyle=(0, (2, 2)), label=label)
    # The full cache past the trained length is worse by orders of magnitude.
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlim(0, longest)
    axes.set_xlabel("tokens read")
    axes.set_ylabel(f"perplexity of each {BIN:,} tokens")
    axes.set_title(title, loc="left", fontsize=11)
    report.grid(axes)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    report.save_figure(figure, path)


class LongStream(ModelRun):
    """Stream a text many times longer than the model was trained on.

    Perplexity of each eighth, memory and time at the start and at the end, one method after another.
    """

    prog = "long_stream.py"
    Arguments = LongArguments
    sizes = RECENT, MIDDLE
    least = {"full_tokens": 2}
    picture = "perplexity.png"

    def check(self) -> None:
        super().check()
        self.plans = own_positions(self.plan(self.arguments.methods), self.settings)

    def measure(self) -> Iterator[None]:
        """Read the stream with one method after another."""
        given = self.arguments
        text = self.read = self.text(given.dataset_name)
        stream, tokens = text.streams[0], text.streams[0].numel()
        if tokens < EIGHTHS * 2:
            raise EvaluationError(f"{text.name} gives {tokens} tokens; the eighths of a stream need at least {EIGHTHS * 2}")
        self.title = self._title(tokens)
        self.console.print(self.title, soft_wrap=True)
        # The full cache last: what it leaves to the process would hide what the others need.
        runs = sorted(((plan.method.name, plan) for plan in self.plans), key=lambda run: run[0] == streaming.REFERENCE)
        if given.restarted:
            runs += [(RESTARTED, plan) for plan in plan_methods([streaming.REFERENCE], {})]
        found: dict[str, LongResult] = {}
        for name, plan in runs:
            part = stream[: given.full_tokens] if name == streaming.REFERENCE else stream
            with self.progress(part.numel()) as on_chunk:
                found[name] = stream_method(
                    self.model,
                    part,
                    name,
                    cache_factory(self.model, plan),
                    stream_tokens=tokens,
                    chunk_size=given.chunk_size,
                    memory_from=given.memory_from,
                    restart=name == RESTARTED,
                    on_chunk=on_chunk,
                )
            names = [name for name in (RESTARTED, *(plan.method.name for plan in self.plans)) if name in found]
            self.found = compare_to_baseline({name: found[name] for name in names})
            # Written at once, for the next method may take as long again.
            yield

    def _title(self, tokens: int) -> str:
        title = f"{self.model_name} on {self.read.name}: {tokens:,} tokens"
        if self.arguments.skip_tokens:
            title += f" from {self.arguments.skip_tokens:,} on"
        totals = {plan.total_tokens for plan in self.plans if plan.total_tokens is not None}
        return f"{title}, {totals.pop():,} tokens a head" if len(totals) == 1 else title

    def document(self) -> dict[str, Any]:
        described = {"name": self.read.name, "tokens": self.read.streams[0].numel()}
        settings = self.recorded(text=described, trained_length=self.trained_length)
        found = report.results_document(self.found, settings, self.device)
        for entry in found["results"].values():
            for part in (*entry["eighths"], *entry["bins"]):
                part["perplexity"] = Part(**part).perplexity
        return found

    def plot(self, path: Path) -> None:
        plot(path, self.found, self.title, self.trained_length)

    def table(self) -> None:
        """Print both tables, and where asked for as one in Markdown."""
        columns, early = by_method(self.found), next(iter(self.found.values())).memory_from
        restarted = "; 'restarted': the full cache, begun anew at each eighth" if self.arguments.restarted else ""
        parts = f"*: of the part that was read. 'worst': the highest of the eighths; 'streaming': StreamingLLM{restarted}."
        costs = (
            f"'early': after {early:,} tokens. 'archive in it': recall's, of the cache at the end. "
            "'resident': the process with the model, what is freed handed back. "
            "ms/token: median of a tenth's forward passes, compaction included."
        )
        report.print_columns(PERPLEXITIES.items(), columns, self.title, parts, self.console)
        report.print_columns(COSTS.items(), columns, "Memory and time", costs, self.console)
        if self.arguments.markdown:
            print(markdown(self.found))
