"""The methods a comparison can name, each with settings that give all of them the same number of tokens a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .. import ADMSConfig, ADMSKVCache, enable_adms_llm
from ..config import FEATURES

# The comparison of the documentation: 516 tokens a head, 4 of them sinks.
DEFAULT_RECENT = 256
DEFAULT_MIDDLE = 256
RECALL = "adms_recall"
# Bits a channel of the archive whose bytes every method gets, where nothing is said of them.
EQUAL_BYTES_BITS = 4
# What a feature sets beside its switch; the values are those of `ADMSConfig.adm_plus_plus()`.
FEATURE_SETTINGS = {
    "enable_dual_fidelity": ("sketch_budget",),
    "enable_residual_replay": ("replay_budget", "energy_replay_threshold"),
    "enable_position_calibration": (),
    "enable_adaptive_controller": ("controller_gain", "controller_group_size", "controller_scope"),
}
# Settings that turn all features off: the presets of single compressors are base ADMS, comparable between runs.
BASE = dict.fromkeys((*FEATURES, "enable_recall"), False) | {"sketch_budget": 0, "replay_budget": 0}


@dataclass(frozen=True)
class Method:
    """One entry of `--methods`: `kind` is "full", "baseline" or "adms"; `settings` override the run's."""

    name: str
    kind: str
    help: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


METHODS = {
    method.name: method
    for method in (
        Method("full", "full", "transformers' own cache: every token, no bound; what the others are measured against"),
        Method("streaming", "baseline", "StreamingLLM: sinks and a recent window, nothing between"),
        Method("h2o", "baseline", "H2O: the middle tokens with the most attention ever received"),
        Method("snapkv", "baseline", "SnapKV: the middle tokens the last queries attend to"),
        Method("tova", "baseline", "TOVA: the tokens the last query attends to"),
        Method("adms", "adms", "ADMS with the settings given; where they say nothing, ADM++: all four features on"),
        Method(
            RECALL,
            "adms",
            "the same with recall: what left the window is archived and attended to again where a query asks",
            {"enable_recall": True},
        ),
        Method("adms_low_rank", "adms", "base ADMS, low-rank compressor", BASE | {"compressor_type": "low_rank"}),
        Method("adms_vq", "adms", "base ADMS, vector-quantising compressor", BASE | {"compressor_type": "vq"}),
        Method(
            "adms_attention_matching",
            "adms",
            "base ADMS, attention-matching compressor",
            BASE | {"compressor_type": "attention_matching"},
        ),
    )
}


@dataclass(frozen=True)
class Plan:
    """A method with the settings it runs with; empty for the full cache. `defaulted`: features nobody asked for by name.

    `total_tokens`: what a query attends to after a compaction, `recall_budget` included.
    """

    method: Method
    settings: dict[str, Any]
    total_tokens: int | None
    interval: int | None
    defaulted: frozenset[str] = frozenset()

    @property
    def config(self) -> ADMSConfig:
        """The config of the bounded cache that the settings give."""
        if self.method.kind == "adms":
            return ADMSConfig(**self.settings)
        from streaming_llm.baselines import BASELINES

        own = {"importance_ratio": 0.0, "min_importance_tokens": 0, "compressed_budget": 0} | self.settings
        policy = {} if BASELINES[self.method.name] is None else {"compressor_type": self.method.name}
        return ADMSConfig(**own | policy)


class Settings(dict):
    """Settings by name; `defaulted` says which features are on only because nothing was said of them."""

    defaulted: frozenset[str] = frozenset()


def resolve_settings(settings: Mapping[str, Any], recent: int = DEFAULT_RECENT, middle: int = DEFAULT_MIDDLE) -> Settings:
    """The settings of a comparison: what was given, over the examples' defaults (see the constants above).

    `recent`, `middle`: the recent window and the middle tokens, all tiers together, where nothing is said of them.

    `use_adaptive_budget=True` takes the place of the adaptive controller unless that was given too: both set budgets.
    """
    resolved = Settings(dict.fromkeys(FEATURES, True) | dict(settings))
    resolved.defaulted = frozenset(FEATURES) - set(settings)
    if settings.get("use_adaptive_budget") and "enable_adaptive_controller" in resolved.defaulted:
        resolved["enable_adaptive_controller"] = False
    features = [feature for feature in FEATURES if resolved.get(feature)]
    if features:
        recommended = ADMSConfig.adm_plus_plus()
        for feature in features:
            for name in FEATURE_SETTINGS[feature]:
                resolved.setdefault(name, getattr(recommended, name))
    resolved.setdefault("recent_size", recent)
    if "compressed_budget" not in resolved:
        others = resolved.get("sketch_budget", 0) + resolved.get("replay_budget", 0)
        named = "sketch_budget and replay_budget"
        if resolved.get("enable_recall"):
            others += resolved.setdefault("recall_budget", ADMSConfig.recall_budget)
            named = "sketch_budget, replay_budget and recall_budget"
        if others >= middle:
            raise ValueError(
                f"{named} together are {others} tokens and leave nothing of the "
                f"{middle} middle tokens; give compressed_budget as well"
            )
        resolved["compressed_budget"] = middle - others
    return resolved


def plan_methods(names: Sequence[str], settings: Mapping[str, Any]) -> list[Plan]:
    """Check the methods' names and give each the settings with which it attends to as many tokens a head as "adms" does.

    `settings`: those of "adms", from `resolve_settings`. StreamingLLM gets the middle tokens' share as a longer recent
    window; every other method the same sinks and recent window, and the rest as its budget.
    Raises `ValueError` for an unknown method or a setting that `ADMSConfig` refuses.
    """
    if not names:
        raise ValueError(f"methods is empty; choose from {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"method {name!r} is not known; choose from {', '.join(METHODS)}")
    config = ADMSConfig(**settings)
    total = _total_tokens(config)
    defaulted = getattr(settings, "defaulted", frozenset())
    plans = []
    for name in dict.fromkeys(names):
        method = METHODS[name]
        if method.kind == "full":
            plans.append(Plan(method, {}, None, None))
            continue
        if method.kind == "baseline":
            own = _baseline_settings(name, config, settings, total)
            held = own["start_size"] + own["recent_size"] + own.get("compressed_budget", 0)
            plans.append(Plan(method, own, held, config.compression_interval))
            continue
        own = {**settings, **method.settings}
        if own.get("enable_recall") and not config.enable_recall:
            own["recall_budget"] = _recall_budget(config, settings)
        spare = total - _total_tokens(ADMSConfig(**own))
        own["compressed_budget"] = config.compressed_budget + spare
        plans.append(Plan(method, own, _total_tokens(ADMSConfig(**own)), config.compression_interval, defaulted))
    return plans


def plan_equal_bytes(names: Sequence[str], settings: Mapping[str, Any], model_config, dtype, tokens: int) -> list[Plan]:
    """The plans of `plan_methods`, each bounded method with the largest sizes that take no more bytes than recall does.

    The bytes are those of "adms_recall", its archive and index included, with `recall_bits` 4 where nothing is said of
    them and an archive for all that leaves the window of a stream of `tokens`. StreamingLLM spends them on its recent
    window, every other method half on that and half on its compressed budget.

    Args:
        names, settings: as for `plan_methods`; `recent_size` and `compressed_budget` are those of "adms_recall".
        model_config: the model's config; dtype: what keys and values are held in.
        tokens: of the longest stream.

    Raises:
        ValueError: as `plan_methods`, and for a method that does not fit into as few bytes.
    """
    (recall,) = plan_methods([RECALL], settings)
    sizes = ADMSConfig(**recall.settings)
    leaving = max(1, tokens - sizes.dynamic_start_size - sizes.recent_size)
    own = {"recall_bits": EQUAL_BYTES_BITS} | recall.settings
    own["recall_tokens"] = min(sizes.recall_tokens, leaving)
    size = ADMSConfig(**own).memory_bytes(model_config, dtype, moved=True)
    plans = []
    for plan in plan_methods(names, settings):
        if plan.method.kind == "full":
            plans.append(plan)
            continue
        if plan.config.enable_recall:
            plans.append(dataclasses.replace(plan, settings=own))
            continue
        sized = {"recent_size"} if plan.method.name == "streaming" else {"recent_size", "compressed_budget"}
        given = {name: value for name, value in plan.config.to_dict().items() if name not in sized}
        largest = ADMSConfig.from_memory(model_config, size, dtype, compacting=False, **given)
        settled = plan.settings | {name: getattr(largest, name) for name in sized}
        plans.append(dataclasses.replace(plan, settings=settled, total_tokens=_total_tokens(largest)))
    return plans


def check_plans(plans: Sequence[Plan]) -> None:
    """Raise `ValueError` for settings that a cache refuses, before anything is loaded."""
    for plan in plans:
        if plan.method.kind == "adms":
            ADMSKVCache(ADMSConfig(**plan.settings))


def cache_factory(model: PreTrainedModel, plan: Plan) -> Callable[[], Any]:
    """A function giving a new cache of the planned method for `model`.

    Position calibration that is on by default only is left out, with a warning, where the model has no RoPE; where it was
    asked for, the function raises `ValueError`.
    """
    if plan.method.kind == "full":
        from transformers import DynamicCache

        return lambda: DynamicCache(config=model.config)
    if plan.method.kind == "baseline":
        from streaming_llm.baselines import enable_baseline

        return lambda: enable_baseline(model, plan.method.name, **plan.settings)
    if "enable_position_calibration" not in plan.defaulted:
        return lambda: enable_adms_llm(model, **plan.settings)
    config = ADMSConfig(**plan.settings)

    def make():
        nonlocal config
        cache = enable_adms_llm(model, config)
        # What the model can't have is told once, not again for every stream.
        config = cache.config
        return cache

    return make


def _total_tokens(config) -> int:
    """Tokens a query attends to after a compaction: all tiers of a head together, and what it may recall."""
    return config.expected_max_tokens - config.compression_interval + config.recall_budget * config.enable_recall


def _recall_budget(config, settings: Mapping[str, Any]) -> int:
    """What recall takes out of the compressed budget: what was asked for, else the default, of a small budget half."""
    given, budget = settings.get("recall_budget"), config.compressed_budget
    if given is None:
        return max(0, min(config.recall_budget, budget // 2, budget - config.min_importance_tokens))
    if given > budget:
        raise ValueError(f"recall_budget={given} must not exceed compressed_budget={budget}, which it is taken from")
    return given


def _baseline_settings(name: str, config, settings: Mapping[str, Any], total: int) -> dict[str, Any]:
    # A baseline shares what has a meaning for it: positions, when the layer compacts and SnapKV's window.
    shared = ("compression_interval", "enable_pos_shift", "position_policy", "attention_window")
    own = {key: settings[key] for key in shared if key in settings}
    sinks = config.dynamic_start_size
    own["start_size"] = sinks
    if name == "streaming":
        own["recent_size"] = total - sinks
    else:
        own["recent_size"] = config.recent_size
        own["compressed_budget"] = total - sinks - config.recent_size
    return own
