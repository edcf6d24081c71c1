"""The variants of the ablation: which modules each has on, and settings with which all hold as many tokens a head.

Sketches and replayed tokens come out of the compressed budget, so that no variant holds more than base ADMS does.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from .. import ADMSConfig
from .methods import BASE, FEATURE_SETTINGS, FEATURES, Method, Plan, plan_methods

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


def plan_variants(names: Sequence[str], budget: int, settings: Mapping[str, Any] | None = None) -> list[Plan]:
    """The plans of "full", "streaming", "base" and the variants named, all bounded ones at `budget` tokens a head.

    What is left of `budget` after the sinks is half recent window, half middle. Sketches and replayed tokens come out of
    the middle; their recommended numbers are scaled to it, those in `settings` hold as they are. `settings`: those of
    `ADMSConfig`, for every variant; a module's own hold where it is on. Where all variants are named, as by default, the
    calibration is left out with a warning on a model without RoPE; otherwise it is refused there.
    Raises `ValueError` for an unknown variant, a budget with no room for a variant, or a setting that can't be given.
    """
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
    recalled = config.recall_budget * config.enable_recall
    also = f" and {recalled} recalled" if recalled else ""
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
        compressed = middle - own["sketch_budget"] - own["replay_budget"] - recalled
        if compressed < least:
            raise ValueError(
                f"budget={budget} is too small for variant {name!r}: {sinks} sinks, {max(0, recent)} recent, "
                f"{own['sketch_budget']} sketch and {own['replay_budget']} replay tokens{also} leave {max(0, compressed)} "
                f"for compressed_budget, which must be at least {least}"
            )
        own["compressed_budget"] = compressed
        plans.append(Plan(Method(name, "adms", ""), own, budget, ADMSConfig(**own).compression_interval, defaulted))
    return plan_methods(REFERENCES, plans[0].settings) + plans


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Settings from `name=value` texts, each of the type of its field in `ADMSConfig`; `ValueError` for a wrong one."""
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
