"""The container: one layer object a layer, the documented views, counters and sizes. No tensor maths."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from .by_hand import ByHandMixin, HandState
from .compaction.calibration import CalibrationMixin
from .compaction.controller import ControllerMixin
from .compaction.dual_fidelity import DualFidelityMixin
from .compaction.replay import ReplayMixin
from .config import ADMSConfig
from .data.padding import Stretches
from .data.rope import Rope
from .forward import ForwardMixin
from .layer import ADMSLayer
from .recalled import RecalledMixin
from .rows import RowsMixin
from .seen import SeenMixin, SeenTokens
from .shown import ShownMixin
from .sizing import layer_windows
from .stats import StatsMixin
from .stream.positions import PositionWindow
from .stream.ranks import Ranks
from .stream.stream import Stream

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def _without_log_mass(config: ADMSConfig) -> ADMSConfig:
    """The settings of a cache whose model was not enabled: nothing tells attention which slots are unused, so budgets can't
    differ between heads, nor may slots stay empty: what sketches and replay would use is the precision tier's."""
    modules = ("use_adaptive_budget", "enable_adaptive_controller", "enable_dual_fidelity", "enable_residual_replay")
    if not any(getattr(config, name) for name in (*modules, "enable_recall")):
        return config
    off = dict.fromkeys((*modules, "enable_recall"), False)
    return dataclasses.replace(config, **off, sketch_budget=0, replay_budget=0, compressed_budget=config.middle_allocation)


class ADMSKVCache(
    DualFidelityMixin,
    ReplayMixin,
    CalibrationMixin,
    ControllerMixin,
    ByHandMixin,
    StatsMixin,
    ShownMixin,
    SeenMixin,
    RecalledMixin,
    ForwardMixin,
    RowsMixin,
    Cache,
):
    """A `transformers.Cache` that keeps a bounded, weighted set of tokens per (layer, KV head).

    Made by `enable_adms_llm(model, ...)`, which also lets the model's attention see the tokens' log-mass; made by hand it
    works on any model too, but without queries and log-mass: importance then rests on keys and values alone.

    Args:
        config: the settings; `ADMSConfig()` when None.
        model_config: the model's config, for its number of layers and which of them have a sliding window (those keep
            transformers' own layer). None: layers appear as they are used.
        wired: True when the model's attention shows its queries (set by `enable_adms_llm`).
        layers_at_once: layers whose buffers are one and which are compacted in one call; they must be on one device.
        ropes: how each layer's keys turn with position; None where that is not known.
        window: the positions the model is given; None for those it would have.
        ranks: the processes a tensor-parallel model's heads are spread over; None where each has all heads.

    Attributes:
        profile: set to True to have `compaction_seconds` count the time compaction takes (waits for the device).
    """

    if TYPE_CHECKING:
        # Given by session.py, which stands above: it wires the model that a file is loaded for.
        def save(self, path: str | os.PathLike[str]) -> None: ...
        @staticmethod
        def load(path: str | os.PathLike[str], model: PreTrainedModel, config: ADMSConfig | None = None) -> ADMSKVCache: ...

    def __init__(
        self,
        config: ADMSConfig | None = None,
        model_config: Any = None,
        wired: bool = False,
        layers_at_once: int = 1,
        ropes: Sequence[Rope] | None = None,
        window: PositionWindow | None = None,
        ranks: Ranks | None = None,
    ):
        config = ADMSConfig.check(config)
        self.stream = Stream(config if wired else _without_log_mass(config), wired, layers_at_once, window, ranks)
        layers = []
        if model_config is not None:
            config.check_model(model_config)
            text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
            for number, width in enumerate(layer_windows(text)):
                rope = None if ropes is None else ropes[number]
                layers.append(self._sliding(width, rope) if width else ADMSLayer(self.stream, number, rope))
        super().__init__(layers=layers)
        self._config = config
        # The model it is used with, as `model/facts.py` holds it: a file is known by it.
        self.used_model: Any = None
        self.ropes: tuple[tuple[Rope, ...] | None, str | None] = (None, None)
        # Which columns of the masks were padding; see `data/padding.py`.
        self.padding: list[Stretches] = []
        self.stream.committed = self._committed
        self._length_override: int | None = None
        self.seen_tokens = SeenTokens()
        self._told_rewound = False
        self._told_unwired = False
        # Set during a forward pass of a model whose attention is reached through the keys only (attention.AttendedKeys.of).
        self.keys_as: Callable[[torch.Tensor], torch.Tensor] | None = None
        # The mask a model of several parts was given, until its text part asks.
        self.outer_mask: Any = None
        self._hand: dict[int, HandState] = {}
        self._hand_counts: dict[str, int] = {}
        self._variances: dict[int, dict[int, float]] = {}

    @staticmethod
    def _sliding(width: int, rope: Rope | None) -> DynamicSlidingWindowLayer:
        layer = DynamicSlidingWindowLayer(width)
        layer.rope = rope
        return layer

    @property
    def wired(self) -> bool:
        """Whether it was made by `enable_adms_llm`, for a model whose attention shows its queries."""
        return self.stream.wired

    @property
    def window(self) -> PositionWindow:
        """The positions the model is given."""
        return self.stream.window

    # -- what transformers asks ------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one layer's new tokens and return what its queries attend to; see `ADMSLayer.update`."""
        wired = self.stream.wired
        if wired and self.stream.open is None:
            raise RuntimeError(
                "the cache was made by enable_adms_llm, and the model it is given to is not (or no longer) enabled. Call "
                "enable_adms_llm(model, ...) and use the cache it returns"
            )
        if layer_idx >= len(self.layers):
            self._make_layers(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, ADMSLayer):
            # A dtype that changed since the last pass: transformers' layers join both to the wider one.
            keys, values = layer.update(key_states, value_states, *args, **kwargs)
            return keys.to(key_states.dtype), values.to(value_states.dtype)
        new = key_states.shape[2]
        if not wired:
            self._check_unwired(layer_idx, new)
        self._length_override = None
        states = layer.update(key_states, value_states)
        if not wired and layer is self._full_layers()[-1]:
            self._log_every_512(layer.get_seq_length(), new)
        return states if self.keys_as is None else (self.keys_as(states[0]), states[1])

    def _check_unwired(self, layer_idx: int, new: int) -> None:
        # A pass that failed half-way is dropped by the hooks of an enabled model; without them this is where it shows.
        first, own = self.layers[0], self.layers[layer_idx]
        if layer_idx and first.is_initialized and own.get_seq_length() + new != first.get_seq_length():
            raise RuntimeError(
                f"a forward pass failed before layer {layer_idx}, the layers before it had taken its tokens: call "
                "cache.reset() or make a new cache. Or the model is an encoder-decoder, whose cross attention wrote to the "
                "cache too: it wants EncoderDecoderCache(cache, DynamicCache())"
            )
        if not self._told_unwired and own.get_seq_length() + new > self.config.expected_max_tokens:
            logger.warning(
                "this cache is used by a model that was not enabled: no queries are seen, so importance rests on keys and "
                "values, and tokens merge without log-mass. Use enable_adms_llm(model, ...) for full quality."
            )
            self._told_unwired = True

    def _make_layers(self, layer_idx: int) -> None:
        while len(self.layers) <= layer_idx:
            self.layers.append(ADMSLayer(self.stream, len(self.layers)))

    def _full_layers(self) -> list[ADMSLayer]:
        return [layer for layer in self.layers if isinstance(layer, ADMSLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen (not held) by the layer; while a forward pass runs, those before it."""
        done = self.stream.open
        if done is not None and not done.over and layer_idx < len(self.layers) and done.extra["sliding"][layer_idx]:
            return done.extra["sliding"][layer_idx].get("cumulative_length", 0)
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no maximum."""
        return -1

    @property
    def changing_frequencies(self) -> bool:
        """Whether the model's RoPE has frequencies that change with the length it sees."""
        for layer in self.layers:
            rope = self.stream.ropes[layer.number] if isinstance(layer, ADMSLayer) else getattr(layer, "rope", None)
            if rope is not None and rope.stable_length:
                return True
        return False

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first token."""
        return self.stream.batch or -1

    def reset(self) -> None:
        """Forget everything: the cache is as new, its settings stay."""
        self.stream.reset()
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, ADMSLayer):
                # In transformers 5.2 a sliding layer keeps its keys, as zeros.
                self.layers[number] = self._sliding(layer.sliding_window, layer.rope)
        self._hand, self._hand_counts, self._variances = {}, {}, {}
        self._length_override = None
        self.padding, self.seen_tokens = [], SeenTokens()

    @property
    def config(self) -> ADMSConfig:
        """The settings the cache was made with."""
        return self._config

    @config.setter
    def config(self, config: ADMSConfig) -> None:
        raise AttributeError(
            "cache.config can't be replaced: buffers have their size. Make a new cache with the other settings: "
            "enable_adms_llm(model, config)"
        )

    # -- plain lists -----------------------------------------------------------------------------------------------------

    def __call__(
        self, past_key_values: list[tuple[torch.Tensor, torch.Tensor]] | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Compact a plain list of `(key, value)` pairs `[batch, kv_heads, tokens, head_dim]`, one pair a layer.

        No queries are known and no log-mass can be returned, so importance rests on keys and values. A pair that is no
        longer than sinks, middle and recent window comes back as it is. The cache's own content is not touched.
        """
        if past_key_values is None:
            return None
        compacted = []
        for number, pair in enumerate(past_key_values):
            shaped = isinstance(pair, (tuple, list)) and len(pair) == 2
            if not shaped or any(not isinstance(part, torch.Tensor) or part.dim() != 4 for part in pair):
                raise ValueError(
                    f"past_key_values[{number}] must be a (key, value) pair of [batch, kv_heads, tokens, head_dim] tensors"
                )
            keys, values = pair
            if keys.shape[2] <= self.dynamic_start_size + self.middle_allocation + self.recent_size:
                compacted.append((keys, values))
                continue
            stream = Stream(_without_log_mass(self.config), wired=False)
            compacted.append(stream.compact_states(keys, values))
        self._length_override = past_key_values[0][0].shape[2] if past_key_values else None
        return compacted

    # -- what can be read ------------------------------------------------------------------------------------------------

    @property
    def current_length(self) -> int:
        """Tokens seen so far; settable for the parts that are called by hand."""
        return self.get_seq_length() if self._length_override is None else self._length_override

    @current_length.setter
    def current_length(self, length: int) -> None:
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise ValueError(f"current_length={length!r} must be a whole number, at least 0")
        self._length_override = length

    @property
    def start_size(self) -> int:
        """`config.start_size`."""
        return self.config.start_size

    @property
    def dynamic_start_size(self) -> int:
        """Sinks in force."""
        return self.config.dynamic_start_size

    @property
    def recent_size(self) -> int:
        """`config.recent_size`."""
        return self.config.recent_size

    @property
    def compressed_budget(self) -> int:
        """`config.compressed_budget`."""
        return self.config.compressed_budget

    @property
    def middle_allocation(self) -> int:
        """`config.middle_allocation`."""
        return self.config.middle_allocation

    @property
    def held_tokens(self) -> int:
        """Most tokens any row holds now, per head: of any layer, averaged over what shares a total where budgets differ."""
        layers = (layer for layer in self._full_layers() if layer.is_initialized or self.stream.part_of(layer.number))
        counts = [layer.held_tokens().cpu() for layer in layers]
        if not counts:
            return 0
        counts = torch.stack(counts)
        together = self.config.enable_adaptive_controller and self.config.controller_scope == "model"
        return int((counts.mean(0) if together else counts).max().ceil())

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the cache holds now."""
        return sum(self.memory_report().values())

    def memory_report(self) -> dict[str, int]:
        """Bytes by use: `attended` (tokens and their bookkeeping), `query_window`, `originals` (outside the attended set),
        `modules` (what calibration, controller and replay remember), `sliding` (transformers' own layers); with recall also
        `archive` (what left the recent window, wherever it is stored) and `index` (what it is found by)."""
        report = {"attended": 0, "query_window": 0, "originals": 0, "modules": 0, "sliding": 0}
        for stack in self.stream.stacks:
            for use, size in stack.nbytes.items():
                report[use] = report.get(use, 0) + size
        for layer in self.layers:
            if not isinstance(layer, ADMSLayer) and layer.is_initialized:
                report["sliding"] += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
        return report

    @property
    def profile(self) -> bool:
        """Whether `compaction_seconds` is counted."""
        return self.stream.clock.running

    @profile.setter
    def profile(self, value: bool) -> None:
        self.stream.clock.running = bool(value)

    @property
    def compaction_seconds(self) -> float:
        """Seconds spent on scoring and compaction since the cache was made, while `profile` was on."""
        return self.stream.clock.seconds


def _refused(name: str) -> property:
    def refuse(cache: ADMSKVCache) -> Any:
        raise AttributeError(
            f"ADMSKVCache holds keys and values, and the model asks it for {name}: a model with linear-attention, "
            "convolution or state-space layers takes the cache that transformers makes for it (leave this one out), an "
            "encoder-decoder EncoderDecoderCache(cache, DynamicCache())"
        )

    return property(refuse)


# What models with other states ask of a cache, in one release of transformers or another.
for _name in (
    *("conv_cache", "conv_states", "recurrent_states", "ssm_states", "has_previous_state", "is_updated"),
    *("get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state", "update_indexer"),
    *("cross_attention_cache", "self_attention_cache"),
):
    setattr(ADMSKVCache, _name, _refused(_name))
