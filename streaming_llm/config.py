"""Every setting of the cache: its meaning, its default and what it may be. See `ADMSConfig`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import reprlib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .registry import available_compressors
from .settings import Settings
from .sizing import RECALL_RANK, Sizes

if TYPE_CHECKING:
    from typing_extensions import Unpack

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])

SKETCH_REDUCTIONS = ("mean", "sum", "first")
ANCHOR_MODES = ("mean", "grid", "hybrid")
POSITION_POLICIES = ("auto", "absolute", "cache")
CONTROLLER_SCOPES = ("layer", "model")
RECALL_STORES = ("device", "host", "disk")
IMPORTANCE_METRICS = ("attention", "value_norm", "key_norm", "mixed")
FEATURES = (
    "enable_dual_fidelity",
    "enable_residual_replay",
    "enable_position_calibration",
    "enable_adaptive_controller",
)
ADM_PLUS_PLUS = {
    "enable_dual_fidelity": True,
    "enable_residual_replay": True,
    "energy_replay_threshold": 0.88,
    "enable_position_calibration": True,
    "enable_adaptive_controller": True,
    "controller_gain": 0.35,
    "controller_group_size": 2,
    "controller_scope": "model",
}
# What a module that is switched on has where its budget is not given.
MODULE_BUDGETS = {"enable_dual_fidelity": ("sketch_budget", 32), "enable_residual_replay": ("replay_budget", 16)}


def _setting(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": help, **limits})


def _by_name(cls: Class) -> Class:
    """Have a config's constructor refuse a misspelt name, and give a module that is switched on without a budget its own."""
    made: Callable[..., None] = cls.__init__

    @functools.wraps(made)
    def __init__(self, *args: Any, **settings: Any) -> None:
        cls.check_names(settings)
        given = dict(zip(cls.setting_names(), args, strict=False)) | settings
        own = [budget for switch, budget in MODULE_BUDGETS.items() if given.get(switch) and budget[0] not in given]
        made(self, *args, **settings, **dict(own))

    cls.__init__ = __init__
    return cls


@_by_name
@dataclass(frozen=True, repr=False)
class ADMSConfig(Sizes):
    """Settings of an `ADMSKVCache`, fixed once made. All counts are tokens per (layer, KV head).

    A wrong value raises `ValueError` naming the setting, the value and what is allowed; a wrong type raises `TypeError`.
    What each setting means is in its field's metadata (`ADMSConfig.describe()` prints the table).

    Between two forward passes no head holds more than `expected_max_tokens`:
    `sinks + compressed_budget + sketch_budget + replay_budget + recent_size + compression_interval`.
    """

    start_size: int = _setting(4, "sinks: the first tokens of each row, kept exactly", low=0)
    recent_size: int = _setting(2000, "recent window: the last tokens, kept exactly", low=1)
    compressed_budget: int = _setting(128, "tokens of the exact and precision tiers together", low=0)
    compressor_type: str = _setting("low_rank", "what makes the precision tier: a registered compressor's name")
    rank: int = _setting(16, "low_rank: dimension of the subspace the leverage is measured in", low=1)
    num_clusters: int = _setting(64, "vq: most clusters a head's precision tier is made of", low=1)
    svd_max_tokens: int = _setting(512, "low_rank: most tokens the subspace is fitted to", low=1)
    anchor_mode: str = _setting(
        "mean", "position of a token made from several: their mean, an even grid, or both", options=ANCHOR_MODES
    )
    enable_pos_shift: bool = _setting(True, "keep positions inside the trained length; False means absolute positions")
    position_policy: str = _setting(
        "auto",
        "positions: true ones while they fit the trained length, then a window's (auto), always true ones (absolute), or "
        "the index in the cache (cache, as StreamingLLM)",
        options=POSITION_POLICIES,
    )
    max_seq_length: int = _setting(32768, "length the dynamic sink count is a share of", low=1)
    enable_dynamic_sink: bool = _setting(False, "as many sinks as 1% of max_seq_length, at least start_size")
    compression_interval: int = _setting(64, "tokens between two compactions", low=1)
    min_middle_size_for_compress: int = _setting(
        64, "a middle smaller than this is not given to the compressor: its most important tokens stay", low=0
    )
    importance_ratio: float = _setting(
        0.5, "share of compressed_budget given to the most important tokens", low=0.0, high=1.0
    )
    min_importance_tokens: int = _setting(4, "fewest tokens chosen by importance (within compressed_budget)", low=0)
    importance_metric: str = _setting("attention", "what makes a token important", options=IMPORTANCE_METRICS)
    attention_window: int = _setting(256, "recent queries whose attention is averaged", low=1)
    attention_blend: float = _setting(
        1.0, "share of attention in the importance, the rest is the value norm's", low=0.0, high=1.0
    )
    score_decay: float = _setting(
        0.9, "what is left of a remembered score after 64 tokens without attention", low=0.0, high=1.0
    )
    mass_decay: float = _setting(
        0.97,
        "what is left after 64 tokens of the weight a token has for others, in streams past the model's trained length",
        low=0.0,
        high=1.0,
    )
    protect_exact: bool = _setting(
        False, "tokens chosen by importance never stand for others: their value and log-mass stay exact too"
    )
    coverage_segments: int = _setting(4, "segments of the middle that coverage_priority spreads tokens over", low=1)
    coverage_priority: float = _setting(
        0.0, "share of the tokens chosen by importance that is spread evenly over the segments", low=0.0, high=1.0
    )
    enable_dual_fidelity: bool = _setting(False, "keep what overflows the precision tier as sketches")
    sketch_budget: int = _setting(0, "tokens of the sketch tier; 32 where its module is on and this is not given", low=0)
    sketch_reduction: str = _setting("mean", "how tokens become a sketch", options=SKETCH_REDUCTIONS)
    sketch_originals: int = _setting(
        256, "originals of sketched tokens a head keeps outside the attended set, for promotion", low=0
    )
    promotion_budget: int = _setting(4, "most sketches a head promotes at a compaction", low=0)
    enable_residual_replay: bool = _setting(False, "re-inject originals while reconstruction is poor")
    replay_budget: int = _setting(0, "tokens of the replay tier; 16 where its module is on and this is not given", low=0)
    energy_replay_threshold: float = _setting(0.9, "spectral energy below which originals are replayed", above=0.0, high=1.0)
    enable_position_calibration: bool = _setting(False, "calibrate the positions of made tokens")
    calibration_window: int = _setting(512, "anchors kept for the calibration", low=1)
    calibration_regularization: float = _setting(0.1, "ridge term of the calibration", low=0.0)
    enable_adaptive_controller: bool = _setting(False, "budgets follow reconstruction energy and attention mass")
    controller_gain: float = _setting(0.3, "weight of the newest measurement in the controller's EMAs", low=0.0, high=1.0)
    controller_energy_floor: float = _setting(0.8, "energy below which a head's budget grows", low=0.0, high=1.0)
    controller_energy_ceiling: float = _setting(0.97, "energy above which a head's budget shrinks", low=0.0, high=1.0)
    controller_group_size: int = _setting(1, "heads that share a budget decision", low=1)
    controller_scope: str = _setting(
        "layer",
        "what keeps its total while budgets move: each layer, or the model (a layer's heads then have one budget)",
        options=CONTROLLER_SCOPES,
    )
    use_adaptive_budget: bool = _setting(False, "budgets in proportion to the variance of a head's middle")
    adaptive_budget_floor: float = _setting(0.5, "smallest multiple of compressed_budget a head gets", low=0.0, high=1.0)
    adaptive_budget_cap: float = _setting(2.5, "largest multiple of compressed_budget a head gets", low=1.0)
    adaptive_variance_smoothing: float = _setting(0.1, "weight of the newest variance in its EMA", above=0.0, high=1.0)
    enable_recall: bool = _setting(False, "archive what leaves the recent window, and attend to it again where a query asks")
    recall_budget: int = _setting(64, "archived tokens that a query may attend to, beside what is held", low=0)
    recall_chunk_budget: int = _setting(
        256, "archived tokens that the queries of a longer pass may attend to, one set for all of them", low=0
    )
    recall_tokens: int = _setting(32768, "tokens of the archive; past it the oldest leave", low=1)
    recall_rank: int = _setting(
        RECALL_RANK,
        "dimensions of the codes that archived tokens are found by; of a head with fewer than 32 all, where 32 is asked",
        low=1,
    )
    recall_bits: int = _setting(
        16, "bits a channel of archived keys and values: 16 for as they are, 8 or 4", options=(16, 8, 4)
    )
    recall_store: str = _setting(
        "device",
        "where archived tokens are: on the model's device, in the host's memory, or in a file",
        options=RECALL_STORES,
    )
    compaction_bytes: int = _setting(
        256 * 2**20, "bytes a compaction works with, beside what it gives: layers are compacted in parts that fit", low=1
    )
    seed: int = _setting(0, "seed of whatever is drawn at random (vq's first centres, hybrid anchors)", low=0)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, self._checked(item, getattr(self, item.name)))
        self._check_combinations()

    @staticmethod
    def _checked(item: dataclasses.Field, value: Any) -> Any:
        kind, name, limits = type(item.default), item.name, item.metadata
        if isinstance(value, np.generic):
            value = value.item()
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError(f"{name}={value!r} must be of type {kind.__name__}, not {type(value).__name__}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")
        options = limits.get("options")
        if options is not None and value not in options:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, options))}")
        low, above, high = limits.get("low"), limits.get("above"), limits.get("high")
        too_low = (low is not None and value < low) or (above is not None and value <= above)
        if too_low or (high is not None and value > high):
            lower = f"{name} >= {low}" if low is not None else f"{name} > {above}"
            upper = f" and {name} <= {high}" if high is not None else ""
            raise ValueError(f"{name}={value!r} is out of range: {lower}{upper}")
        return value

    def _check_combinations(self) -> None:
        if self.compressor_type not in available_compressors():
            known = ", ".join(available_compressors())
            raise ValueError(
                f"compressor_type={self.compressor_type!r} is not registered: use one of {known}, "
                "or register_compressor() your own first"
            )
        if self.sketch_budget and not self.enable_dual_fidelity:
            raise ValueError(
                f"sketch_budget={self.sketch_budget} needs enable_dual_fidelity=True; without it sketch_budget must be 0"
            )
        if self.replay_budget and not self.enable_residual_replay:
            raise ValueError(
                f"replay_budget={self.replay_budget} needs enable_residual_replay=True; without it replay_budget must be 0"
            )
        if self.position_policy == "cache" and not self.enable_pos_shift:
            raise ValueError(
                "position_policy='cache' moves positions and enable_pos_shift=False forbids it: choose one of them"
            )
        if self.controller_energy_floor >= self.controller_energy_ceiling:
            raise ValueError(
                f"controller_energy_floor={self.controller_energy_floor} must be below "
                f"controller_energy_ceiling={self.controller_energy_ceiling}"
            )
        if self.enable_adaptive_controller and self.use_adaptive_budget:
            raise ValueError(
                "use_adaptive_budget=True and enable_adaptive_controller=True both set budgets: choose one of them"
            )
        if self.min_importance_tokens > self.compressed_budget > 0:
            raise ValueError(
                f"min_importance_tokens={self.min_importance_tokens} must not exceed "
                f"compressed_budget={self.compressed_budget}"
            )

    @property
    def positions(self) -> str:
        """The position policy in force."""
        return self.position_policy if self.enable_pos_shift else "absolute"

    # -- to and from ---------------------------------------------------------------------------------------------------

    @classmethod
    def adm_plus_plus(cls, **overrides: Unpack[Settings]) -> ADMSConfig:
        """The four ADM++ features on, with their own defaults; `overrides` are settings by name."""
        cls.check_names(overrides)
        return cls(**{**ADM_PLUS_PLUS, **overrides})

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """Names of all settings, in the order of the reference table."""
        return tuple(item.name for item in dataclasses.fields(cls))

    @classmethod
    def describe(cls) -> str:
        """The settings as a Markdown table: name, default, meaning."""
        rows = [f"| `{f.name}` | {f.default} | {f.metadata['help']} |" for f in dataclasses.fields(cls)]
        return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])

    def changed(self) -> dict[str, Any]:
        """The settings that make it out of the defaults: those that differ, and the budgets of modules that are on."""
        budgets = [budget for switch, (budget, _) in MODULE_BUDGETS.items() if getattr(self, switch)]
        values = {item.name: (getattr(self, item.name), item.default) for item in dataclasses.fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default or name in budgets}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.changed().items())})"

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ADMSConfig:
        """The config with these settings; an unknown name raises `ValueError` and names it."""
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings={settings!r} must be a dict of settings by name, not {type(settings).__name__}")
        return cls(**settings)

    @classmethod
    def check_names(cls, settings: dict[str, Any]) -> None:
        """Raise `ValueError` naming every key of `settings` that is not a setting, with the closest one that is."""
        names = cls.setting_names()
        unknown = [name for name in settings if name not in names]
        if unknown:
            known = [*names, "adm_plus_plus"]
            found = [near for name in unknown for near in difflib.get_close_matches(str(name), known, n=1)]
            found = ["ADMSConfig.adm_plus_plus(...)" if near == "adm_plus_plus" else near for near in found]
            hint = f" (did you mean {', '.join(dict.fromkeys(found))}?)" if found else ""
            raise ValueError(f"unknown setting {', '.join(map(repr, unknown))}{hint}; the settings are {', '.join(names)}")

    @classmethod
    def check(cls, config: Any) -> ADMSConfig:
        """The config given, the defaults for None; `TypeError` for anything else, with the way to make one of it."""
        if config is None:
            return cls()
        if not isinstance(config, cls):
            ways = ((Mapping, "from_dict(config), or give the settings by name"), ((str, os.PathLike), "from_json(config)"))
            way = next((f": use ADMSConfig.{way}" for kinds, way in ways if isinstance(config, kinds)), "")
            raise TypeError(f"config={reprlib.repr(config)} must be an ADMSConfig, not {type(config).__name__}{way}")
        return config

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """The settings as JSON text, also written to `path` when given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike) -> ADMSConfig:
        """The config in JSON text (a string starting with a brace) or in a file."""
        text = os.fspath(source)
        if not text.lstrip().startswith("{"):
            with open(source, encoding="utf-8") as file:
                text = file.read()
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError(f"source={os.fspath(source)!r} must hold a JSON object of settings")
        return cls.from_dict(settings)


def _refuse_assignment(config: ADMSConfig, name: str, *value: Any) -> None:
    """Stands in for what a frozen dataclass has, whose message names no way out."""
    ADMSConfig.check_names({name: value})
    if not value:
        raise dataclasses.FrozenInstanceError(f"{name} can't be deleted: settings are fixed once a config is made")
    given = f"{name}={value[0]!r}"
    raise dataclasses.FrozenInstanceError(
        f"{given} can't be set: settings are fixed once a config is made, and buffers have their size. Make another config, "
        f"dataclasses.replace(config, {given}), and a new cache: enable_adms_llm(model, config)"
    )


ADMSConfig.__setattr__ = ADMSConfig.__delattr__ = _refuse_assignment


@functools.cache
def _kinds() -> dict[str, Any]:
    """The type of each setting."""
    return typing.get_type_hints(ADMSConfig)


def tell_settings(
    without: Sequence[str] = (),
    defaults: Mapping[str, Any] = {},  # noqa: B006  only read
) -> Callable[[Function], Function]:
    """Have `help` and completion of a function that takes settings by name list each with type, default and meaning.

    Args:
        without: settings it does not take; defaults: those it has other defaults for.
    """

    def tell(function: Function) -> Function:
        kinds, own = _kinds(), inspect.signature(function)
        lines, parameters = [], [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        for item in dataclasses.fields(ADMSConfig):
            if item.name in without or item.name in own.parameters:
                continue
            kind, default = kinds[item.name], defaults.get(item.name, item.default)
            lines.append(f"    {item.name}: {kind.__name__} = {default!r}. {item.metadata['help']}")
            one = inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            parameters.append(one)
        function.__doc__ = "\n\n".join([inspect.getdoc(function) or "", "Settings:\n" + "\n".join(lines)])
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return tell


tell_settings(defaults=ADM_PLUS_PLUS | dict(MODULE_BUDGETS.values()))(ADMSConfig.adm_plus_plus.__func__)
# What is not given of the sizes is what fits.
tell_settings(defaults={"recent_size": ..., "compressed_budget": ...})(ADMSConfig.from_memory.__func__)
