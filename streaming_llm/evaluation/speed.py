"""The speed of caches along a history: decoding, reading, what compaction takes, the longest step, memory at the peak.

All caches of a case take turns in one process, so that their ratios hold on a machine with other work too; a history is made
of random states, so that only what is measured takes a model's time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..stats import format_bytes
from . import flags, models, pace, report, streaming
from .methods import Method, Plan, cache_factory, check_plans
from .pace import Lane, Pace
from .plots import line_looks
from .run import ModelRun

# Beside methods of the comparison, at equal tokens a head: transformers' cache of one size, and the default settings.
STATIC, DEFAULTS = "static", "defaults"
OWN = {
    STATIC: Method(STATIC, "full", "transformers' cache of one size, with room for all that comes"),
    DEFAULTS: Method(DEFAULTS, "adms", "the settings of `ADMSConfig` as they are"),
}
UNBOUNDED = (streaming.REFERENCE, STATIC)
METHODS = (streaming.REFERENCE, STATIC, streaming.BASELINE, "adms_low_rank", "adms", "adms_recall", DEFAULTS)
# 516 tokens a head are held by the bounded ones: what `full` does with as many is what they are compared with.
HISTORIES = (516, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
CHUNKS = (64, 256, 512, 1024)
DIFFERENT = "different"


@dataclass
class SpeedArguments(flags.Model):
    """The flags beside the settings of the cache."""

    dtype: list[str] = flags.argument(
        "one or several of float32, bfloat16, float16 (float32)", ("float32",), metavar="DTYPE"
    )
    shape: str | None = flags.argument(
        f"instead of a model that is loaded a random one of this shape: {', '.join(models.SHAPES)}", metavar="NAME"
    )
    methods: list[str] = flags.argument(f"of {', '.join(METHODS)} (all)", METHODS, metavar="METHOD")
    histories: list[int] = flags.argument(
        f"tokens seen before decoding is measured; 0: not at all ({' '.join(map(str, HISTORIES))})", HISTORIES, metavar="N"
    )
    batches: list[str] = flags.argument(f"rows, as 8, or of different length, as 8-{DIFFERENT} (1)", ("1",), metavar="ROWS")
    rounds: int = flags.count("rounds of steps at each length, in which caches take turns (%(default)s)", 3)
    steps: int = flags.count("steps of a round; a multiple of compression_interval (%(default)s)", 64)
    read_tokens: int = flags.count("tokens of the document that is read; 0: none (%(default)s)", 20000)
    chunk_sizes: list[int] = flags.argument(
        f"tokens of the passes it is read in ({' '.join(map(str, CHUNKS))})", CHUNKS, metavar="N"
    )
    full_tokens: int = flags.count("tokens of history that caches without a bound take part in (%(default)s)", 32768)
    clock: str = flags.argument(
        "wall, or process: seconds of the process's threads, which other work disturbs less (%(default)s)", "wall"
    )
    threads: int | None = flags.count("threads that torch uses (its own choice)")
    output_dir: str = flags.directory("results/speed")
    markdown: flags.Switch = flags.switch("print the tables in Markdown too")


@dataclass(frozen=True)
class Case:
    """What one cache is measured with. `batch`: as in `--batches`; `tokens`: of history, or of the document; `chunk_size`:
    tokens a pass, 1 for decoding."""

    method: str
    dtype: str
    batch: str
    tokens: int
    chunk_size: int


@dataclass(frozen=True)
class Measured:
    """A case with what was found. `peak_bytes`: of the cache with all that a step (a round of them, a pass) makes beside.

    `curve`: seconds of the document's passes, where it was read.
    """

    case: Case
    cache_bytes: int
    peak_bytes: int
    pace: Pace
    curve: tuple[float, ...] = ()

    @property
    def figure(self) -> str:
        """What it is part of in the tables and the plot."""
        return f"{self.case.dtype}, batch {self.case.batch}"


def _ratio(name: str) -> Callable[[Measured], str]:
    return lambda row: report.cell(row.pace.ratios.get(name), "{:.2f}")


SHORT = "short"
COLUMNS: dict[str, Callable[[Measured], str]] = {
    "method": lambda row: row.case.method,
    "model in, batch": lambda row: row.figure,
    "tokens": lambda row: f"{row.case.tokens:,}",
    "chunk": lambda row: f"{row.case.chunk_size:,}",
    "tokens/s": lambda row: f"{row.pace.tokens_per_second:.1f}",
    "range of rounds": lambda row: f"{row.pace.slowest:.1f}-{row.pace.fastest:.1f}",
    "x full": _ratio(streaming.REFERENCE),
    "x streaming": _ratio(streaming.BASELINE),
    "x short": _ratio(SHORT),
    "compaction": lambda row: report.cell(row.pace.compaction, "{:.1%}"),
    "longest/median step": lambda row: f"{row.pace.longest:.2f}" if row.case.chunk_size == 1 else "-",
    "cache": lambda row: format_bytes(row.cache_bytes),
    "peak": lambda row: format_bytes(row.peak_bytes),
}
ONLY_DECODING = ("range of rounds", "x short", "longest/median step")
CAPTION = (
    "'x full', 'x streaming': speed over that method's in the same round; 'x short': over the full cache's at the first"
    " history."
    " 'compaction': over the rest of the time. 'longest': by place in the interval, the fastest of the rounds."
    " 'peak': the cache with all a step makes beside it."
)


def parse_batch(name: str) -> tuple[int, bool]:
    """Rows, and whether they are of different length; `ValueError` for what is no entry of `--batches`."""
    rows, _, kind = name.partition("-")
    if not rows.isdecimal() or int(rows) < 1 or kind not in ("", DIFFERENT) or (kind and int(rows) < 2):
        raise ValueError(f"batches {name!r} must be a number of rows, as 8, or 8-{DIFFERENT} for rows of different length")
    return int(rows), bool(kind)


def plot(path: Path, rows: Sequence[Measured], model: str, clock: str) -> None:
    """Draw speed and memory along the history, a row of panels for each dtype and batch (needs `matplotlib`)."""
    from matplotlib.ticker import ScalarFormatter

    figures = list(dict.fromkeys(row.figure for row in rows))
    methods = [name for name in METHODS if any(row.case.method == name for row in rows)]
    figure = report.new_figure(13, 1.2 + 3.6 * len(figures))
    panels = figure.subplots(len(figures), 3, squeeze=False)
    looks = line_looks(methods)
    for name, axes in zip(figures, panels, strict=True):
        for method in methods:
            look = looks[method] | {"label": method, "marker": ".", "markersize": 5}
            own = [row for row in rows if row.figure == name and row.case.method == method]
            decoded = [row for row in own if row.case.chunk_size == 1]
            histories = [row.case.tokens for row in decoded]
            axes[0].plot(histories, [row.pace.tokens_per_second for row in decoded], **look)
            axes[1].plot(histories, [row.peak_bytes / 2**20 for row in decoded], **look)
            read = [row for row in own if row.case.chunk_size > 1]
            axes[2].plot([row.case.chunk_size for row in read], [row.pace.tokens_per_second for row in read], **look)
        labels = (
            ("tokens of history", f"decoding, tokens/s ({clock})"),
            ("tokens of history", "cache and a step at the peak, MiB"),
            ("tokens a pass", f"reading, tokens/s ({clock})"),
        )
        for axis, (across, up) in zip(axes, labels, strict=True):
            axis.set_xlabel(across)
            axis.set_ylabel(up)
            if axis.lines and any(len(line.get_xdata()) for line in axis.lines):
                axis.set_xscale("log", base=2)
                report.grid(axis)
                axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_ylim(bottom=0)
        if any(len(line.get_xdata()) for line in axes[1].lines):
            axes[1].set_ylim(auto=True)
            axes[1].set_yscale("log")
        axes[0].set_title(f"{model}: {name}", loc="left", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(methods), frameon=False)
    report.save_figure(figure, path)


class Speed(ModelRun):
    """Measure decoding and reading with caches along a history: tokens a second, compaction, longest step, peak memory."""

    prog = "benchmark_speed.py"
    Arguments = SpeedArguments
    least = {"rounds": 1, "steps": 1, "read_tokens": 0, "threads": 1, "full_tokens": 1}
    results, picture = "speed.json", "speed.png"

    def check(self) -> None:
        super().check()
        given, names = self.arguments, flags.split_names(self.arguments.methods)
        for name in names:
            if name not in METHODS:
                raise ValueError(f"method {name!r} is not known; choose from {', '.join(METHODS)}")
        known = {plan.method.name: plan for plan in self.plan([name for name in METHODS if name not in OWN])}
        known |= {name: Plan(method, {}, None, None) for name, method in OWN.items()}
        self.plans = [known[name] for name in dict.fromkeys(names)]
        check_plans(self.plans)
        self.dtypes = list(dict.fromkeys(flags.split_names(given.dtype)))
        for dtype in self.dtypes:
            if dtype not in models.DTYPES[:-1]:
                raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(models.DTYPES[:-1])}")
        self.batches = {name: parse_batch(name) for name in flags.split_names(given.batches)}
        for name, values, least in (("histories", given.histories, 0), ("chunk_sizes", given.chunk_sizes, 1)):
            if min(values) < least:
                raise ValueError(f"{name}={min(values)} is too small; it must be at least {least}")
        if given.clock not in pace.Lap._fields[:2]:
            raise ValueError(f"clock={given.clock!r} must be one of {', '.join(pace.Lap._fields[:2])}")
        if given.shape is not None:
            if given.shape not in models.SHAPES:
                raise ValueError(f"shape={given.shape!r} is not known; choose from {', '.join(models.SHAPES)}")
            if given.model_name_or_path is not None:
                raise ValueError(
                    f"shape={given.shape!r} makes a random model and model_name_or_path={given.model_name_or_path!r} loads "
                    "one: give one of them"
                )
        self.histories = sorted({tokens for tokens in given.histories if tokens})
        first = min([*self.histories, *([given.read_tokens] if given.read_tokens else [])], default=0)
        most = max(different * (rows - 1) * pace.PADDING_STEP for rows, different in self.batches.values())
        if most and first <= most:
            raise ValueError(
                f"histories and read_tokens must be more than {most}, what the last row of a batch is padded by"
            )

    def load_model(self, dtype: str) -> tuple[Any, Any]:
        """The model that is measured, in a dtype or the first of several, and its tokenizer, if any."""
        if not isinstance(dtype, str):
            dtype = self.dtypes[0]
        self.loaded_dtype = dtype
        if self.arguments.shape is not None:
            return models.random_model(self.arguments.shape, dtype, self.device, self.seed), None
        return super().load_model(dtype)

    def load(self) -> None:
        """As of any model; threads are pinned first."""
        given = self.arguments
        self.threads_before = torch.get_num_threads()
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        super().load()
        if given.shape is not None:
            self.model_name = f"a random model shaped as {given.shape}"
        self.cores, self.free = pace.free_cores()
        threads = torch.get_num_threads()
        self.console.print(f"{self.model_name}: {threads} threads, {self.cores} cores, {self.free:.1f} of them free")
        if self.device.type == "cpu" and self.free < threads:
            self.console.print(
                f"warning: {threads} threads and {self.free:.1f} free cores: waiting threads make steps many times longer; "
                f"take --threads {max(1, int(self.free))} or wait for a quiet machine"
            )

    def run(self) -> int:
        """As of any run; threads are as before then."""
        try:
            return super().run()
        finally:
            torch.set_num_threads(getattr(self, "threads_before", torch.get_num_threads()))

    def measure(self) -> Iterator[None]:
        """Measure decoding at one history after another, then reading in chunks of one size after another."""
        self.found: list[Measured] = []
        for dtype in self.dtypes:
            if dtype != self.loaded_dtype:
                self.model = None
                self.model, self.tokenizer = self.load_model(dtype)
            streaming.warm_up(self.model, torch.zeros(8, dtype=torch.int64))
            for name in self.batches:
                for found in self._all(name):
                    self.found += found
                    for row in found:
                        self._tell(row)
                    yield

    def _all(self, batch: str) -> Iterator[list[Measured]]:
        if self.histories:
            yield from self._decoding(batch)
        if self.arguments.read_tokens:
            for chunk_size in dict.fromkeys(self.arguments.chunk_sizes):
                yield self._reading(batch, chunk_size)

    def _tell(self, row: Measured) -> None:
        told = f"{row.figure}, {row.case.tokens:,} tokens, chunks of {row.case.chunk_size}: {row.case.method}"
        self.console.print(f"{told} {row.pace.tokens_per_second:.1f} tokens/s", highlight=False, soft_wrap=True)

    def _lane(self, plan: Plan, batch: str, most: int) -> Lane:
        rows, different = self.batches[batch]
        if plan.method.name == STATIC:
            from transformers import StaticCache

            cache = StaticCache(config=self.model.config, max_cache_len=most)
        else:
            cache = cache_factory(self.model, plan)()
        return Lane(self.model, cache, rows, different, most)

    def _decoding(self, batch: str) -> Iterator[list[Measured]]:
        """What each cache does at each history; bounded ones go on from the one before."""
        given, generator = self.arguments, torch.Generator().manual_seed(self.seed)
        rows, _ = self.batches[batch]
        own = given.steps * (given.rounds + 1)
        ids = pace.random_ids(self.model, rows, given.steps, generator)
        lanes: dict[str, Lane] = {}
        short = None
        for tokens in self.histories:
            taking_part = [plan for plan in self.plans if plan.method.name not in UNBOUNDED or tokens <= given.full_tokens]
            for plan in taking_part:
                name = plan.method.name
                if name not in lanes or name in UNBOUNDED:
                    lanes[name] = self._lane(plan, batch, max(self.histories) + own)
                lanes[name].fill(tokens, generator)
            now = {plan.method.name: lanes[plan.method.name] for plan in taking_part}
            if short is None and streaming.REFERENCE in now:
                full = next(plan for plan in self.plans if plan.method.name == streaming.REFERENCE)
                short = self._lane(full, batch, own + tokens)
                short.fill(tokens, generator)
            peaks = {name: self._peak(lane, ids, 1) for name, lane in now.items()}
            taking_turns = now if short is None else now | {SHORT: short}
            laps = pace.turns(taking_turns, ids, given.rounds, given.steps)
            if short is not None:
                short.back(given.steps * given.rounds)
            case = Case("", self.loaded_dtype, batch, tokens, 1)
            yield [self._measured(name, lane, case, peaks[name], laps) for name, lane in now.items()]
            for name in UNBOUNDED:
                lanes.pop(name, None)

    def _reading(self, batch: str, chunk_size: int) -> list[Measured]:
        """A document read by all caches, one chunk after another."""
        given, generator = self.arguments, torch.Generator().manual_seed(self.seed)
        rows, _ = self.batches[batch]
        ids = pace.random_ids(self.model, rows, given.read_tokens, generator)
        plans = [plan for plan in self.plans if plan.method.name not in UNBOUNDED or given.read_tokens <= given.full_tokens]
        lanes = {plan.method.name: self._lane(plan, batch, given.read_tokens + chunk_size) for plan in plans}
        laps = {name: [own] for name, own in pace.in_lockstep(lanes, ids, chunk_size).items()}
        peaks = {name: self._peak(lane, ids[:, :chunk_size], chunk_size) for name, lane in lanes.items()}
        case = Case("", self.loaded_dtype, batch, given.read_tokens, chunk_size)
        return [self._measured(name, lane, case, peaks[name], laps) for name, lane in lanes.items()]

    def _peak(self, lane: Lane, ids: torch.Tensor, chunk_size: int) -> int:
        """Bytes of a cache with all that steps with these tokens make beside it; they warm up what is timed after them."""
        held = streaming.cache_bytes(lane.cache)
        return held + pace.peak_bytes(lambda: [lane.feed(part) for part in ids.split(chunk_size, dim=1)], self.device)

    def _measured(self, name: str, lane: Lane, case: Case, peak: int, laps: Mapping[str, Any]) -> Measured:
        others = {other: laps[other] for other in (streaming.REFERENCE, streaming.BASELINE, SHORT) if other in laps}
        tokens = lane.batch * case.chunk_size if case.chunk_size == 1 else lane.batch * case.tokens / len(laps[name][0])
        found = pace.pace(laps[name], tokens, self.arguments.clock, others)
        curve = () if case.chunk_size == 1 else tuple(getattr(lap, self.arguments.clock) for lap in laps[name][0])
        held = streaming.cache_bytes(lane.cache)
        return Measured(dataclasses.replace(case, method=name), held, peak, found, curve)

    def document(self) -> dict[str, Any]:
        results, timing = [], []
        for row in self.found:
            entry = dataclasses.asdict(row)
            timing.append(entry["case"] | entry.pop("pace") | {"curve": entry.pop("curve")})
            results.append(entry.pop("case") | entry)
        machine = {"threads": torch.get_num_threads(), "cores": self.cores, "free_cores": self.free}
        return report.document(self.recorded(), self.device, results, {"machine": machine, "rows": timing})

    def plot(self, path: Path) -> None:
        plot(path, self.found, self.model_name, self.arguments.clock)

    def table(self) -> None:
        """Print the table, and where asked for in Markdown."""
        for title, decoding in (("Decoding", True), ("Reading", False)):
            rows = [row for row in self.found if (row.case.chunk_size == 1) == decoding]
            if rows:
                columns = {name: show for name, show in COLUMNS.items() if decoding or name not in ONLY_DECODING}
                report.print_columns(rows, columns, f"{title}: {self.model_name}", CAPTION, self.console)
                if self.arguments.markdown:
                    print(f"\n{report.markdown_columns(rows, columns)}")
