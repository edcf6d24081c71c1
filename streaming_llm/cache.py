"""The container: one layer object a layer, the documented views, counters and sizes. No tensor maths."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from .autograd import unrecorded
from .by_hand import ByHandMixin
from .calibration import CalibrationMixin
from .config import ADMSConfig, layer_windows
from .controller import ControllerMixin
from .dual_fidelity import DualFidelityMixin
from .group import can_plan, group_layers, measured_budgets, plan_budgets, whole_groups
from .layer import ADMSLayer, Arrival, NonFiniteError, rows_at
from .model_facts import UsedModel
from .padding import MaskChange, Stretches, known_figures, mask_change, mask_figures, real_tail, with_columns
from .parallel import Ranks
from .positions import PositionWindow
from .replay import ReplayMixin
from .rope import Rope
from .rows import PaddedLayer
from .seen import SeenMixin, SeenTokens, ids_of
from .session import SessionMixin
from .stats import StatsMixin

logger = logging.getLogger(__name__)

# Layers trade budget after `layer.PLANNED_FIRST` compactions, then after twice as many each time (much is still to be
# learnt), and at last every so many.
PLANNED_EVERY = 64


def _layer(config: ADMSConfig, wired: bool) -> ADMSLayer:
    # Without log-mass nothing tells attention which slots are unused, so budgets can't differ between heads, nor may slots
    # stay empty: what sketches and replay would use is the precision tier's.
    modules = ("use_adaptive_budget", "enable_adaptive_controller", "enable_dual_fidelity", "enable_residual_replay")
    if not wired and any(getattr(config, name) for name in modules):
        off = dict.fromkeys(modules, False)
        whole = config.middle_allocation
        config = dataclasses.replace(config, **off, sketch_budget=0, replay_budget=0, compressed_budget=whole)
    return ADMSLayer(config, wired)


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
        layers = []
        if model_config is not None:
            config.check_model(model_config)
            text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
            for width in layer_windows(text):
                layers.append(_layer(config, wired) if width is None else DynamicSlidingWindowLayer(width))
        for layer, rope in zip(layers, ropes or (), strict=False):
            layer.rope = rope
        super().__init__(layers=layers)
        self._config = config
        self.wired = wired
        self.layers_at_once = layers_at_once
        self.ranks = ranks
        group_layers(self._full_layers(), layers_at_once)
        self.broken: str | None = None
        self.window = PositionWindow() if window is None else window
        for layer in self._full_layers():
            layer.limit = self.window.limit
        self.used_model: UsedModel | None = None
        self.ropes: tuple[tuple[Rope, ...] | None, str | None] = (None, None)
        self._arrival: Arrival | None = None
        self._followed: list[int] | None = None
        self._before: list[tuple[int, dict[str, Any] | None]] | None = None
        self._room: tuple[int, int, Arrival] | None = None
        # Which columns of the masks were padding; see `padding.py`.
        self.padding: list[Stretches] = []
        self._length_override: int | None = None
        self.seen_tokens = SeenTokens()
        self._coming: torch.Tensor | None = None
        self._told_rewound = False
        self._told_unwired = False
        # Set during a forward pass of a model whose attention is reached through the keys only (attention.AttendedKeys.of).
        self.keys_as: Callable[[torch.Tensor], torch.Tensor] | None = None
        # The mask a model of several parts was given, until its text part asks.
        self.outer_mask: Any = None
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
        if self.wired and self._before is None:
            raise RuntimeError(
                "the cache was made by enable_adms_llm, and the model it is given to is not (or no longer) enabled. Call "
                "enable_adms_llm(model, ...) and use the cache it returns"
            )
        self._make_layers(layer_idx)
        layer = self.layers[layer_idx]
        self._check_same_point(layer_idx, key_states.shape[2])
        if not isinstance(layer, ADMSLayer):
            # A dtype that changed since the last pass: transformers' layers join both to the wider one.
            keys, values = layer.update(key_states, value_states, *args, **kwargs)
            return keys.to(key_states.dtype), values.to(value_states.dtype)
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

    def _check_same_point(self, layer_idx: int, new: int) -> None:
        # A pass that failed half-way is taken back by the hooks of an enabled model; without them this is where it shows.
        first, own = self.layers[0], self.layers[layer_idx]
        if layer_idx and first.is_initialized and own.get_seq_length() + new != first.get_seq_length():
            self.broken = (
                f"a forward pass failed before layer {layer_idx}, the layers before it had taken its tokens; or the model "
                "is an encoder-decoder, whose cross attention wrote to it too and wants EncoderDecoderCache(cache, "
                "DynamicCache())"
            )
            raise RuntimeError(f"the cache can't be used any more: {self.broken}. Call cache.reset() or make a new one")

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
        """Tokens seen (not held) by the layer; while a forward pass runs, those before it."""
        if self._before is not None and layer_idx < len(self._before):
            return self._before[layer_idx][0]
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no maximum."""
        return -1

    @property
    def changing_frequencies(self) -> bool:
        """Whether the model's RoPE has frequencies that change with the length it sees."""
        return any(getattr(getattr(layer, "rope", None), "stable_length", None) for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first token."""
        layer = self._first_full_layer()
        return -1 if layer is None or layer.buffer is None else layer.buffer.keys.shape[0]

    def reset(self) -> None:
        """Forget everything: the cache is as new, its settings stay."""
        super().reset()
        for number, layer in enumerate(self.layers):
            if isinstance(layer, PaddedLayer):
                self.layers[number] = layer.unpadded()
            elif not isinstance(layer, ADMSLayer):
                # In transformers 5.2 a sliding layer keeps its keys, as zeros.
                self.layers[number] = DynamicSlidingWindowLayer(layer.sliding_window)
                self.layers[number].rope = getattr(layer, "rope", None)
        self.window.reset()
        self.padding = []
        group_layers(self._full_layers(), self.layers_at_once)
        self._hand_counts = {}
        self._variances = {}
        self.broken = None
        self._arrival = self._before = self._room = self._coming = None
        self._length_override = None
        self.seen_tokens = SeenTokens()

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
        self._take_back_unfinished()
        if self.broken:
            raise RuntimeError(f"the cache can't be used any more: {self.broken}. Call cache.reset() or make a new one")
        self._end_recording()
        seen = self.get_seq_length()
        self._followed = self.window.following
        counts = real = change = None
        tail = 0
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
                    change = self._mask_change(attention_mask[:, :seen].bool().cpu())
                if min(counts) == new:
                    real = counts = None
        if only_new and seen:
            # Counted from a mask of the new tokens alone, they would start at 0 again.
            positions = None
        # Where a mask takes tokens out, the next one's position is told, not counted.
        first, last = self.window.span(positions, real, counts or (change and [new] * batch), new)
        if positions is None and self.window.following is None and real is not None:
            first, last = [0] * batch, [count - 1 for count in counts]
        masked = isinstance(attention_mask, torch.Tensor)
        arrival = Arrival(real=real, counts=counts, masked=masked, tail=tail)
        # Refused before anything changes: what a compaction would make room for can only be fewer slots.
        self.window.plan(first, last, self._slots(new, counts, change))
        if change is not None:
            self._change_mask(change)
        self._room = new, batch, arrival
        self._make_room(*self._room)
        shifts = self.window.plan(first, last, self._slots())
        if any(shifts):
            self._move_window(shifts, device)
        following = self.window.following
        counting = real is None and all(position == seen for position in (following or [0]))
        arrival.positions = self.window.place(positions, real, first, new, counting, device)
        self._arrival = arrival
        self.window.follow(last)
        # transformers' own layers replace their tensors: what they refer to now is all it takes to go back.
        self._before = [
            (layer.get_seq_length(), None if isinstance(layer, ADMSLayer) else dict(vars(layer))) for layer in self.layers
        ]
        if real is not None:
            # Of one token a row the counts have told.
            self.padding = with_columns(self.padding, seen, torch.tensor(counts)[:, None] if new == 1 else real.cpu())
        self._coming = None if tokens is None else ids_of(tokens)
        return arrival.positions, attention_mask

    def _whole_mask(self, mask: torch.Tensor, seen: int, new: int, batch: int) -> tuple[torch.Tensor | None, bool]:
        """The mask with a column for every token (None: no padding), and whether it was given for the new ones only."""
        if mask.dim() != 2:
            layer = self._first_full_layer()
            if layer is not None and (not layer.plain or layer.length + new > layer.capacity):
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
        layer = self._first_full_layer()
        sliding = len(self._full_layers()) < len(self.layers)
        if bool(mask.all()) and (not isinstance(layer, PaddedLayer) or (layer.aligned and not sliding)):
            # Nothing to tell, now or of what is held: a mask as long as the stream would have to be made at every step.
            return None, True
        before = mask.new_ones(batch, seen)
        if isinstance(layer, PaddedLayer):
            if layer.aligned and sliding:
                raise ValueError(
                    f"attention_mask of shape {list(mask.shape)} must be [{batch}, {seen + new}]: with padding in the "
                    "batch, layers with a sliding window need the mask of all tokens"
                )
            if not layer.aligned:
                before = layer.real[:, :seen].to(mask)
        return torch.cat([before, mask], dim=1), True

    def _mask_change(self, past: torch.Tensor) -> MaskChange:
        """What a mask, bool `[batch, seen]`, changes of the tokens seen; `ValueError` where that can't be."""
        layers = self._full_layers()
        loose = [min(layer.of_row(row)[0].loose for layer in layers) for row in range(len(past))]
        return mask_change(past, self.padding, loose, not any(getattr(layer, "aligned", False) for layer in layers))

    def _change_mask(self, change: MaskChange) -> None:
        """Let every layer hold what a mask calls tokens, and remember what it calls padding."""
        batch, seen = change.real.shape
        with self._broken_if_it_fails():
            self._hold_rows(batch)
            self.padding = with_columns([], 0, change.real)
            for layer in self._full_layers():
                layer.change_mask(change, real_tail(self.padding, seen))

    def _hold_rows(self, batch: int) -> None:
        """From now on each row is held and compacted by itself."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, ADMSLayer) and not isinstance(layer, PaddedLayer):
                self.layers[number] = PaddedLayer(layer, batch)

    def _slots(self, new: int = 0, counts: list[int] | None = None, change: MaskChange | None = None) -> list[int]:
        """Slots each row uses in the layer where they are most, after the compactions that `new` more tokens make necessary
        and with what a mask's `change` adds; one number where all rows use as many."""
        layers = [layer for layer in self._full_layers() if layer.is_initialized]
        if not layers:
            return [self.get_seq_length()]
        slots = [max(numbers) for numbers in zip(*(layer.row_lengths(new, counts) for layer in layers), strict=True)]
        return slots if change is None else [number + max(map(len, change.shown)) for number in slots]

    def _make_room(self, new: int, batch: int, arrival: Arrival) -> None:
        """Compact what is due before the new tokens come; from the first padding on, each row by itself."""
        if not self.wired:
            return
        if arrival.real is not None:
            self._hold_rows(batch)
        layers = self._full_layers()
        for layer in layers:
            layer.accept()
            if isinstance(layer, PaddedLayer) and arrival.counts is not None:
                layer.split(arrival.counts)
        if self.config.enable_adaptive_controller and self.config.controller_scope == "model":
            self._plan_budgets(new, arrival)
        for layer in layers:
            if isinstance(layer, PaddedLayer):
                layer.make_room(new, arrival.counts)
            else:
                layer.make_room(new)

    def _end_recording(self) -> None:
        """Let layers settle as usual once no crop follows a pass any more: transformers leaves them recording."""
        for layer in self.layers:
            if isinstance(layer, ADMSLayer):
                if layer.waits:
                    layer.accept()
                    layer.record_past = False
            elif (
                getattr(layer, "record_past", False) and layer.is_initialized and layer.keys.shape[2] >= layer.sliding_window
            ):
                layer.crop(0)
                layer.record_past = False

    def _plan_budgets(self, new: int, arrival: Arrival) -> None:
        """Let layers trade budget, where a compaction is due and enough was measured since the last time."""
        layers = self._full_layers()
        if not layers:
            return
        if not isinstance(layers[0], PaddedLayer):
            if self._plan_is_due(layers[0], new) and can_plan(layers):
                with self._broken_if_it_fails():
                    plan_budgets(layers, measured_budgets(layers, self.ranks), self.layers_at_once)
                self._plan_next(layers[0])
            return
        for cohort in list(layers[0].cohorts):
            number = layers[0].cohorts.index(cohort)
            count = new if arrival.counts is None else arrival.counts[cohort.rows[0]]
            if self._plan_is_due(cohort.part, count):
                parts = [layer.lend(layer.cohorts[number]) for layer in layers]
                if can_plan(parts):
                    with self._broken_if_it_fails():
                        self._plan_rows(layers, number, measured_budgets(parts, self.ranks))
                else:
                    for layer in layers:
                        layer.give_back(layer.cohorts[number])

    def _plan_rows(self, layers: list[PaddedLayer], number: int, budgets: torch.Tensor) -> None:
        """Put budgets in force for the rows of a cohort, lent to it; rows of different budgets are cohorts of their own."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, own in enumerate(budgets.tolist()):
            places.setdefault(tuple(own), []).append(place)
        divided = [layer.divide(number, list(places.values())) for layer in layers]
        for cohorts, own in zip(zip(*divided, strict=True), places.values(), strict=True):
            parts = [cohort.part for cohort in cohorts]
            plan_budgets(parts, budgets[own], 1)
            self._plan_next(parts[0])
            for layer, cohort in zip(layers, cohorts, strict=True):
                layer.give_back(cohort)

    @contextlib.contextmanager
    def _broken_if_it_fails(self) -> Iterator[None]:
        """What concerns all layers at once is done for all of them or the cache says that it is not."""
        self.broken = "moving budgets or positions, or hiding tokens, failed half way"
        yield
        self.broken = None

    @staticmethod
    def _plan_is_due(first: ADMSLayer, new: int) -> bool:
        return first.is_initialized and first.will_compact(new) and first.rounds >= first.next_plan

    @staticmethod
    def _plan_next(first: ADMSLayer) -> None:
        rounds = first.rounds - 1  # before the compaction that planning was
        first.next_plan = min(2 * rounds, rounds + PLANNED_EVERY)

    def _move_window(self, shifts: list[int], device: torch.device) -> None:
        """Move everything held back by so many positions, row by row."""
        with self._broken_if_it_fails():
            for layer in self.layers:
                if not layer.is_initialized:
                    continue
                batch = layer.buffer.keys.shape[0] if isinstance(layer, ADMSLayer) else layer.keys.shape[0]
                shift = torch.tensor(shifts, device=device).expand(batch)
                if isinstance(layer, ADMSLayer):
                    layer.move_window(shift)
                elif layer.keys.shape[2]:
                    rope = getattr(layer, "rope", None)
                    if rope is not None:
                        layer.keys = rope.shift(layer.keys, -shift.view(-1, 1, 1).to(layer.keys.device))
        self.window.move(shifts)

    @unrecorded()
    def end_forward(self) -> None:
        """The forward pass went well. Raises `NonFiniteError` (and takes it back) where it brought NaN or infinity."""
        layers = self._full_layers()
        if layers and layers[0].is_initialized and layers[0].device.type != "cpu":
            groups = {id(layer.group): layer.group for layer in layers if layer.group is not None}
            bad = [flag for group in groups.values() for flag in group.newest_are_bad()]
            bad += [layer.newest_are_bad() for layer in layers if layer.group is None and layer.is_initialized]
            if bool(torch.stack([flag.to(bad[0].device) for flag in bad]).any()):
                self.abort_forward()
                raise NonFiniteError("key_states or value_states hold NaN or infinity; the cache takes finite numbers only")
        for layer in self.layers:
            if isinstance(layer, ADMSLayer):
                layer.settle()
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        if self._coming is not None:
            self.seen_tokens.append(self._coming, self.get_seq_length())
        self._arrival = self._before = self._room = self._coming = None

    @unrecorded()
    def abort_forward(self) -> None:
        """The forward pass failed: take back what it appended, or mark the cache as unusable where that is impossible."""
        before, room = self._before or [], self._room
        self._arrival = self._before = self._room = self._coming = None
        self.window.following = self._followed
        if before:
            self._forget_columns(before[0][0])
        if self.broken:
            return
        self.broken = "a forward pass failed after some layers had compacted its tokens, or in the middle of a compaction"
        for layer, (_, attributes) in zip(self.layers, before, strict=False):
            if attributes is not None:
                vars(layer).clear()
                vars(layer).update(attributes)
        if not all([layer.roll_back() for layer in self._full_layers()]):
            return
        # A compaction that made room for the tokens stays. Layers it had not come to follow: all must be at one point.
        if room is not None:
            self._make_room(*room)
        self.broken = None

    def _take_back_unfinished(self) -> None:
        # Python calls no hook after a KeyboardInterrupt in a forward pass: it is found here, at the next call.
        if self._room is not None:
            self.abort_forward()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every layer; 0 settles what was tried out.

        Raises:
            ValueError: they are not all held exactly any more, in whichever layer; nothing has changed.
        """
        self._take_back_unfinished()
        gone = -tokens_to_remove
        if gone < 0:
            # Releases before 5.10 give the length to keep.
            gone = max(0, self.get_seq_length() - tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, ADMSLayer):
                if layer.is_initialized:
                    layer.check_crop(gone)
            elif gone > _held_by_sliding(layer):
                raise ValueError(
                    f"crop({tokens_to_remove}) needs tokens that a layer with a sliding window has dropped; call "
                    "cache.activate_past_recording() before the pass that is to be taken back"
                )
        for layer in self.layers:
            # Transformers' sliding layers refuse to be cropped by 0 where they record nothing.
            if isinstance(layer, ADMSLayer) or gone or getattr(layer, "record_past", False):
                layer.crop(-gone)
        self.window.remove(gone)
        self._forget_columns(self.get_seq_length())
        self.seen_tokens.remove(gone)

    def _forget_columns(self, seen: int) -> None:
        if self.padding:
            self.padding = with_columns(self.padding, seen, torch.ones(len(self.padding), 0))

    @property
    def held_one_by_one(self) -> int:
        """How many of the last tokens `crop` can take back."""
        counts = [self.get_seq_length()]
        for layer in self.layers:
            if isinstance(layer, ADMSLayer):
                counts += [layer.loose] if layer.is_initialized else []
            else:
                counts.append(_held_by_sliding(layer))
        return min(counts)

    def activate_past_recording(self) -> None:
        """Passes count only with the next `crop` or pass from now on; see `ADMSLayer.activate_past_recording`."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` of every layer becomes what row `beam_idx[i]` was."""
        self._take_rows(rows_at(beam_idx), "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        self._take_rows(lambda rows: rows.repeat_interleave(repeats), "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`."""
        self._take_rows(rows_at(indices), "batch_select_indices", indices)

    def _take_rows(self, chosen: Callable[[torch.Tensor], torch.Tensor], name: str, argument: Any) -> None:
        """Keep the rows that `chosen` gives; layers of a group together, each other one by its method `name`."""
        self._take_back_unfinished()
        batch = self.batch_size
        groups = whole_groups(self._full_layers())
        for group in groups:
            group.take_rows(chosen)
        grouped = {id(layer) for group in groups for layer in group.layers}
        for layer in self.layers:
            if id(layer) not in grouped:
                getattr(layer, name)(argument)
        rows = max(len(self.window.offsets), len(self.window.following or ()), len(self.padding))
        if rows > 1:
            order = chosen(torch.arange(rows)).tolist()
            self.window.pick(order)
            self.padding = [self.padding[row] for row in order] if self.padding else []
        if batch > 0:
            # As it was given: on an accelerator it is not asked for now.
            self.seen_tokens.pick(chosen(torch.arange(batch)) if name == "batch_repeat_interleave" else argument)

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
