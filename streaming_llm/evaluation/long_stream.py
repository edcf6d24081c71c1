"""A stream many times the trained length: perplexity along it, memory and time at its start and at its end.

Every method reads the stream on its own, so that what the process holds is what that method needs. The full cache is taken
only some way past the trained length: its time grows with the square of the text, and what it shows is shown by then.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..stats import format_bytes
from . import streaming
from .cli import (
    LEAST_OF_TEXT,
    Parser,
    ProgressReport,
    add_method_flags,
    add_model_flags,
    add_output_flags,
    add_settings,
    add_text_flags,
    cache_settings,
    check_least,
    check_plans,
    exit_code,
    parse_arguments,
    prepare,
    read_text,
    recorded_settings,
    split_names,
)
from .errors import EvaluationError
from .methods import Plan, cache_factory, plan_methods, resolve_settings
from .report import (
    COLOURS,
    STYLES,
    Columns,
    markdown_columns,
    print_columns,
    results_document,
    write_atomically,
    write_json,
)

# The full cache, begun anew at each eighth: how hard the text is there.
RESTARTED = "restarted"
DEFAULT_METHODS = ("full", "streaming", "adms_low_rank", "adms")
# 1,028 tokens a head: 4 sinks, and half each for the recent window and what stands for the rest.
RECENT = MIDDLE = 512
BIN = 1024
EIGHTHS = 8
TENTHS = 10


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a stream: how many of them were scored, and their summed loss in nats."""

    start: int
    end: int
    scored: int
    nll: float

    @property
    def perplexity(self) -> float | None:
        """None where nothing was scored."""
        return math.exp(self.nll / self.scored) if self.scored else None

    @property
    def whole(self) -> bool:
        """Whether all of it was read; the stream's first token has nothing to be predicted from."""
        return self.scored == self.end - self.start - (self.start == 0)


@dataclass(frozen=True)
class LongTiming:
    """What differs between two runs. Seconds a token of each tenth: mean and median over its forward passes.

    `tail_over_head`: the last tenth's median over the second's; the first tenth is left out, as it fills the cache.
    `resident_start`, `resident_end`: bytes of the process after `memory_from` tokens and at the end; None where the system
    does not tell.
    """

    tokens_per_second: float
    mean: tuple[float | None, ...]
    median: tuple[float | None, ...]
    tail_over_head: float | None
    resident_start: int | None
    resident_end: int | None
    resident_growth: float | None


@dataclass(frozen=True)
class LongResult:
    """What one method did on the stream, or on the first `tokens` of it.

    `eighths` are those of the whole stream, `bins` of `BIN` tokens. `worst_over_first`: the highest perplexity of an eighth
    over the first's; `last_over_baseline`: the last eighth's over StreamingLLM's; None where an eighth was not read.
    `cache_bytes_start`: after `memory_from` tokens.
    """

    method: str
    tokens: int
    nll: float
    perplexity: float
    eighths: tuple[Part, ...]
    bins: tuple[Part, ...]
    worst_over_first: float | None
    last_over_baseline: float | None
    held_tokens: int
    memory_from: int
    cache_bytes_start: int
    cache_bytes_end: int
    timing: LongTiming


def resident_bytes() -> int | None:
    """Bytes of memory the process holds now; None where the system does not tell (it does on Linux)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None


@torch.no_grad()
def stream_method(
    model,
    stream: torch.Tensor,
    method: str,
    make_cache: streaming.CacheFactory,
    *,
    stream_tokens: int | None = None,
    chunk_size: int = 64,
    memory_from: int = 4096,
    restart: bool = False,
    on_chunk: Callable[[int, dict[str, float]], None] | None = None,
) -> LongResult:
    """Read `stream`, int64 `[tokens]`, through a new cache, every token but the first scored.

    `stream_tokens`: length of the stream of which this is the beginning, for the eighths (default: this is all).
    `memory_from`: the token after which memory is read for comparison with the end. `restart`: go on with a new cache after
    the chunk that ends an eighth, so that each is read by itself. `on_chunk(tokens, {method: perplexity})`
    is called after each chunk.
    """
    tokens = stream.numel()
    # All that is recorded has its place before the first reading of the memory.
    losses = torch.full((tokens,), math.nan, dtype=torch.float64)
    seconds = torch.zeros(-(-tokens // chunk_size), dtype=torch.float64)
    targets = stream.to(next(model.parameters()).device)
    held = total = 0
    start_bytes = start_resident = None
    streaming.warm_up(model, stream[:chunk_size])
    whole = stream_tokens or tokens
    borders = [round(whole * number / EIGHTHS) for number in range(EIGHTHS + 1)]
    caches = {method: make_cache()}
    for number, chunk in enumerate(streaming.lockstep(model, stream, caches, chunk_size)):
        cache = caches[method]
        seconds[number] = chunk.seconds / (chunk.end - chunk.start)
        logits, scored = streaming.scored_part(chunk, tokens, 1)
        for rows, _, nll in streaming.predictions(chunk, logits, targets[scored.start : scored.stop]):
            losses[scored.start + rows.start :][: nll.numel()] = nll
            total += nll.sum().item()
        held = max(held, streaming.held_tokens(cache))
        if start_bytes is None and chunk.end >= min(memory_from, tokens):
            start_bytes, start_resident = streaming.cache_bytes(cache), settled_resident()
        if on_chunk is not None and scored:
            on_chunk(chunk.end, {method: math.exp(total / (scored.stop - 1))})
        if restart and any(chunk.start < border <= chunk.end for border in borders[1:-1]):
            caches[method] = make_cache()
    # Before anything else is computed: what follows is no part of the stream.
    end_resident = settled_resident()
    mean, median = _tenths(seconds)
    head, tail = median[1], median[-1]
    timing = LongTiming(
        tokens_per_second=tokens / _forward_seconds(seconds, chunk_size, tokens),
        mean=mean,
        median=median,
        tail_over_head=tail / head if head and tail else None,
        resident_start=start_resident,
        resident_end=end_resident,
        resident_growth=end_resident / start_resident - 1 if start_resident and end_resident else None,
    )
    eighths = _parts(losses, borders)
    perplexities = [part.perplexity for part in eighths if part.whole]
    return LongResult(
        method=method,
        tokens=tokens,
        nll=total,
        perplexity=math.exp(total / (tokens - 1)),
        eighths=eighths,
        bins=_parts(losses, [*range(0, tokens, BIN), tokens]),
        worst_over_first=max(perplexities) / perplexities[0] if len(perplexities) == EIGHTHS else None,
        last_over_baseline=None,
        held_tokens=held,
        memory_from=min(memory_from, tokens),
        cache_bytes_start=start_bytes,
        cache_bytes_end=streaming.cache_bytes(cache),
        timing=timing,
    )


def settled_resident() -> int | None:
    """`resident_bytes` once what was freed is handed back to the system, as far as the C library can."""
    gc.collect()
    # glibc keeps freed memory for the next allocation: how much is there by chance would be read as growth.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return resident_bytes()


def _forward_seconds(seconds: torch.Tensor, chunk_size: int, tokens: int) -> float:
    sizes = torch.full_like(seconds, chunk_size)
    sizes[-1] = tokens - chunk_size * (seconds.numel() - 1)
    return float((seconds * sizes).sum())


def _tenths(seconds: torch.Tensor) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Mean and median seconds a token of each tenth of the forward passes; None where there are too few."""
    parts = torch.tensor_split(seconds, TENTHS)
    means = tuple(float(part.mean()) if part.numel() else None for part in parts)
    return means, tuple(float(part.median()) if part.numel() else None for part in parts)


def _parts(losses: torch.Tensor, borders: Sequence[int]) -> tuple[Part, ...]:
    parts = []
    for start, end in zip(borders, borders[1:], strict=False):
        part = losses[start:end]
        part = part[~part.isnan()]
        parts.append(Part(start, end, part.numel(), float(part.sum())))
    return tuple(parts)


def compare_to_baseline(results: Mapping[str, LongResult]) -> dict[str, LongResult]:
    """The results with `last_over_baseline` filled in, where StreamingLLM is among them."""
    baseline = results.get(streaming.BASELINE)
    last = baseline.eighths[-1] if baseline is not None else None
    if last is None or not last.whole:
        return dict(results)
    return {
        name: dataclasses.replace(result, last_over_baseline=result.eighths[-1].perplexity / last.perplexity)
        if result.eighths[-1].whole
        else result
        for name, result in results.items()
    }


def own_positions(plans: Sequence[Plan], given: Mapping[str, Any]) -> list[Plan]:
    """The plans, StreamingLLM with positions within its cache, as its paper has them, unless positions were asked for."""
    from streaming_llm import ADMSConfig

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


def _ratio(value: float | None, form: str = "{:.3f}") -> str:
    return "-" if value is None else form.format(value)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def _bytes(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


# A line's head, and how a result reads in it. A column is a method: with eight eighths the other way would be too wide.
PERPLEXITIES: dict[str, Callable[[LongResult], str]] = {
    **{f"eighth {number + 1}": lambda result, n=number: _perplexity(result.eighths[n]) for number in range(EIGHTHS)},
    "worst / first eighth": lambda result: _ratio(result.worst_over_first),
    "last / streaming's last": lambda result: _ratio(result.last_over_baseline),
}
COSTS: dict[str, Callable[[LongResult], str]] = {
    "tokens read": lambda result: f"{result.tokens:,}",
    "most tokens held": lambda result: f"{result.held_tokens:,}",
    "cache, early": lambda result: _bytes(result.cache_bytes_start),
    "cache, end": lambda result: _bytes(result.cache_bytes_end),
    "resident, early": lambda result: _bytes(result.timing.resident_start),
    "resident, end": lambda result: _bytes(result.timing.resident_end),
    "resident, growth": lambda result: _ratio(result.timing.resident_growth, "{:+.2%}"),
    "ms/token, 2nd tenth": lambda result: _milliseconds(result.timing.median[1]),
    "ms/token, last tenth": lambda result: _milliseconds(result.timing.median[-1]),
    "last / 2nd tenth": lambda result: _ratio(result.timing.tail_over_head),
    "tokens/s": lambda result: f"{result.timing.tokens_per_second:.0f}",
}


def perplexity_caption(results: Mapping[str, LongResult]) -> str:
    """What stands below the table of perplexities."""
    restarted = "; 'restarted': the full cache, begun anew at each eighth" if RESTARTED in results else ""
    return f"*: of the part that was read. 'worst': the highest of the eighths; 'streaming': StreamingLLM{restarted}."


def cost_caption(results: Mapping[str, LongResult]) -> str:
    """What stands below the table of costs."""
    early = next(iter(results.values())).memory_from
    return (
        f"'early': after {early:,} tokens. 'resident': the process with the model, what is freed handed back. "
        "ms/token: median of a tenth's forward passes, compaction included."
    )


def by_method(results: Mapping[str, LongResult]) -> Columns:
    """Columns for lines of `PERPLEXITIES` or `COSTS`: the line's head, and each method's figure."""
    columns: dict[str, Callable[[Any], str]] = {"": lambda line: line[0]}
    return columns | {name: lambda line, result=result: line[1](result) for name, result in results.items()}


def markdown(results: Mapping[str, LongResult]) -> str:
    """Both tables as one, in Markdown."""
    return markdown_columns((PERPLEXITIES | COSTS).items(), by_method(results))


def document(results: Mapping[str, LongResult], settings: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """What `results.json` holds; all that differs between two runs on one machine is under `timing`."""
    found = results_document(results, settings, device)
    for entry in found["results"].values():
        for part in (*entry["eighths"], *entry["bins"]):
            part["perplexity"] = Part(**part).perplexity
    return found


def plot(path: Path, results: Mapping[str, LongResult], title: str, trained_length: int | None) -> None:
    """Draw the perplexity of each `BIN` tokens, one line a method, the trained length marked (needs `matplotlib`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, ScalarFormatter

    # No pyplot: a window's toolkit is not needed to write a file, nor a global figure.
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    longest = max(result.tokens for result in results.values())
    for index, (name, result) in enumerate(results.items()):
        turn, colour = divmod(index, len(COLOURS))
        look = {"color": COLOURS[colour], "linestyle": STYLES[(colour + turn) % len(STYLES)], "linewidth": 1.6}
        parts = [part for part in result.bins if part.scored]
        # A bin's value stands for all of it: a line between the middles of the bins.
        axes.plot([(part.start + part.end) / 2 for part in parts], [part.perplexity for part in parts], label=name, **look)
    if trained_length is not None and trained_length < longest:
        # Named in the legend: no place within the axes is sure to be free.
        label = f"trained length, {trained_length:,}"
        axes.axvline(trained_length, color="0.35", linewidth=1.2, linestyle=(0, (2, 2)), label=label)
    # The full cache past the trained length is worse by orders of magnitude.
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlim(0, longest)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.set_xlabel("tokens read")
    axes.set_ylabel(f"perplexity of each {BIN:,} tokens")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the long stream's command line."""
    parser = Parser(
        prog="long_stream.py",
        description="Stream a text many times longer than the model was trained on: perplexity of each eighth, memory and "
        "time at the start and at the end, one method after another.",
        allow_abbrev=False,
    )
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("text")
    add_text_flags(group)
    group.add_argument("--num_eval_tokens", type=int, default=65536, metavar="N", help="tokens of the stream (%(default)s)")
    group = parser.add_argument_group("comparison")
    add_method_flags(group, DEFAULT_METHODS)
    group.add_argument(
        "--full_tokens",
        type=int,
        default=12288,
        metavar="N",
        help="tokens of the stream that the full cache reads: its time grows with their square (%(default)s)",
    )
    group.add_argument(
        "--restarted",
        action="store_true",
        help="also read each eighth by itself, with a full cache begun anew: how hard the text is there",
    )
    group.add_argument(
        "--memory_from",
        type=int,
        default=4096,
        metavar="N",
        help="compare the memory at the end to that after N tokens (%(default)s)",
    )
    group = parser.add_argument_group("output")
    add_output_flags(group, "results/long_stream")
    group.add_argument("--markdown", action="store_true", help="print the tables in Markdown too")
    add_settings(parser, RECENT, MIDDLE)
    return parser


def checked_plans(arguments: argparse.Namespace) -> list[Plan]:
    """The methods to run; `ValueError` for anything wrong with the arguments."""
    check_least(arguments, {"chunk_size": 1, "log_every": 0, **LEAST_OF_TEXT, "full_tokens": 2, "memory_from": 1})
    return given_plans(arguments)


def given_plans(arguments: argparse.Namespace) -> list[Plan]:
    """The methods of the flags, at `RECENT` and `MIDDLE` where no size is given; `ValueError` for a wrong setting."""
    given = cache_settings(arguments)
    plans = own_positions(plan_methods(split_names(arguments.methods), resolve_settings(given, RECENT, MIDDLE)), given)
    check_plans(plans)
    return plans


def main(argv: Sequence[str] | None = None) -> int:
    """Run the long stream; its exit code, as of `cli.exit_code`."""
    parser = build_parser()
    arguments = parse_arguments(parser, sys.argv[1:] if argv is None else argv)
    return exit_code(parser.prog, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    # All that can be wrong with the arguments is found before the weights are loaded.
    plans = checked_plans(arguments)
    setup = prepare(arguments)
    console, output, model = setup.console, setup.output, setup.model

    text = read_text(arguments, setup.tokenizer, arguments.dataset_name)
    stream = text.streams[0]
    tokens = stream.numel()
    if tokens < EIGHTHS * 2:
        raise EvaluationError(f"{text.name} gives {tokens} tokens; the eighths of a stream need at least {EIGHTHS * 2}")
    described = {"name": text.name, "tokens": tokens}
    settings = recorded_settings(arguments, plans, text=described, trained_length=setup.trained_length)
    title = f"{setup.model_name} on {text.name}: {tokens:,} tokens"
    if arguments.skip_tokens:
        title += f" from {arguments.skip_tokens:,} on"
    totals = {plan.total_tokens for plan in plans if plan.total_tokens is not None}
    if len(totals) == 1:
        title += f", {totals.pop():,} tokens a head"
    console.print(title, soft_wrap=True)

    found: dict[str, LongResult] = {}
    # The full cache last: what it leaves to the process would hide what the others need.
    runs = sorted(((plan.method.name, plan) for plan in plans), key=lambda run: run[0] == streaming.REFERENCE)
    if arguments.restarted:
        runs += [(RESTARTED, plan) for plan in plan_methods([streaming.REFERENCE], {})]
    for name, plan in runs:
        part = stream[: arguments.full_tokens] if name == streaming.REFERENCE else stream
        with ProgressReport(console, part.numel(), arguments.log_every) as on_chunk:
            found[name] = stream_method(
                model,
                part,
                name,
                cache_factory(model, plan),
                stream_tokens=tokens,
                chunk_size=arguments.chunk_size,
                memory_from=arguments.memory_from,
                restart=name == RESTARTED,
                on_chunk=on_chunk,
            )
        # Written at once, for the next method may take as long again.
        names = [name for name in (RESTARTED, *(plan.method.name for plan in plans)) if name in found]
        results = compare_to_baseline({name: found[name] for name in names})
        plot(output / "perplexity.png", results, title, setup.trained_length)
        write_json(output / "results.json", document(results, settings, setup.device))
    columns = by_method(results)
    print_columns(PERPLEXITIES.items(), columns, title, perplexity_caption(results), console)
    print_columns(COSTS.items(), columns, "Memory and time", cost_caption(results), console)
    if arguments.markdown:
        print(markdown(results))
    console.print(f"wrote {output / 'results.json'} and {output / 'perplexity.png'}", soft_wrap=True)
    return 0
