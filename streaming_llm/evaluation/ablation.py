"""The ablation of the four ADM++ modules: each alone, and one on top of another, at equal tokens a head."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..stats import format_bytes
from . import flags, plots, report, streaming
from .errors import EvaluationError
from .methods import Plan, check_plans
from .run import ModelRun
from .streaming import MethodResult
from .variants import BASE_NAME, LEVELS, MODULES, REFERENCES, VARIANTS, parse_settings, plan_variants

NOVEL = "novel"
DEFAULT_BUDGETS = (260, 516)
COUNTERS = {
    "promotions": "total_sketch_promotions",
    "replay triggers": "total_replay_triggers",
    "replay tokens": "total_replay_tokens",
    "calibrations": "total_calibrations",
    "budget adjustments": "total_budget_adjustments",
}


@dataclass(frozen=True)
class Row:
    """One variant's result.

    `kl`: nats a token, to the full cache. `kl_change`: KL over base's, less 1 (-0.1: a tenth less). `held_tokens`: the
    most tokens a head of the fullest layer held, so more than the budget while a compaction is due.
    `cache_bytes`: all the cache's state but the originals kept outside the attended set, which are `originals_bytes`.
    `bytes_ratio`, `time_ratio`: cache bytes and forward seconds over base's. `counters`: None for a reference.
    """

    variant: str
    level: int | None
    perplexity: float
    kl: float
    kl_change: float | None
    held_tokens: int
    cache_bytes: int
    bytes_ratio: float
    originals_bytes: int
    counters: dict[str, int] | None
    forward_seconds: float
    time_ratio: float


@dataclass(frozen=True)
class Section:
    """The rows of one text at one budget; references first."""

    text: str
    tokens: int
    budget: int
    score_from: int
    settings: dict[str, dict[str, Any]]
    rows: tuple[Row, ...]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.variant,
    "level": lambda row: report.cell(row.level, str),
    "perplexity": lambda row: f"{row.perplexity:.3f}",
    "KL to full": lambda row: f"{row.kl:.5f}",
    "KL change": lambda row: report.cell(row.kl_change, "{:+.1%}"),
    "time": lambda row: f"{row.time_ratio:.2f}x",
    "cache": lambda row: f"{row.bytes_ratio:.2f}x",
    "originals": lambda row: report.cell(row.originals_bytes or None, format_bytes),
}
COUNTER_COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.variant,
    "most held": lambda row: f"{row.held_tokens:,}",
    **{name: lambda row, name=name: report.cell(row.counters and row.counters[name], "{:,}") for name in COUNTERS},
}


def summarize(results: Mapping[str, MethodResult]) -> tuple[Row, ...]:
    """The rows of one text and budget, in the order of `results`, which must hold "base"."""
    base = results[BASE_NAME]
    base_bytes, _ = _sizes(base)
    rows = []
    for name, result in results.items():
        size, originals = _sizes(result)
        counters = {key: int(result.stats.get(stat, 0)) for key, stat in COUNTERS.items()}
        rows.append(
            Row(
                variant=name,
                level=LEVELS.get(name),
                perplexity=result.perplexity,
                kl=result.kl,
                kl_change=result.kl / base.kl - 1 if base.kl and name != "full" else None,
                held_tokens=result.held_tokens,
                cache_bytes=size,
                bytes_ratio=size / base_bytes,
                originals_bytes=originals,
                counters=None if name in REFERENCES else counters,
                forward_seconds=result.timing.forward_seconds,
                time_ratio=result.timing.forward_seconds / base.timing.forward_seconds,
            )
        )
    return tuple(rows)


def plot(path: Path, sections: Sequence[Section], title: str) -> None:
    """Draw the variants' KL to the full cache as bars, one panel a text (down) and budget (across); needs `matplotlib`."""
    texts = list(dict.fromkeys(section.text for section in sections))
    budgets = list(dict.fromkeys(section.budget for section in sections))
    bars = max(sum(row.variant not in REFERENCES for row in section.rows) for section in sections)
    figure = report.new_figure(1.2 + 4.6 * len(budgets), 0.9 + len(texts) * (1.3 + 0.34 * bars))
    panels = figure.subplots(len(texts), len(budgets), squeeze=False)
    looks: dict[str, Any] = {}
    for section in sections:
        column = budgets.index(section.budget)
        looks |= _panel(panels[texts.index(section.text)][column], section, named=column == 0)
    figure.suptitle(textwrap.fill(title, 52 * len(budgets)), x=0.01, ha="left", fontsize=11)
    columns = 1 if len(budgets) == 1 else 4
    figure.legend(looks.values(), looks.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    report.save_figure(figure, path)


# Light enough for black numbers, told apart with any colour vision.
_COLOURS = {
    "base ADMS, 0%": plots.ORANGE,
    "one module alone": plots.SKY,
    "dual_fidelity and more, added one by one": plots.GREEN,
}


def _kind(variant: str) -> str:
    base, alone, added = _COLOURS
    if variant == BASE_NAME:
        return base
    return added if variant.startswith("+") else alone


def _label(variant: str) -> str:
    return f"{variant} = ADM++" if VARIANTS[variant] == tuple(MODULES) else variant


def _panel(axes, section: Section, named: bool) -> dict[str, Any]:
    """Draw one section's bars from zero; gives what the legend shows, by label."""
    rows = [row for row in section.rows if row.variant not in REFERENCES]
    base = next(row.kl for row in rows if row.variant == BASE_NAME)
    streaming = next(row.kl for row in section.rows if row.variant == "streaming")
    longest = max(row.kl for row in rows)
    looks = {}
    for place, row in enumerate(rows):
        kind = _kind(row.variant)
        looks[kind] = axes.barh(place, row.kl, color=_COLOURS[kind], height=0.72)
        change = "" if row.variant == BASE_NAME or row.kl_change is None else f"  ({row.kl_change:+.1%})"
        # At the bar's foot no line for another variant gets in the way, whatever the bar's length.
        label = f"{row.kl:.4f}{change}"
        axes.annotate(label, (0, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    looks = {kind: looks[kind] for kind in _COLOURS if kind in looks}
    axes.axvline(base, color=_COLOURS[_kind(BASE_NAME)], linewidth=1.2, zorder=0)
    name = section.text if len(section.text) <= 30 else f"…{section.text[-29:]}"
    heading = f"{name}, {section.budget:,} tokens a head"
    limit = 1.05 * longest or 1.0
    if streaming <= 1.5 * longest:
        looks["StreamingLLM"] = axes.axvline(streaming, color="0.25", linestyle="--", linewidth=1.2, zorder=0)
        limit = max(limit, 1.05 * streaming)
    else:
        heading += f"\nStreamingLLM: {streaming:.4f}, beyond the scale"
    axes.set_xlim(0, limit)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_label(row.variant) for row in rows] if named else [""] * len(rows))
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize=9)
    axes.set_title(heading, loc="left", fontsize=10)
    axes.set_xlabel("KL to the full cache (nats a token); less is better", fontsize=9)
    return looks


_CAPTION = (
    "'level': modules added one by one. KL in nats a token; its change, time and cache are relative to base ADMS. 'cache' "
    "is without the originals that are kept outside the attended set."
)
_COUNTER_CAPTION = (
    "'most held': tokens a head of the fullest layer between two compactions; the controller moves tokens between layers."
)


@dataclass
class AblationArguments(flags.Output, flags.Text, flags.Model):
    """The flags; settings of the cache are given by `--set`."""

    seed: int = flags.argument("seed of torch's and the caches' random numbers (%(default)s)", 0)
    texts: list[str] = flags.argument(
        f"{NOVEL} (the shipped novel, Pride and Prejudice), text files, or names for the datasets library ({NOVEL})",
        (NOVEL,),
        metavar="TEXT",
    )
    num_eval_tokens: int = flags.count("tokens to run of each text (%(default)s)", 6144)
    variants: list[str] = flags.argument(
        f"of {', '.join(VARIANTS)}: a module alone, or with a plus on top of the modules before it (all)",
        tuple(VARIANTS),
        metavar="VARIANT",
    )
    budgets: list[int] = flags.argument(
        f"tokens a head in total: sinks, and of the rest half recent ({' '.join(map(str, DEFAULT_BUDGETS))})",
        DEFAULT_BUDGETS,
        metavar="N",
    )
    set: list[str] = flags.argument(
        "settings of ADMSConfig for every variant; those of a module hold where it is on",
        (),
        action="extend",
        metavar="NAME=VALUE",
    )
    score_from: int | None = flags.count("first scored token, from 0 (2048, or a third of a shorter text)")
    output_dir: str = flags.directory("results/ablation")
    markdown: flags.Switch = flags.switch("print the tables in Markdown too")


class Ablation(ModelRun):
    """Measure what each of the four ADM++ modules brings, alone and one on top of another, at equal tokens a head.

    Base ADMS, StreamingLLM and the full cache are always run too.
    """

    prog = "ablation.py"
    Arguments = AblationArguments
    sizes = None
    results, picture = "ablation.json", "ablation.png"

    def check(self) -> None:
        super().check()
        given = self.arguments
        self.seed = given.seed
        names, settings = flags.split_names(given.variants), parse_settings(given.set) | {"seed": given.seed}
        self.budgets = {budget: plan_variants(names, budget, settings) for budget in dict.fromkeys(given.budgets)}
        self._check_length(given.num_eval_tokens, "num_eval_tokens", ValueError)
        check_plans([plan for plans in self.budgets.values() for plan in plans])

    def _check_length(self, tokens: int, what: str, error: type[Exception]) -> None:
        score_from = self.arguments.score_from
        if score_from is not None and score_from >= tokens:
            raise error(f"score_from={score_from} leaves nothing to score of {tokens} tokens ({what})")
        for budget, plans in self.budgets.items():
            needed = budget + max(plan.interval for plan in plans if plan.interval is not None)
            if tokens <= needed:
                raise error(
                    f"{what}: {tokens} tokens are too few for budget={budget}; "
                    f"nothing is compacted before token {needed + 1}"
                )

    def measure(self) -> Iterator[None]:
        """Read one text after another, at one budget after another; each section's tables are shown at once."""
        texts: dict[str, Any] = {}
        for name in dict.fromkeys(self.arguments.texts):
            text = self.text(None if name == NOVEL else name)
            self._check_length(text.total_tokens, f"the text {name!r}", EvaluationError)
            # Two files of one name are told apart by their paths.
            short = NOVEL if name == NOVEL else text.name
            texts[name if short in texts else short] = text
        self.sections: list[Section] = []
        for name, text in texts.items():
            for budget, plans in self.budgets.items():
                self.sections.append(self._section(name, text, budget, plans))
                # The next text or budget may take as long again.
                yield

    def _section(self, name: str, text, budget: int, plans: Sequence[Plan]) -> Section:
        given, tokens = self.arguments, text.total_tokens
        told = f"{self.model_name}, {name}: {tokens:,} tokens, {budget:,} tokens a head"
        self.console.print(f"\n{told}", soft_wrap=True)
        results = self.evaluate(text, plans)
        score_from = given.score_from or streaming.default_score_from(tokens)
        settings = {plan.method.name: plan.settings for plan in plans}
        section = Section(name, tokens, budget, score_from, settings, summarize(results))
        heading = f"{name}, {tokens:,} tokens, scored from {score_from:,}; {budget:,} tokens a head"
        report.print_columns(section.rows, COLUMNS, heading, _CAPTION, self.console)
        report.print_columns(section.rows, COUNTER_COLUMNS, "What the modules did", _COUNTER_CAPTION, self.console)
        if given.markdown:
            print(f"\n{heading}\n\n{report.markdown_columns(section.rows, COLUMNS | COUNTER_COLUMNS)}")
        return section

    def document(self) -> dict[str, Any]:
        results, timing = [], []
        for section in self.sections:
            entry = dataclasses.asdict(section) | {"rows": {}}
            seconds = {}
            for row in section.rows:
                values = dataclasses.asdict(row)
                seconds[row.variant] = {key: values.pop(key) for key in ("forward_seconds", "time_ratio")}
                entry["rows"][values.pop("variant")] = values
            results.append(entry)
            timing.append({"text": section.text, "budget": section.budget, "rows": seconds})
        given = vars(self.arguments)
        settings = {name: given[name] for name in sorted(given) if name not in ("output_dir", "markdown")}
        return report.document(settings, self.device, results, timing)

    def plot(self, path: Path) -> None:
        plot(path, self.sections, f"{Path(self.model_name).name}: what each ADM++ module brings at equal tokens a head")

    def table(self) -> None:
        """Nothing is left to print: each section was shown once it was there."""


def _sizes(result: MethodResult) -> tuple[int, int]:
    """Bytes of a cache without the originals, and of the originals."""
    if not result.memory:
        return result.cache_bytes, 0
    originals = result.memory.get("originals", 0)
    return sum(result.memory.values()) - originals, originals
