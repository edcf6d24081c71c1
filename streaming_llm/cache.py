"""The container: one layer object a layer, the documented views, counters and sizes. No tensor maths."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from .autograd import unrecorded
from .by_hand import ByHandMixin, HandState
from .calibration import CalibrationMixin
from .config import ADMSConfig, layer_windows
from .controller import ControllerMixin
from .dual_fidelity import DualFidelityMixin
from .layer import ADMSLayer
from .model_facts import UsedModel
from .padding import Stretches, known_figures, mask_change, mask_figures, with_columns
from .parallel import Ranks
from .replay import ReplayMixin
from .rope import Rope
from .seen import SeenMixin, SeenTokens, ids_of
from .session import SessionMixin
from .stats import StatsMixin
from .stream.passes import Arrival
from .stream.positions import PositionWindow
from .stream.stream import Pass, Stream

logger = logging.getLogger(__name__)


def _without_log_mass(config: ADMSConfig) -> ADMSConfig:
    """The settings of a cache whose model was not enabled: nothing tells attention which slots are unused, so budgets can't
    differ between heads, nor may slots stay empty: what sketches and replay would use is the precision tier's."""
    modules = ("use_adaptive_budget", "enable_adaptive_controller", "enable_dual_fidelity", "enable_residual_replay")
    if not any(getattr(config, name) for name in modules):
        return config
    off = dict.fromkeys(modules, False)
    return dataclasses.replace(config, **off, sketch_budget=0, replay_budget=0, compressed_budget=config.middle_allocation)


def _held_by_sliding(layer: DynamicSlidingWindowLayer) -> int:
    """How many of the last tokens transformers' layer can take back, so that it still has its window."""
    held = layer.keys.shape[2] if layer.is_initialized else 0
    return held if held == layer.get_seq_length() else max(0, held - layer.sliding_window + 1)


class ADMSKVCache(
    DualFidelityMixin,
    ReplayMixin,
    CalibrationMixin,
    ControllerMixin,
    ByHandMixin,
    StatsMixin,
    SessionMixin,
    SeenMixin,
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
        self.used_model: UsedModel | None = None
        self.ropes: tuple[tuple[Rope, ...] | None, str | None] = (None, None)
        # Which columns of the masks were padding; see `padding.py`.
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

    def use_with(self, model: torch.nn.Module) -> None:
        """Take note of the model the cache is used with; see `save`."""
        if self.used_model is None or not self.used_model.is_(model):
            self.used_model = UsedModel(model)

    # -- around a forward pass (called by the hooks enable_adms_llm registers) --------------------------------------------

    @unrecorded()
    def begin_forward(
        self,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        new: int,
        batch: int,
        device: torch.device,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Take note of what is coming, make room for it, and move the window of positions on where it is due.

        Args:
            positions: the position ids the model would use, `[batch or 1, new]`, or None.
            attention_mask: 2-D, 1 for real tokens, a column for each token seen and new, or for each new one only; or None.
                What it changes of tokens seen holds from now on.
            new: number of new tokens; batch: rows; device: where they are.
            tokens: their ids `[batch, new]`, or embeddings; None where they are not known.

        Returns:
            `(positions, attention_mask)` for the model to use instead.

        Raises:
            ValueError: a mask or positions that can't be right; nothing has changed.
        """
        self._drop_unfinished()
        self._end_recording()
        seen = self.stream.seen
        real, counts, tail, change = None, (new,) * batch, 0, None
        only_new = False
        if isinstance(attention_mask, torch.Tensor):
            attention_mask, only_new = self._whole_mask(attention_mask, seen, new, batch)
            if attention_mask is not None and attention_mask.dim() == 2:
                real = attention_mask[:, -new:].bool()
                figures = [real.flip(1).cumprod(1).sum(1).amin()[None], real.sum(1)]
                if seen and not only_new and self.wired and batch == self.batch_size:
                    figures.append(mask_figures(attention_mask[:, :seen], self.padding))
                tail, *figures = torch.cat(figures).tolist()
                counts, figures = figures[:batch], figures[batch:]
                if figures and figures != known_figures(self.padding, batch):
                    past = attention_mask[:, :seen].bool().cpu()
                    change = mask_change(past, self.padding, self.stream.exact_lengths(), not self.stream.aligned)
                if min(counts) == new:
                    real = None
        if only_new and seen:
            # Counted from a mask of the new tokens alone, they would start at 0 again.
            positions = None
        window = self.window
        # Where a mask takes tokens out, the next one's position is told, not counted.
        first, last = window.span(positions, real, None if real is None and change is None else counts, new)
        if positions is None and window.following is None and real is not None:
            first, last = [0] * batch, [count - 1 for count in counts]
        masked = isinstance(attention_mask, torch.Tensor)
        arrival = Arrival(new, tuple(counts), None, real, masked, tail)
        started = self.stream.begin(arrival, first, last, change)
        following = window.following
        counting = real is None and all(position == seen for position in (following or [0]))
        arrival.positions = started.window.place(positions, real, first, new, counting, device)
        # transformers' own layers replace their tensors: what they refer to now is all it takes to go back.
        sliding = [None if isinstance(layer, ADMSLayer) else dict(vars(layer)) for layer in self.layers]
        padding = self.padding if change is None else with_columns([], 0, change.real)
        if real is not None:
            # Of one token a row the counts have told.
            padding = with_columns(padding, seen, torch.tensor(counts)[:, None] if new == 1 else real.cpu())
        started.extra = {"sliding": sliding, "padding": padding, "ids": None if tokens is None else ids_of(tokens)}
        # From here on `abort_forward` goes back.
        self.stream.open = started
        self._move_sliding([after - before for after, before in started.shifts(window)], device)
        return arrival.positions, attention_mask

    def _whole_mask(self, mask: torch.Tensor, seen: int, new: int, batch: int) -> tuple[torch.Tensor | None, bool]:
        """The mask with a column for every token (None: no padding), and whether it was given for the new ones only."""
        stacks, capacity = self.stream.stacks, self.config.expected_max_tokens
        if mask.dim() != 2:
            if seen + new > capacity or self.stream.padded or self.stream.compacted:
                raise ValueError(
                    f"attention_mask of shape {list(mask.shape)} can't be: once tokens are compacted only a 2-D mask "
                    "[batch, tokens] tells what is padding"
                )
            return mask, False
        if mask.shape[0] != batch or mask.shape[1] not in (seen + new, new):
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} must be [{batch}, {seen + new}] (all tokens seen and new) or "
                f"[{batch}, {new}] (the new ones)"
            )
        if mask.shape[1] == seen + new:
            return mask, False
        sliding = len(self._full_layers()) < len(self.layers)
        real = stacks[0].real if stacks else None
        if bool(mask.all()) and (not self.stream.padded or (real is None and not sliding)):
            # Nothing to tell, now or of what is held: a mask as long as the stream would have to be made at every step.
            return None, True
        if self.stream.padded and real is None and sliding:
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} must be [{batch}, {seen + new}]: with padding in the "
                "batch, layers with a sliding window need the mask of all tokens"
            )
        before = mask.new_ones(batch, seen) if real is None else real.to(mask)
        return torch.cat([before, mask], dim=1), True

    def _end_recording(self) -> None:
        """Let passes count as usual once no crop follows one any more: transformers leaves the layers recording."""
        if self.stream.open is not None:
            self._settle()
            self.stream.records_past = False
        for layer in self.layers:
            own = not isinstance(layer, ADMSLayer) and getattr(layer, "record_past", False)
            if own and layer.is_initialized and layer.keys.shape[2] >= layer.sliding_window:
                layer.crop(0)
                layer.record_past = False

    def _move_sliding(self, shifts: list[int], device: torch.device) -> None:
        """Turn the keys of layers with a sliding window back by so many positions, row by row."""
        for layer in self.layers if any(shifts) else ():
            rope = getattr(layer, "rope", None)
            if not isinstance(layer, ADMSLayer) and rope is not None and layer.is_initialized and layer.keys.shape[2]:
                shift = torch.tensor(shifts, device=layer.keys.device).expand(layer.keys.shape[0])
                layer.keys = rope.shift(layer.keys, -shift.view(-1, 1, 1))

    @unrecorded()
    def end_forward(self) -> None:
        """The forward pass went well. Raises `NonFiniteError` (and takes it back) where it brought NaN or infinity."""
        if self.stream.open is None:
            return
        self.stream.open.over = True
        new = self.stream.open.arrival.new
        with self._aborted_if_it_fails():
            for layer in self.layers:
                if not isinstance(layer, ADMSLayer) and layer.is_initialized:
                    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            if self.stream.records_past:
                self.stream.check()
            else:
                self.stream.commit()
        self._log_every_512(self.stream.seen, new)

    def _committed(self, done: Pass) -> None:
        """What the cache knows of a pass beside its tokens counts with it; where this fails nothing has changed."""
        if done.extra["ids"] is not None:
            seen = copy.deepcopy(self.seen_tokens)
            seen.append(done.extra["ids"][:, : done.arrival.new], self.stream.seen - done.arrival.new)
            self.seen_tokens = seen
        self.padding = done.extra["padding"]

    @unrecorded()
    def abort_forward(self) -> None:
        """The forward pass failed: it has never been."""
        done = self.stream.open
        self.stream.abort()
        for layer, attributes in zip(self.layers, () if done is None else done.extra["sliding"], strict=False):
            if attributes is not None:
                vars(layer).clear()
                vars(layer).update(attributes)

    def _drop_unfinished(self) -> None:
        # Python calls no hook after a KeyboardInterrupt in a forward pass: it is found here, at the next call.
        if self.stream.open is not None and not self.stream.open.over:
            self.abort_forward()

    def _settle(self) -> None:
        """Let a pass that only waited for a crop count; where that fails, it has never been."""
        with self._aborted_if_it_fails():
            self.stream.settle()

    @contextlib.contextmanager
    def _aborted_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort_forward()
            raise

    @unrecorded()
    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every layer; 0 settles what was tried out.

        Raises:
            ValueError: they are not all held exactly any more, in whichever layer; nothing has changed.
        """
        self._drop_unfinished()
        gone = -tokens_to_remove
        if gone < 0:
            # Releases before 5.10 give the length to keep.
            gone = max(0, self.get_seq_length() - tokens_to_remove)
        self.stream.check_crop(gone)
        sliding = [layer for layer in self.layers if not isinstance(layer, ADMSLayer)]
        for layer in sliding:
            if gone > _held_by_sliding(layer):
                raise ValueError(
                    f"crop({tokens_to_remove}) needs tokens that a layer with a sliding window has dropped; call "
                    "cache.activate_past_recording() before the pass that is to be taken back"
                )
        for layer in sliding:
            # Transformers' sliding layers refuse to be cropped by 0 where they record nothing.
            if gone or getattr(layer, "record_past", False):
                layer.crop(-gone)
        with self._aborted_if_it_fails():
            self.stream.crop(gone)
        if self.padding:
            self.padding = with_columns(self.padding, self.stream.seen, torch.ones(len(self.padding), 0, dtype=torch.bool))
        self.seen_tokens.remove(max(0, self.seen_tokens.length - self.stream.seen))

    @property
    def held_one_by_one(self) -> int:
        """How many of the last tokens `crop` can take back."""
        sliding = (_held_by_sliding(layer) for layer in self.layers if not isinstance(layer, ADMSLayer))
        return min([self.stream.croppable, *sliding])

    def activate_past_recording(self) -> None:
        """Passes count only with the next `crop` or pass from now on; see `ADMSLayer.activate_past_recording`."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` of every layer becomes what row `beam_idx[i]` was."""
        self._pick_rows(lambda layer: layer.reorder_cache(beam_idx), beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        rows = torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats)
        self._pick_rows(lambda layer: layer.batch_repeat_interleave(repeats), rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`."""
        self._pick_rows(lambda layer: layer.batch_select_indices(indices), indices)

    @unrecorded()
    def _pick_rows(self, sliding: Callable[[Any], None], indices: Any) -> None:
        self._drop_unfinished()
        self._settle()
        if self.stream.batch is None:
            return
        for layer in self.layers:
            if not isinstance(layer, ADMSLayer):
                sliding(layer)
        at = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        order = torch.arange(self.stream.batch)[at].tolist()
        self.stream.pick(order)
        self.padding = [self.padding[row] for row in order] if self.padding else []
        self.seen_tokens.pick(indices)

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
        `modules` (what calibration, controller and replay remember), `sliding` (transformers' own layers)."""
        report = {"attended": 0, "query_window": 0, "originals": 0, "modules": 0, "sliding": 0}
        for stack in self.stream.stacks:
            for use, size in stack.nbytes.items():
                report[use] += size
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen={self.get_seq_length()}, layers={len(self.layers)}, config={self.config})"


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
