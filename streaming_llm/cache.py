"""The container: one layer object a layer, the documented views, counters and sizes. No tensor maths."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from .by_hand import ByHandMixin
from .calibration import CalibrationMixin
from .config import ADMSConfig, layer_windows
from .controller import ControllerMixin
from .dual_fidelity import DualFidelityMixin
from .group import can_plan, group_layers, plan_budgets
from .layer import ADMSLayer, Arrival, NonFiniteError
from .replay import ReplayMixin
from .rope import Rope
from .stats import StatsMixin

logger = logging.getLogger(__name__)

# Compactions after which layers trade budget for the first time, then after twice as many each time (much is still to be
# learnt), and at last every so many.
PLANNED_FIRST, PLANNED_EVERY = 2, 64


def _layer(config: ADMSConfig, wired: bool) -> ADMSLayer:
    # Without log-mass nothing tells attention which slots are unused, so budgets can't differ between heads, nor may slots
    # stay empty: what sketches and replay would use is the precision tier's.
    modules = ("use_adaptive_budget", "enable_adaptive_controller", "enable_dual_fidelity", "enable_residual_replay")
    if not wired and any(getattr(config, name) for name in modules):
        off = dict.fromkeys(modules, False)
        whole = config.middle_allocation
        config = dataclasses.replace(config, **off, sketch_budget=0, replay_budget=0, compressed_budget=whole)
    return ADMSLayer(config, wired)


class ADMSKVCache(DualFidelityMixin, ReplayMixin, CalibrationMixin, ControllerMixin, ByHandMixin, StatsMixin, Cache):
    """A `transformers.Cache` that keeps a bounded, weighted set of tokens per (layer, KV head).

    Made by `enable_adms_llm(model, ...)`, which also lets the model's attention see the tokens' log-mass; made by hand it
    works on any model too, but without queries and log-mass: importance then rests on keys and values alone.

    Args:
        config: the settings; `ADMSConfig()` when None.
        model_config: the model's config, for its number of layers and which of them have a sliding window (those keep
            transformers' own layer). None: layers appear as they are used.
        wired: True when the model's attention shows its queries (set by `enable_adms_llm`).
        layers_at_once: layers whose buffers are one and which are compacted in one call; they must be on one device.
        ropes: how each layer's keys turn with position, for the calibration; None where that is not known.

    Attributes:
        profile: set to True to have `compaction_seconds` count the time compaction takes (waits for the device).
    """

    def __init__(
        self,
        config: ADMSConfig | None = None,
        model_config: Any = None,
        wired: bool = False,
        layers_at_once: int = 1,
        ropes: Sequence[Rope] | None = None,
    ):
        config = ADMSConfig() if config is None else config
        if not isinstance(config, ADMSConfig):
            raise TypeError(f"config={config!r} must be an ADMSConfig")
        layers = []
        if model_config is not None:
            config.check_model(model_config)
            text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
            for window in layer_windows(text):
                layers.append(_layer(config, wired) if window is None else DynamicSlidingWindowLayer(window))
        for layer, rope in zip(layers, ropes or (), strict=False):
            layer.rope = rope
        super().__init__(layers=layers)
        self.config = config
        self.wired = wired
        self.layers_at_once = layers_at_once
        group_layers(self._full_layers(), layers_at_once)
        self.broken: str | None = None
        self._next_plan = PLANNED_FIRST
        self._arrival: Arrival | None = None
        self._length_override: int | None = None
        self._told_unwired = False
        # Set during a forward pass of a model whose attention is reached through the keys only (attention.AttendedKeys.of).
        self.keys_as: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._profile = False
        self._hand_counts: dict[str, int] = {}
        self._variances: dict[int, dict[int, float]] = {}

    # -- what transformers asks ------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one layer's new tokens and return what its queries attend to; see `ADMSLayer.update`."""
        if self.broken:
            raise RuntimeError(f"the cache can't be used any more: {self.broken}. Call cache.reset() or make a new one")
        self._make_layers(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, ADMSLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if not self.wired and not self._told_unwired and layer.length + key_states.shape[2] > layer.capacity:
            logger.warning(
                "this cache is used by a model that was not enabled: no queries are seen, so importance rests on keys and "
                "values, and tokens merge without log-mass. Use enable_adms_llm(model, ...) for full quality."
            )
            self._told_unwired = True
        self._length_override = None
        states = layer.update(key_states, value_states, arrival=self._arrival)
        if layer is self._last_full_layer():
            self._log_every_512(layer.seen, key_states.shape[2])
        return states if self.keys_as is None else (self.keys_as(states[0]), states[1])

    def _make_layers(self, layer_idx: int) -> None:
        while len(self.layers) <= layer_idx:
            self.layers.append(_layer(self.config, self.wired))
            self.layers[-1].profile = self._profile

    def _full_layers(self) -> list[ADMSLayer]:
        return [layer for layer in self.layers if isinstance(layer, ADMSLayer)]

    def _last_full_layer(self) -> ADMSLayer | None:
        return next((layer for layer in reversed(self.layers) if isinstance(layer, ADMSLayer)), None)

    def _first_full_layer(self) -> ADMSLayer | None:
        return next((layer for layer in self.layers if isinstance(layer, ADMSLayer)), None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen (not held) by the layer."""
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first token."""
        layer = self._first_full_layer()
        return -1 if layer is None or layer.buffer is None else layer.buffer.keys.shape[0]

    def reset(self) -> None:
        """Forget everything: the cache is as new, its settings stay."""
        super().reset()
        # In transformers 5.2 a sliding layer keeps its keys, as zeros.
        self.layers = [
            layer if isinstance(layer, ADMSLayer) else DynamicSlidingWindowLayer(layer.sliding_window)
            for layer in self.layers
        ]
        group_layers(self._full_layers(), self.layers_at_once)
        self._hand_counts = {}
        self._variances = {}
        self.broken = None
        self._next_plan = PLANNED_FIRST
        self._arrival = None
        self._length_override = None

    # -- around a forward pass (called by the hooks enable_adms_llm registers) --------------------------------------------

    def begin_forward(self, positions: torch.Tensor | None, attention_mask: torch.Tensor | None, new: int) -> None:
        """Take note of the new tokens' positions and padding.

        Args:
            positions: the position ids the model will use, `[batch or 1, new]`, or None.
            attention_mask: 2-D, 1 for real tokens, its last `new` columns for the new ones; or None.
            new: number of new tokens.
        """
        real = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            real = attention_mask[:, -new:].bool()
            if bool(real.all()):
                real = None
        self._arrival = Arrival(positions=positions, real=real)
        self._end_recording()
        if self.config.enable_adaptive_controller and self.config.controller_scope == "model" and self.wired:
            self._plan_budgets(new)

    def _end_recording(self) -> None:
        """Bring sliding layers back to their window after assisted generation: transformers leaves them recording."""
        for layer in self.layers:
            # While it goes on, every forward pass is followed by a crop.
            if getattr(layer, "record_past", False) and layer.is_initialized and layer.keys.shape[2] >= layer.sliding_window:
                layer.crop(0)
                layer.record_past = False

    def _plan_budgets(self, new: int) -> None:
        """Let layers trade budget, where a compaction is due and enough was measured since the last time."""
        layers = self._full_layers()
        first = layers[0] if layers else None
        if first is None or self.broken or not first.will_compact(new) or not can_plan(layers):
            return
        if first.rounds >= self._next_plan:
            self._next_plan = min(2 * first.rounds, first.rounds + PLANNED_EVERY)
            plan_budgets(layers, self.layers_at_once)

    def end_forward(self) -> None:
        """The forward pass went well. Raises `NonFiniteError` (and takes it back) where it brought NaN or infinity."""
        self._arrival = None
        layers = self._full_layers()
        if layers and layers[0].is_initialized and layers[0].device.type != "cpu":
            groups = {id(layer.group): layer.group for layer in layers if layer.group is not None}
            bad = [flag for group in groups.values() for flag in group.newest_are_bad()]
            bad += [layer.newest_are_bad() for layer in layers if layer.group is None and layer.is_initialized]
            if bool(torch.stack([flag.to(bad[0].device) for flag in bad]).any()):
                self.abort_forward()
                raise NonFiniteError("key_states or value_states hold NaN or infinity; the cache takes finite numbers only")
        for layer in layers:
            layer.settle()

    def abort_forward(self) -> None:
        """The forward pass failed: take back what it appended, or mark the cache as unusable where that is impossible."""
        self._arrival = None
        done = [layer.roll_back() for layer in self._full_layers()]
        sliding = [layer for layer in self.layers if not isinstance(layer, ADMSLayer)]
        lengths = {layer.get_seq_length() for layer in self.layers}
        if not all(done) or (sliding and len(lengths) > 1):
            self.broken = "a forward pass failed after some layers had compacted its tokens"

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
            layer = _layer(self.config, wired=False)
            if keys.shape[2] <= self.dynamic_start_size + self.middle_allocation + self.recent_size:
                compacted.append((keys, values))
                continue
            layer.update(keys, values)
            layer.compact()
            compacted.append((layer.keys, layer.values))
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
        counts = [layer.held_tokens().cpu() for layer in self._full_layers() if layer.is_initialized]
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
        `modules` (what calibration, controller and replay remember), `sliding` (transformers' own layers)."""
        report = {"attended": 0, "query_window": 0, "originals": 0, "modules": 0, "sliding": 0}
        for layer in self.layers:
            if isinstance(layer, ADMSLayer):
                report["originals"] += layer.original_nbytes
                report["modules"] += layer.state_nbytes
                report["attended"] += layer.nbytes - layer.query_nbytes - layer.original_nbytes - layer.state_nbytes
                report["query_window"] += layer.query_nbytes
            elif layer.is_initialized:
                report["sliding"] += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
        return report

    @property
    def profile(self) -> bool:
        """Whether `compaction_seconds` is counted."""
        return self._profile

    @profile.setter
    def profile(self, value: bool) -> None:
        self._profile = bool(value)
        for layer in self._full_layers():
            layer.profile = self._profile

    @property
    def compaction_seconds(self) -> float:
        """Seconds spent on scoring and compaction since the cache was made, while `profile` was on."""
        return sum(layer.compaction_seconds for layer in self._full_layers())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen={self.get_seq_length()}, layers={len(self.layers)}, config={self.config})"
