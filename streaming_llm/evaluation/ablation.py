"""The ablation of the four ADM++ modules: each alone, and one on top of another, at equal tokens a head.

Sketches and replayed tokens come out of the compressed budget, so that no variant holds more than base ADMS does.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..stats import format_bytes
from .cli import (
    LEAST_OF_TEXT,
    Parser,
    ProgressReport,
    add_reading_flags,
    check_least,
    check_plans,
    exit_code,
    prepare,
    read_text,
    split_names,
)
from .errors import EvaluationError
from .methods import BASE, FEATURE_SETTINGS, FEATURES, Method, Plan, cache_factory, plan_methods
from .streaming import MethodResult

NOVEL = "novel"
DEFAULT_BUDGETS = (260, 516)
# What sketch_budget and replay_budget of `ADMSConfig.adm_plus_plus()` are meant for; they scale with the middle.
MIDDLE_OF_DEFAULTS = 256
MODULES = dict(zip(("dual_fidelity", "replay", "calibration", "controller"), FEATURES, strict=True))
BASE_NAME = "base"
REFERENCES = ("full", "streaming")


def _variants() -> dict[str, tuple[str, ...]]:
    names = list(MODULES)
    alone = {name: (name,) for name in names}
    # The first level is dual fidelity alone, which is there already.
    levels = {f"+{name}": tuple(names[: count + 1]) for count, name in enumerate(names) if count}
    return {BASE_NAME: (), **alone, **levels}


# The modules each variant has on: none, each alone, then the levels up to all four (ADM++).
VARIANTS = _variants()
# The progressive levels, counted by the modules on.
LEVELS = {name: count for count, name in enumerate((BASE_NAME, "dual_fidelity", "+replay", "+calibration", "+controller"))}
# Settings that the comparison itself sets, and the flag that does.
_TAKEN = dict.fromkeys(FEATURES, "--variants") | {
    "recent_size": "--budgets",
    "compressed_budget": "--budgets",
}
# A budget that min_importance_tokens can't exceed, to check settings before the real one is known.
_ENOUGH = 1 << 40
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
    "level": lambda row: "-" if row.level is None else str(row.level),
    "perplexity": lambda row: f"{row.perplexity:.3f}",
    "KL to full": lambda row: f"{row.kl:.5f}",
    "KL change": lambda row: "-" if row.kl_change is None else f"{row.kl_change:+.1%}",
    "time": lambda row: f"{row.time_ratio:.2f}x",
    "cache": lambda row: f"{row.bytes_ratio:.2f}x",
    "originals": lambda row: _bytes(row.originals_bytes),
}
COUNTER_COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.variant,
    "most held": lambda row: f"{row.held_tokens:,}",
    **{name: lambda row, name=name: "-" if row.counters is None else f"{row.counters[name]:,}" for name in COUNTERS},
}


def plan_variants(names: Sequence[str], budget: int, settings: Mapping[str, Any] | None = None) -> list[Plan]:
    """The plans of "full", "streaming", "base" and the variants named, all bounded ones at `budget` tokens a head.

    What is left of `budget` after the sinks is half recent window, half middle. Sketches and replayed tokens come out of
    the middle; their recommended numbers are scaled to it, those in `settings` hold as they are. `settings`: those of
    `ADMSConfig`, for every variant; a module's own hold where it is on. Where all variants are named, as by default, the
    calibration is left out with a warning on a model without RoPE; otherwise it is refused there.
    Raises `ValueError` for an unknown variant, a budget with no room for a variant, or a setting that can't be given.
    """
    from streaming_llm import ADMSConfig

    given = dict(settings or {})
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"variant {name!r} is not known; choose from {', '.join(VARIANTS)}")
    ADMSConfig.check_names(given)
    for name in given:
        if name in _TAKEN:
            raise ValueError(f"{name} can't be given as a setting: {_TAKEN[name]} sets it")
    owned = {name for feature in FEATURES for name in FEATURE_SETTINGS[feature]}
    shared = {name: value for name, value in given.items() if name not in owned}
    config = ADMSConfig(**shared, compressed_budget=_ENOUGH)
    sinks, least = config.dynamic_start_size, max(1, config.min_importance_tokens)
    # Checks a module's settings even where no variant has it on.
    recommended = ADMSConfig.adm_plus_plus(**{name: value for name, value in given.items() if name in owned})
    middle = (budget - sinks) // 2
    recent = budget - sinks - middle
    defaulted = frozenset(FEATURES if set(names) >= set(VARIANTS) else ())
    plans = []
    for name in VARIANTS:
        if name not in names and name != BASE_NAME:
            continue
        own = {**BASE, **shared, "recent_size": recent}
        for module in VARIANTS[name]:
            feature = MODULES[module]
            own[feature] = True
            for setting in FEATURE_SETTINGS[feature]:
                own[setting] = getattr(recommended, setting)
                if setting in ("sketch_budget", "replay_budget") and setting not in given:
                    own[setting] = max(1, round(own[setting] * max(0, middle) / MIDDLE_OF_DEFAULTS))
        compressed = middle - own["sketch_budget"] - own["replay_budget"]
        if compressed < least:
            raise ValueError(
                f"budget={budget} is too small for variant {name!r}: {sinks} sinks, {max(0, recent)} recent, "
                f"{own['sketch_budget']} sketch and {own['replay_budget']} replay tokens leave {max(0, compressed)} for "
                f"compressed_budget, which must be at least {least}"
            )
        own["compressed_budget"] = compressed
        plans.append(Plan(Method(name, "adms", ""), own, budget, ADMSConfig(**own).compression_interval, defaulted))
    return plan_methods(REFERENCES, plans[0].settings) + plans


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


def markdown(section: Section) -> str:
    """A section's two tables as one, in Markdown."""
    from .report import markdown_columns

    return markdown_columns(section.rows, COLUMNS | COUNTER_COLUMNS)


def document(sections: Sequence[Section], settings: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """What `ablation.json` holds; all that differs between two runs on one machine is under `timing`."""
    from .report import environment

    results, timing = [], []
    for section in sections:
        entry = dataclasses.asdict(section) | {"rows": {}}
        seconds = {}
        for row in section.rows:
            values = dataclasses.asdict(row)
            seconds[row.variant] = {key: values.pop(key) for key in ("forward_seconds", "time_ratio")}
            entry["rows"][values.pop("variant")] = values
        results.append(entry)
        timing.append({"text": section.text, "budget": section.budget, "rows": seconds})
    return {"settings": dict(settings), "environment": environment(device), "results": results, "timing": timing}


def plot(path: Path, sections: Sequence[Section], title: str) -> None:
    """Draw the variants' KL to the full cache as bars, one panel a text (down) and budget (across); needs `matplotlib`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .report import write_atomically

    texts = list(dict.fromkeys(section.text for section in sections))
    budgets = list(dict.fromkeys(section.budget for section in sections))
    bars = max(sum(row.variant not in REFERENCES for row in section.rows) for section in sections)
    # No pyplot: a window's toolkit is not needed to write a file, nor a global figure.
    size = (1.2 + 4.6 * len(budgets), 0.9 + len(texts) * (1.3 + 0.34 * bars))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(texts), len(budgets), squeeze=False)
    looks: dict[str, Any] = {}
    for section in sections:
        column = budgets.index(section.budget)
        looks |= _panel(panels[texts.index(section.text)][column], section, named=column == 0)
    figure.suptitle(textwrap.fill(title, 52 * len(budgets)), x=0.01, ha="left", fontsize=11)
    columns = 1 if len(budgets) == 1 else 4
    figure.legend(looks.values(), looks.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


# Light enough for black numbers, told apart with any colour vision.
_COLOURS = {
    "base ADMS, 0%": "#E69F00",
    "one module alone": "#56B4E9",
    "dual_fidelity and more, added one by one": "#009E73",
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of the ablation's command line."""
    parser = Parser(
        prog="ablation.py",
        description="Measure what each of the four ADM++ modules brings, alone and one on top of another, at equal "
        "tokens a head. Base ADMS, StreamingLLM and the full cache are always run too.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", metavar="NAME", help="hub name, local folder or .gguf file (SmolLM2-135M-Instruct)")
    add("--dtype", default="float32", help="float32, bfloat16, float16 or auto (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    add("--seed", type=int, default=0, help="seed of torch's and the caches' random numbers (%(default)s)")
    group = parser.add_argument_group("text")
    add = group.add_argument
    add(
        "--texts",
        nargs="+",
        default=[NOVEL],
        metavar="TEXT",
        help=f"{NOVEL} (the shipped novel, Pride and Prejudice), text files, or names for the datasets library ({NOVEL})",
    )
    add_reading_flags(group)
    add("--num_eval_tokens", type=int, default=6144, metavar="N", help="tokens to run of each text (%(default)s)")
    add = parser.add_argument_group("comparison").add_argument
    add(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        metavar="VARIANT",
        help=f"of {', '.join(VARIANTS)}: a module alone, or with a plus on top of the modules before it (all)",
    )
    add(
        "--budgets",
        nargs="+",
        type=int,
        default=list(DEFAULT_BUDGETS),
        metavar="N",
        help=f"tokens a head in total: sinks, and of the rest half recent ({' '.join(map(str, DEFAULT_BUDGETS))})",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of ADMSConfig for every variant; those of a module hold where it is on",
    )
    add("--chunk_size", type=int, default=64, metavar="N", help="tokens a forward pass; 1: one by one (%(default)s)")
    add("--score_from", type=int, metavar="N", help="first scored token, from 0 (2048, or a third of a shorter text)")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="results/ablation", metavar="DIR", help="where the files go (%(default)s)")
    add("--log_every", type=int, default=1024, metavar="N", help="print a line every N tokens; 0: never (%(default)s)")
    add("--markdown", action="store_true", help="print the tables in Markdown too")
    return parser


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Settings from `name=value` texts, each of the type of its field in `ADMSConfig`; `ValueError` for a wrong one."""
    from streaming_llm import ADMSConfig

    kinds = typing.get_type_hints(ADMSConfig)
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} must have the form name=value")
        ADMSConfig.check_names({name: text})
        if name == "seed":
            raise ValueError("--set can't give seed: --seed sets it")
        kind = kinds[name]
        try:
            settings[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            allowed = "true or false" if kind is bool else f"of type {kind.__name__}"
            raise ValueError(f"--set {name}={text!r} must be {allowed}") from None
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ablation; its exit code, as of `cli.exit_code`."""
    parser = build_parser()
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return exit_code(parser.prog, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    # All that can be wrong with the arguments is found before the weights are loaded.
    plans = _checked_plans(arguments)
    setup = prepare(arguments)
    console, output, model, model_name = setup.console, setup.output, setup.model, setup.model_name

    from . import report, streaming

    loaded = []
    for name in dict.fromkeys(arguments.texts):
        text = read_text(arguments, setup.tokenizer, None if name == NOVEL else name)
        _check_length(text.total_tokens, f"the text {name!r}", plans, arguments.score_from, EvaluationError)
        # Two files of one name are told apart by their paths.
        short = NOVEL if name == NOVEL else text.name
        loaded.append((name if short in dict(loaded) else short, text))

    sections = []
    for name, text in loaded:
        for budget, planned in plans.items():
            console.print(f"\n{model_name}, {name}: {text.total_tokens:,} tokens, {budget:,} tokens a head", soft_wrap=True)
            with ProgressReport(console, text.total_tokens, arguments.log_every) as on_chunk:
                results = streaming.evaluate_streams(
                    model,
                    text.streams,
                    {plan.method.name: cache_factory(model, plan) for plan in planned},
                    chunk_size=arguments.chunk_size,
                    score_from=arguments.score_from,
                    on_chunk=on_chunk,
                )
            score_from = arguments.score_from or streaming.default_score_from(text.total_tokens)
            settings = {plan.method.name: plan.settings for plan in planned}
            section = Section(name, text.total_tokens, budget, score_from, settings, summarize(results))
            # Shown at once: the next text or budget may take as long again.
            _print_tables(section, console)
            if arguments.markdown:
                print(f"\n{_heading(section)}\n\n{markdown(section)}")
            sections.append(section)

    given = {name: value for name, value in sorted(vars(arguments).items()) if name not in ("output_dir", "markdown")}
    title = f"{Path(model_name).name}: what each ADM++ module brings at equal tokens a head"
    plot(output / "ablation.png", sections, title)
    report.write_json(output / "ablation.json", document(sections, given, setup.device))
    console.print(f"wrote {output / 'ablation.json'} and {output / 'ablation.png'}", soft_wrap=True)
    return 0


def _checked_plans(arguments: argparse.Namespace) -> dict[int, list[Plan]]:
    check_least(arguments, {"chunk_size": 1, "score_from": 1, "log_every": 0, **LEAST_OF_TEXT, "seed": 0})
    names = split_names(arguments.variants)
    settings = parse_settings(arguments.set) | {"seed": arguments.seed}
    plans = {budget: plan_variants(names, budget, settings) for budget in dict.fromkeys(arguments.budgets)}
    _check_length(arguments.num_eval_tokens, "num_eval_tokens", plans, arguments.score_from, ValueError)
    check_plans([plan for planned in plans.values() for plan in planned])
    return plans


def _check_length(tokens: int, what: str, plans: Mapping[int, list[Plan]], score_from: int | None, error: type) -> None:
    if score_from is not None and score_from >= tokens:
        raise error(f"score_from={score_from} leaves nothing to score of {tokens} tokens ({what})")
    for budget, planned in plans.items():
        needed = budget + max(plan.interval for plan in planned if plan.interval is not None)
        if tokens <= needed:
            raise error(
                f"{what}: {tokens} tokens are too few for budget={budget}; nothing is compacted before token {needed + 1}"
            )


def _heading(section: Section) -> str:
    return f"{section.text}, {section.tokens:,} tokens, scored from {section.score_from:,}; {section.budget:,} tokens a head"


_CAPTION = (
    "'level': modules added one by one. KL in nats a token; its change, time and cache are relative to base ADMS. 'cache' "
    "is without the originals that are kept outside the attended set."
)
_COUNTER_CAPTION = (
    "'most held': tokens a head of the fullest layer between two compactions; the controller moves tokens between layers."
)


def _print_tables(section: Section, console) -> None:
    from .report import print_columns

    print_columns(section.rows, COLUMNS, _heading(section), _CAPTION, console)
    print_columns(section.rows, COUNTER_COLUMNS, "What the modules did", _COUNTER_CAPTION, console)


def _sizes(result: MethodResult) -> tuple[int, int]:
    """Bytes of a cache without the originals, and of the originals."""
    if not result.memory:
        return result.cache_bytes, 0
    originals = result.memory.get("originals", 0)
    return sum(result.memory.values()) - originals, originals


def _bytes(size: int) -> str:
    return format_bytes(size) if size else "-"
