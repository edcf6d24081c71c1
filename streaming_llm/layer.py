"""One layer of the cache: its buffer, the append, and the order of a compaction."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .autograd import unrecorded
from .budgets import middle_variance, share_budget
from .calibration import CalibrationState
from .compressors import get_compressor
from .compressors.base import Compressor, Reference, check_made
from .config import ADMSConfig
from .controller import (
    QUERY_STEP,
    ControllerState,
    attention_output,
    head_budgets,
    reconstruction_energy,
    update_controller,
)
from .importance import Queries, attention_logits, attention_statistics, importance, less_drawn, spread_over_segments
from .middle import compress_with_originals, place_made_tokens
from .recall import Originals
from .replay import ReplayState
from .rope import Rope
from .state import HeadState, in_own_storage, map_tensors
from .tokens import EXACT, PRECISION, RECENT, SINK, SKETCH, WeightedTokens, concatenate, lighten, top_slots

# Of a prefill's queries before its last window, every fourth is scored: nearly as telling, at a quarter of the cost.
_PREFILL_STEP = 4
# The controller measures each of a layer's first compactions, then one in so many.
_MEASURED_FIRST, _MEASURED_EVERY = 8, 4
# Compactions after which layers trade budget for the first time; see `cache.py`.
PLANNED_FIRST = 2
# What the modules remember of each head.
STATES = ("originals", "replay_state", "calibration", "controller")
# What of a layer is there by row.
ROWS = ("buffer", "overflow", "query_buffer", "_waiting", *STATES, "variance_ema", "budgets", "planned")
# What a layer counts, handed from a group to its first layer.
COUNTS = (
    "kept_exact",
    "kept_compressed",
    "dropped",
    "kept_sketches",
    "promotions",
    "replay_triggers",
    "replayed",
    "calibrations",
    "adjustments",
)

if TYPE_CHECKING:
    from .group import LayerGroup


def rows_at(indices: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """For `take_rows`: the rows at `indices`, numbers or marks."""
    return lambda rows: rows[indices.to(rows.device) if isinstance(indices, torch.Tensor) else indices]


class NonFiniteError(ValueError):
    """Keys or values with NaN or infinity were given to the cache; it is as it was before."""


@dataclass
class Arrival:
    """What a forward pass says about its new tokens, beside their keys and values.

    Attributes:
        positions: position ids `[batch or 1, tokens]`, None to count on from the last.
        real: which are no padding, bool `[batch, tokens]`, None when all are.
        counts: how many of each row are, None when all are.
        masked: whether the model was given a padding mask for all tokens seen.
        tail: how many of the newest tokens are real in every row, where `counts` is given.
    """

    positions: torch.Tensor | None = None
    real: torch.Tensor | None = None
    counts: list[int] | None = None
    masked: bool = False
    tail: int = 0


class ADMSLayer(CacheLayerMixin):
    """The weighted tokens of one layer: `[sinks | middle | recent window]`, new tokens appended behind.

    The buffer is allocated once and written in place. When new tokens do not fit any more, the middle is compacted; a pass
    longer than `compression_interval` is attended to as a whole and compacted right after its attention. All rows hold
    equally many tokens: padded batches are `rows.PaddedLayer`'s.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    # What `_forget` sets that a saved conversation holds (see `session.py`), and what lasts a forward pass or is made anew.
    KEPT = (
        "buffer",
        "length",
        "seen",
        "width",
        "rounds",
        "next_plan",
        "compacted",
        "is_initialized",
        "queries_seen",
        "query_buffer",
        "query_count",
        "query_folded",
        "query_last",
        "query_scale",
        "query_softcap",
        "record_past",
        "variance_ema",
        "budgets",
        "planned",
        *STATES,
        "hand_sketches",
        "replay_hand",
        "compressions",
        *COUNTS,
        "_unanswered",
        "_cut",
    )
    TRANSIENT = ("group", "overflow", "_waiting", "_compacting", "_bias", "_undo", "_saved", "_sealed", "_timing")

    def __init__(self, config: ADMSConfig, wired: bool = False):
        super().__init__()
        self.config = config
        self.wired = wired
        self.compressor: Compressor = get_compressor(config.compressor_type)(config)
        self.rope: Rope | None = None
        self.limit: int | None = None
        self.profile = False
        self.compaction_seconds = 0.0
        self._forget()

    def _forget(self) -> None:
        self.group: LayerGroup | None = None
        self.buffer: WeightedTokens | None = None
        self.overflow: WeightedTokens | None = None
        self.length = 0
        self.seen = 0
        self.width = self.config.widest_middle
        self.rounds = 0
        self.next_plan = PLANNED_FIRST
        self.compacted = False
        self.is_initialized = False
        self.queries_seen = False
        self.query_buffer: torch.Tensor | None = None
        self.query_count = 0
        self.query_folded = 0
        self.query_last = 0
        self.query_scale = 1.0
        self.query_softcap: float | None = None
        self.variance_ema: torch.Tensor | None = None
        self.budgets: torch.Tensor | None = None
        self.planned: tuple[torch.Tensor, int] | None = None
        self.originals: Originals | None = None
        self.replay_state: ReplayState | None = None
        self.calibration: CalibrationState | None = None
        self.controller: ControllerState | None = None
        self.hand_sketches: WeightedTokens | None = None
        self.replay_hand: Originals | None = None
        self.compressions = 0
        self.kept_exact: torch.Tensor | int = 0
        self.kept_compressed: torch.Tensor | int = 0
        self.dropped: torch.Tensor | int = 0
        self.kept_sketches: torch.Tensor | int = 0
        self.promotions: torch.Tensor | int = 0
        self.replay_triggers: torch.Tensor | int = 0
        self.replayed: torch.Tensor | int = 0
        self.calibrations: torch.Tensor | int = 0
        self.adjustments: torch.Tensor | int = 0
        self._bias: torch.Tensor | None = None
        self.record_past = False
        self._waiting: torch.Tensor | None = None
        self._unanswered = False
        self._undo: tuple[int, int, int, int] | None = None
        self._saved: dict[str, torch.Tensor] | None = None
        self._sealed = False
        self._compacting = False
        self._cut = False
        self._timing = False

    # -- what transformers asks ------------------------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, `[batch, kv_heads, tokens, head_dim]`, a view; None before the first token."""
        return None if self.buffer is None else self.buffer.keys[:, :, : self.length]

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._assign("keys", states)

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, `[batch, kv_heads, tokens, value_dim]`, a view; None before the first token."""
        return None if self.buffer is None else self.buffer.values[:, :, : self.length]

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._assign("values", states)

    def _assign(self, name: str, states: torch.Tensor | None) -> None:
        # CacheLayerMixin.__init__ assigns None; kvpress's pipeline takes an answer back by assigning what came before it.
        if states is None:
            return
        own = getattr(self, name)
        first = own is not None and states.data_ptr() == own.data_ptr() and states.stride() == own.stride()
        if not first or states.shape[2] > own.shape[2]:
            raise ValueError(f"{name} can't be assigned to: the cache decides itself what to keep, and knows its log-mass")
        if self.compacted:
            self._cut = True
        elif states.shape[2] < self.length:
            self.crop(states.shape[2] - self.length)

    @property
    def held(self) -> WeightedTokens:
        """All slots in use, as views; while a long pass waits to be settled, that too."""
        return self.buffer.slice(0, self.length) if self._waiting is None or self.overflow is None else self.overflow

    @property
    def resting_length(self) -> int:
        """Slots after a compaction."""
        return self.config.dynamic_start_size + self.width + self.config.recent_size

    @property
    def slots(self) -> int:
        """Slots of the buffer; more than `expected_max_tokens` only where budgets differ."""
        return self.resting_length + self.config.compression_interval

    @property
    def _can_compact(self) -> bool:
        """Whether there is more between sinks and recent window than the middle may hold."""
        fixed = self.config.dynamic_start_size + self.config.recent_size
        width = self.width if self.compacted else self.config.middle_allocation
        return self.length - fixed > width

    @property
    def capacity(self) -> int:
        """Slots that may be in use between two forward passes: `expected_max_tokens`, as wide as the widest head's."""
        return self.slots if self.compacted else self.config.expected_max_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffer for states of this shape, dtype and device."""
        self.config.check_head_dim(key_states.shape[-1])
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.group is not None:
            self.buffer = self.group.allocate(self, key_states, value_states)
        else:
            self.buffer = WeightedTokens.empty(key_states, value_states, self.slots)
        self.buffer.refresh(0, self.slots)
        # What was tried by hand before has other rows and heads.
        for name in (*STATES, "hand_sketches", "replay_hand"):
            setattr(self, name, None)
        for name, state in self.new_states(key_states, value_states).items():
            setattr(self, name, state if self.group is None else self.group.state(self, name, key_states, value_states))
        self.is_initialized = True

    def new_states(self, keys: torch.Tensor, values: torch.Tensor, copies: int = 1) -> dict[str, HeadState]:
        """What the modules that are on remember, empty, for heads like those of `keys` and `copies` times as many rows."""
        config = self.config
        batch, heads, device = keys.shape[0] * copies, keys.shape[1], keys.device
        states: dict[str, HeadState] = {}
        if config.sketch_budget or config.replay_budget:
            states["originals"] = Originals.empty(keys, values, config.original_slots, copies)
        if config.replay_budget:
            states["replay_state"] = ReplayState.empty(batch, heads, config.replay_budget, device)
        if config.enable_position_calibration:
            states["calibration"] = CalibrationState.empty(batch, heads, config.calibration_window, device)
        if config.enable_adaptive_controller:
            states["controller"] = ControllerState.empty(batch, heads, device)
        return states

    def get_seq_length(self) -> int:
        """Tokens seen, held or not."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: a stream has no maximum length."""
        return -1

    get_max_cache_shape = get_max_length

    def _length_before(self, new: int) -> int:
        """Slots in use when `new` tokens are appended: fewer than now where they make a compaction necessary."""
        if self.will_compact(new):
            return self.resting_length
        return self.length

    def of_row(self, row: int) -> tuple[ADMSLayer, int]:
        """The layer that holds a row's state, and which of its rows that is."""
        return self, row

    def row_lengths(self, new: int = 0, counts: list[int] | None = None) -> list[int]:
        """Slots each row uses (one number for all), after the compaction that `new` more tokens make necessary."""
        return [self._length_before(new)]

    def will_compact(self, new: int) -> bool:
        """Whether `new` more tokens make a compaction necessary."""
        return self.length + new > self.capacity and self._can_compact

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that the next `query_length` queries will see.

        The offset puts the held tokens right before the new ones, so that a plain causal mask is right for them.
        """
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        before = self._length_before(new)
        return before + new, self.seen - before

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, arrival: Arrival | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values to attend to.

        Args:
            key_states: `[batch, kv_heads, tokens, head_dim]`, rotated.
            value_states: `[batch, kv_heads, tokens, value_dim]`.
            arrival: positions and padding; None for plain tokens that follow the last.

        Returns:
            `(keys, values)` in the dtypes given: what is held has those of the first pass, which may have been others.

        Raises:
            NonFiniteError: NaN or infinity among them, or too large for the dtype held; nothing has changed.
            ValueError: a batch, head count or dimension other than the tokens held have; nothing has changed.
            RuntimeError: the model this cache was enabled on no longer shows its queries; nothing has changed.
        """
        with unrecorded():
            held = (key_states, value_states)
            if self.is_initialized:
                held = (key_states.to(self.buffer.keys.dtype), value_states.to(self.buffer.values.dtype))
            keys, values = self._append(*held, arrival)
            keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # What is kept is cut off from autograd and written in place later. Gradients reach the pass's own tokens only:
            # through copies.
            keys, values = self._with_new(keys, key_states), self._with_new(values, value_states)
        if self.wired:
            self._unanswered = True
            keys.adms_layer = self
        return keys, values

    def _append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, arrival: Arrival | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self.make_room(new)
        self._undo = (self.length, self.seen, self.query_count, self.query_folded)
        self._sealed, self._saved = False, None
        start, seen, self.length, self.seen = self.length, self.seen, self.length + new, self.seen + new
        positions = arrival.positions if arrival is not None else None
        if positions is None:
            positions = torch.arange(seen, self.seen, device=key_states.device)[None]
        positions = positions[:, None, :]
        if self.length <= self.capacity:
            # The bookkeeping of slots not yet used is that of untouched tokens: only what differs is written.
            self.buffer.append(start, key_states, value_states, positions)
            keys, values = self.keys, self.values
        else:
            tokens = WeightedTokens.new(key_states, value_states, positions)
            self.overflow = concatenate([self.buffer.slice(0, start), tokens])
            keys, values = self.overflow.keys, self.overflow.values
            if not self.wired:
                keys, values = keys.clone(), values.clone()
                self.compact()
        return keys, values

    def _with_new(self, held: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What is attended to, with the new tokens' states themselves where it has copies of them."""
        return torch.cat([held[:, :, : held.shape[2] - states.shape[2]], states], dim=2)

    def make_room(self, new: int) -> None:
        """Compact, with all layers of the group, where `new` more tokens would not fit; what is unsettled is settled first.

        Called for every layer before a forward pass, and again by `update`, where there is nothing left to do.
        """
        self.accept()
        if self.will_compact(new):
            if self.group is not None and self.group.ready:
                self.group.compact()
            else:
                self.compact()

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self._cut:
            raise RuntimeError(
                "the newest tokens were to be removed by assigning keys, but tokens were compacted already: the cache can't "
                "go on. Ask one question with a cache (a copy.deepcopy of one that read the text), or call cache.reset()"
            )
        too_many = self.length + key_states.shape[2] > self.capacity
        if self._unanswered and (self.compacted or too_many):
            raise RuntimeError(
                "the cache was made by enable_adms_llm, but the model's attention does not show it its queries: the model "
                "is not (or no longer) enabled. Call enable_adms_llm(model, ...) again and use the cache it returns"
            )
        if self.is_initialized:
            batch, heads, _, dim = self.buffer.keys.shape
            expected = (batch, heads, dim, self.buffer.values.shape[-1])
            got = (*key_states.shape[:2], key_states.shape[-1], value_states.shape[-1])
            if got != expected:
                raise ValueError(
                    f"key_states, value_states of (batch, kv_heads, head_dim, value_dim)={got} do not fit the cache, "
                    f"which holds {expected}; use a new cache or cache.reset()"
                )
        # On an accelerator a check here would wait for the device in every layer: the cache asks once, after the forward.
        if key_states.device.type == "cpu":
            for name, states in (("key_states", key_states), ("value_states", value_states)):
                if not bool(torch.isfinite(states).all()):
                    raise NonFiniteError(f"{name} hold NaN or infinity in {states.dtype}: the cache takes finite numbers")

    # -- what the attention function asks ------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """True while nothing was compacted and nothing padded: attention is then the model's own, to the bit."""
        return not self.compacted

    @unrecorded()
    def attention_bias(self, new: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """Log-mass, causality among the new tokens and padding as one additive mask.

        Returns:
            `[batch, kv_heads * groups, new, tokens]` in `dtype`; half the smallest number where nothing is to be seen.
        """
        # Half: with a negative logit the smallest float16 overflows, and a row of padding that sees nothing becomes NaN.
        lowest = torch.finfo(dtype).min / 2

        def row(beta: torch.Tensor) -> torch.Tensor:
            batch, heads, tokens = beta.shape
            beta = beta.to(dtype).clamp_min(lowest)[:, :, None, None]
            return beta.expand(batch, heads, groups, 1, tokens).reshape(batch, heads * groups, 1, tokens).contiguous()

        if self.overflow is not None:
            bias = row(self.overflow.beta)
        else:
            # Between two compactions log-masses stay, so the row is made once, as long as the buffer.
            if self._bias is None or self._bias.dtype != dtype:
                self._bias = row(self.buffer.beta)
            bias = self._bias[..., : self.length]
        if new == 1:
            return bias
        tokens = bias.shape[-1]
        bias = bias.expand(-1, -1, new, -1)
        hidden = torch.ones(new, new, dtype=torch.bool, device=bias.device).triu(1)
        return torch.cat([bias[..., : tokens - new], bias[..., tokens - new :].masked_fill(hidden, lowest)], dim=-1)

    @unrecorded()
    def observe(self, query: torch.Tensor, scale: float, softcap: float | None = None) -> None:
        """Take note of the queries that attended to what `update` returned, then compact if that was too much.

        Args:
            query: `[batch, kv_heads * groups, tokens, head_dim]`, rotated.
            scale: what the logits were multiplied by.
        """
        self._unanswered = False
        self.query_scale, self.query_softcap = scale, softcap
        self.queries_seen = True
        batch, heads = self.buffer.keys.shape[:2]
        new = query.shape[2]
        states = query.detach().view(batch, heads, query.shape[1] // heads, new, query.shape[-1]).to(self.dtype)
        if self.record_past:
            self._waiting = states
        else:
            self._take(states)

    def _take(self, states: torch.Tensor) -> None:
        """Score by the queries of the newest tokens `[batch, kv_heads, groups, new, head_dim]`; compact what is too much."""
        if self.overflow is not None:
            if self.config.middle_allocation:
                self._observe_prefill(states, self.overflow)
            self.compact()
        elif self.config.middle_allocation:
            self._store_queries(states)

    def activate_past_recording(self) -> None:
        """From now on a pass counts (is scored, and compacted) only with the next `crop`, which may take tokens of it back,
        or the next pass: transformers calls this where tokens are tried out (assisted generation)."""
        self.record_past = True

    @property
    def waits(self) -> bool:
        """Whether a pass has yet to be settled."""
        return self._waiting is not None

    def accept(self) -> None:
        """What a pass brought while past was recorded stays: score by its queries, and compact what is too much."""
        if self._waiting is not None:
            states, self._waiting, self._undo = self._waiting, None, None
            with unrecorded():
                self._take(states)

    def _store_queries(self, states: torch.Tensor) -> None:
        new = states.shape[3]
        slots = self.config.query_slots
        self._allocate_queries(states)
        if self.query_count + new > slots:
            self._save()
            self._fold_stored(self.length - new)
            if new >= slots:
                self._fold(self._queries(states), self.held)
                self._keep_queries(0)
                self._append_queries(states[:, :, :, -slots:])
                self.query_folded = self.query_count
                return
            self._keep_queries(slots - max(new, self.config.compression_interval))
        self._append_queries(states)

    def _save(self) -> None:
        """Keep what folding and moving queries changes, so that a failed forward pass can be taken back."""
        if self._undo is None or self._saved is not None:
            return
        length, _, count, _ = self._undo
        self._saved = {name: getattr(self.buffer, name)[:, :, :length].clone() for name in ("score", "mass", "square")}
        self._saved["query_buffer"] = self.query_buffer[:, :, :, :count].clone()

    def _restore(self) -> None:
        if self._saved is None:
            return
        for name in ("score", "mass", "square"):
            getattr(self.buffer, name)[:, :, : self.length] = self._saved[name]
        self.query_buffer[:, :, :, : self.query_count] = self._saved["query_buffer"]
        self._saved = None

    def _allocate_queries(self, states: torch.Tensor) -> None:
        if self.query_buffer is None:
            shape = (*states.shape[:3], self.config.query_slots, states.shape[-1])
            if self.group is not None:
                self.query_buffer = self.group.query_buffer(self, shape, states)
            else:
                self.query_buffer = states.new_zeros(shape)

    def _append_queries(self, states: torch.Tensor) -> None:
        start, self.query_count = self.query_count, self.query_count + states.shape[3]
        self.query_buffer[:, :, :, start : self.query_count] = states

    def _keep_queries(self, keep: int) -> None:
        # None kept: they stay where they are until new ones take their place, for `newest_queries`.
        if keep:
            self.query_last = 0
        elif self.query_count:
            self.query_last = self.query_count
        keep = min(keep, self.query_count)
        first = self.query_count - keep
        if first and keep:
            self.query_buffer[:, :, :, :keep] = self.query_buffer[:, :, :, first : self.query_count].clone()
        self.query_count = keep
        self.query_folded = max(0, self.query_folded - first)

    def stored_queries(self, start: int) -> Queries | None:
        """The queries stored since the last compaction (and a fit's window before), from number `start` on; None without."""
        if self.query_buffer is None or self.query_count <= start:
            return None
        return self._queries(self.query_buffer[:, :, :, start : self.query_count])

    @property
    def query_slots_used(self) -> int:
        """Slots of the query buffer that hold any, those from before the last compaction included."""
        return max(self.query_count, self.query_last)

    def newest_queries(self) -> Queries | None:
        """The newest queries there still are, at most `recent_size`; None without. The last belongs to the newest token."""
        if not self.query_slots_used:
            return None
        states = self.query_buffer[:, :, :, : self.query_slots_used]
        if self.query_last > self.query_count:
            states = states.roll(-self.query_count, dims=3)
        return self._queries(states).last(self.config.recent_size)

    def _queries(self, states: torch.Tensor) -> Queries:
        return Queries(states, self.query_scale, self.query_softcap)

    def _fold(self, queries: Queries, held: WeightedTokens, step: int = 1) -> None:
        # Of the queries since the last compaction all are scored: every second was measured to be worse.
        if held.length:
            with self._timed():
                mass, square = attention_statistics(queries.every(step), held.keys, held.beta)
                self.compressor.remember(held, mass, square, queries.window)

    def _fold_stored(self, length: int) -> None:
        """Fold the queries not folded yet; the newest of them belongs to the token in slot `length - 1`."""
        queries = self.stored_queries(self.query_folded)
        if queries is not None:
            self._fold(queries, self.buffer.slice(0, length))
        self.query_folded = self.query_count

    def _observe_prefill(self, states: torch.Tensor, held: WeightedTokens) -> None:
        new = states.shape[3]
        before = held.length - new
        waiting = self.stored_queries(self.query_folded)
        if waiting is not None:
            self._fold(waiting, held.slice(0, before))
        window = self.config.attention_window
        # Blocks are counted from the newest query.
        for stop in range((new - 1) % window + 1, new + 1, window):
            part = self._queries(states[:, :, :, max(0, stop - window) : stop])
            self._fold(part, held.slice(0, before + stop), 1 if stop == new else _PREFILL_STEP)
        self._keep_queries(0)
        self._allocate_queries(states)
        self._append_queries(states[:, :, :, -min(new, self.config.query_slots) :])
        self.query_folded = self.query_count

    # -- compaction ------------------------------------------------------------------------------------------------------

    @unrecorded()
    def compact(self, width: int | None = None) -> None:
        """Reduce the middle to its budget; sinks and recent window stay. Nothing happens while the middle fits.

        Args:
            width: slots the middle has from now on, where budgets move between layers; None for as many as now.
        """
        self._compacting = True
        with self._timed():
            source = self.overflow
            if source is None:
                self._fold_stored(self.length)
                source = self.held
            sinks, recent = self.config.dynamic_start_size, self.config.recent_size
            width = self.width if width is None else width
            first, last = sinks, source.length - recent
            if self._can_compact:
                self._forget_mass(source)
                if last - first <= width:
                    # The widest head may keep more than there is: unused slots stand for what it can't fill.
                    spare = WeightedTokens.empty(source.keys, source.values, width + 1 - (last - first))
                    source = concatenate([source.slice(0, last), spare, source.slice(last, source.length)])
                    last += spare.length
                measured = self._output_before(source)
                middle = self._compacted_middle(source, first, last, width) if width else None
                if middle is None:
                    self._count(source.slice(first, last), None)
                recents = source.slice(last, source.length).map(torch.clone)
                recents.tier.fill_(RECENT)
                self.rounds += 1
                if width != self.width:
                    self.width = width
                    self.buffer = WeightedTokens.empty(source.keys, source.values, self.slots, exact=source.exact)
                if source.keys.data_ptr() != self.buffer.keys.data_ptr():
                    self.buffer.write(0, source.slice(0, first))
                if middle is not None:
                    self.buffer.write(first, middle)
                self.buffer.write(first + width, recents)
                self.buffer.tier[:, :, :first] = SINK
                self.length = first + width + recent
                self.buffer.refresh(self.length, self.slots)
                self.compacted = True
                if measured is not None:
                    self._measure(*measured)
            elif self.overflow is not None:
                self.buffer.write(0, source)
                self.length = source.length
            self._sealed = self.overflow is not None
            self.overflow = None
            self._bias = None
            needed = self.config.attention_window if self.compressor.needs_queries else 0
            if self.query_buffer is not None:
                self._keep_queries(needed)
        self._compacting = False

    def _forget_mass(self, source: WeightedTokens) -> None:
        """Past the trained length, let what tokens weigh beyond themselves fade by `mass_decay` each 64 tokens, in place."""
        if self.limit is None or self.seen <= self.limit or not self.compacted or self.config.mass_decay == 1:
            return
        share = self.config.mass_decay ** ((source.length - self.resting_length) / 64)
        # log(1 + (exp(beta) - 1) * share), which no log-mass overflows.
        lighten(source, lambda beta: beta + torch.log(share + (1 - share) * torch.exp(-beta)))

    def _output_before(self, source: WeightedTokens) -> tuple[Queries, torch.Tensor, torch.Tensor] | None:
        """For the controller, where this compaction is measured: queries, their output, the middle's attention mass."""
        due = self.rounds < _MEASURED_FIRST or self.rounds % _MEASURED_EVERY == 0
        queries = self.stored_queries(0) if self.controller is not None and due else None
        if queries is None:
            return None
        queries = queries.last(self.config.recent_size).every(QUERY_STEP)
        first, last = self.config.dynamic_start_size, source.length - self.config.recent_size
        mass = source.slice(first, last).mass.sum(-1)
        return queries, attention_output(queries, source), mass

    def _measure(self, queries: Queries, before: torch.Tensor, mass: torch.Tensor) -> None:
        energy = reconstruction_energy(before, attention_output(queries, self.held))
        update_controller(self.controller, energy, mass, self.config.controller_gain)

    def _compacted_middle(self, source: WeightedTokens, first: int, last: int, width: int) -> WeightedTokens:
        tokens = source.slice(first, last)
        config = self.config
        budget, least = self._budget(tokens, width)
        if self.originals is None:
            kept, _ = self.compressed(source, tokens, first, width, budget, least)
            kept, moved = place_made_tokens(self, kept)
            if moved:
                order = torch.where(kept.valid, kept.pos, torch.inf).argsort(dim=2, stable=True)
                kept = kept.gather(order)
        else:
            precision = width - config.sketch_budget - config.replay_budget
            kept = compress_with_originals(self, source, tokens, first, precision, budget, least)
        self._count(tokens, kept)
        return kept

    def compressed(
        self,
        source: WeightedTokens,
        tokens: WeightedTokens,
        first: int,
        width: int,
        budget: torch.Tensor | None,
        least: int,
    ) -> tuple[WeightedTokens, torch.Tensor | None]:
        """The exact and precision tiers made of `tokens`.

        Args:
            source: everything the heads hold, the tokens in place of the middle.
            tokens: the candidates; slots with `beta = -inf` are none.
            first: index in `source` of the first of them.
            width: slots to return; budget: tokens each head may keep, None for `width`; least: the fewest any head may.

        Returns:
            `(kept, assigned)`: `width` slots in the order of the stream, and which of them each token went to (None where
            the compressor does not tell).
        """
        config = self.config
        worth = importance(tokens, config.importance_metric, config.attention_blend, self.queries_seen)
        exact = max(config.min_importance_tokens, round(config.importance_ratio * width))
        if tokens.length < config.min_middle_size_for_compress:
            exact = width
        exact = min(exact, width)
        spread = spread_over_segments(
            worth, tokens.valid, tokens.pos, exact, config.coverage_segments, config.coverage_priority
        )
        exact_budget = None
        if budget is not None:
            exact_budget = (budget.float() * (exact / width)).round().long()
            exact_budget = exact_budget.clamp_min(min(config.min_importance_tokens, least))
        index, picked = top_slots(spread, tokens.valid, exact, exact_budget)
        pinned = torch.zeros_like(tokens.valid).scatter(2, index, picked)
        # Older queries came before some of the candidates: only those of the recent window have seen them all.
        queries = self.stored_queries(0)
        reference = Reference(
            weight=worth.clamp_min(0),
            mass=tokens.mass,
            pinned=pinned,
            queries=None if queries is None else queries.last(config.recent_size),
            context=source,
            start=first,
            log_mass=self.wired and self.queries_seen,
        )
        kept = self.compressor.compress(tokens, reference, width, budget, least)
        check_made(type(self.compressor).__name__, kept, reference, tokens, width, budget)
        return kept, reference.assigned

    def _budget(self, tokens: WeightedTokens, width: int) -> tuple[torch.Tensor | None, int]:
        """Tokens each head's precision tier may keep `[batch, kv_heads]` (None: all the same), and the fewest any may."""
        config = self.config
        precision = width - config.sketch_budget - config.replay_budget
        if self.planned is not None:
            budgets, least = self.planned
            self._adjust(budgets[:, None].expand(tokens.beta.shape[:2]))
            return self.controller.budgets, least
        if self.controller is not None and config.controller_scope == "layer":
            floor, ceiling = config.controller_energy_floor, config.controller_energy_ceiling
            base = config.compressed_budget
            self._adjust(head_budgets(self.controller, base, floor, ceiling, config.controller_group_size))
            return self.controller.budgets, min(1, base)
        if not config.use_adaptive_budget:
            return None, precision
        variance = middle_variance(tokens.keys, tokens.values, tokens.valid)
        if self.variance_ema is None:
            self.variance_ema = variance
        else:
            self.variance_ema = self.variance_ema.lerp(variance, config.adaptive_variance_smoothing)
        least = max(1, int(config.compressed_budget * config.adaptive_budget_floor))
        self.budgets = share_budget(self.variance_ema, config.compressed_budget, least, precision)
        return self.budgets, least

    def _adjust(self, budgets: torch.Tensor) -> None:
        """Put the controller's budgets `[batch, kv_heads]` in force."""
        before = torch.where(self.controller.budgets == 0, self.config.compressed_budget, self.controller.budgets)
        self.adjustments = self.adjustments + (before != budgets).sum()
        self.controller.budgets.copy_(budgets)

    def _count(self, before: WeightedTokens, after: WeightedTokens | None) -> None:
        batch, heads = before.beta.shape[:2]
        self.compressions += batch * heads
        left = before.valid.sum()
        if after is not None:
            self.kept_exact = self.kept_exact + (after.tier == EXACT).sum()
            self.kept_compressed = self.kept_compressed + (after.tier == PRECISION).sum()
            if self.config.sketch_budget:
                self.kept_sketches = self.kept_sketches + (after.tier == SKETCH).sum()
            left = left - after.valid.sum()
        self.dropped = self.dropped + left

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        if not self.profile or self._timing:
            yield
            return
        self._timing = True
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.compaction_seconds += time.perf_counter() - start
            self._timing = False

    def _synchronize(self) -> None:
        if self.buffer is not None and self.device.type != "cpu":
            torch.get_device_module(self.device.type).synchronize(self.device)

    # -- positions ---------------------------------------------------------------------------------------------------------

    @unrecorded()
    def move_window(self, shift: torch.Tensor) -> None:
        """Move each row's tokens `shift [batch]` positions back (0: not at all), in place.

        What would come before its own slot's number, counted from the first sink, stays there: sinks do not move, the middle
        closes up in its order, and the recent window keeps its distances as long as `shift` leaves the newest token at a
        position that is no less than its slot.

        A log-mass was made for the distances at which the queries were: from another one a token that stands for thousands
        may draw nearly everything. So none that weighs more than itself draws more of the newest queries than before.
        """
        if not self.is_initialized:
            return
        shift = shift.to(self.device)
        self._keep_exact()
        by = shift.view(-1, 1, 1).to(torch.float32)
        held = self.buffer.slice(0, self.length)
        slots = torch.arange(self.length, device=self.device, dtype=torch.float32)
        queries = self.newest_queries() if self._turns and self.compacted else None
        before = None if queries is None else attention_logits(queries, held.keys, held.beta)
        self._move(held, torch.where(by > 0, torch.maximum(held.pos - by, slots), held.pos))
        self._move_states(by)
        self._move_queries(shift)
        if before is not None:
            after = attention_logits(self.newest_queries(), held.keys, held.beta)
            less = less_drawn(before, after)
            lighten(held, lambda beta: beta - less)
            self._bias = None

    @property
    def _turns(self) -> bool:
        return self.rope is not None and self.rope.rotates

    def _move_states(self, by: torch.Tensor) -> None:
        """Move what the modules remember of positions; `by [batch, 1, 1]`."""
        if self.originals is not None:
            least = float(self.config.dynamic_start_size)
            pos = self.originals.pos
            self._move(self.originals, torch.where(by > 0, (pos - by).clamp_min(least), pos))
        if self.calibration is not None:
            for positions in (self.calibration.synthetic, self.calibration.true):
                positions.sub_(by * self.calibration.valid)

    def _move_queries(self, shift: torch.Tensor) -> None:
        if self._turns and self.query_slots_used:
            states = self.query_buffer[:, :, :, : self.query_slots_used]
            states.copy_(self.rope.shift(states, -shift.view(-1, 1, 1, 1)))

    def _move(self, tokens: WeightedTokens | Originals, pos: torch.Tensor) -> None:
        """Rotate the keys to `pos [batch, kv_heads, tokens]`, in place; from where they were exact, if that is kept."""
        if self._turns:
            keys, at = (tokens.exact_keys, tokens.exact_pos) if tokens.exact else (tokens.keys, tokens.pos)
            tokens.keys.copy_(torch.where((pos == at)[..., None], keys, self.rope.move(keys, at, pos)))
        tokens.pos.copy_(pos)

    def _keep_exact(self) -> None:
        """From now on keep half-precision keys as they are before any move, where moves turn them."""
        if not self._turns or self.dtype.itemsize >= 4:
            return
        if self.buffer.exact and (self.originals is None or self.originals.exact):
            return
        if self.group is not None:
            self.group.keep_exact()
            return
        self.buffer = self.buffer.with_exact()
        if self.originals is not None:
            self.originals = self.originals.with_exact()

    # -- rows and ends ---------------------------------------------------------------------------------------------------

    @unrecorded()
    def roll_back(self) -> bool:
        """Take back the last `update`, as if it had never been; False where it can't be: it was compacted already, or the
        failure came in the middle of a compaction."""
        self._unanswered = False
        self._waiting = None
        if self._compacting or (self.group is not None and self.group.compacting):
            return False
        if self._undo is None:
            return True
        if self._sealed:
            return False
        self.overflow = None
        end = self.length
        self._go_back(*self._undo)
        self._restore()
        self._reuse(self.length, end)
        self._undo = None
        return True

    def _go_back(self, length: int, seen: int, query_count: int, query_folded: int) -> None:
        if self.query_count != query_count:
            self.query_last = 0  # New queries took the place of some of them.
        self.length, self.seen, self.query_count, self.query_folded = length, seen, query_count, query_folded

    def _reuse(self, start: int, stop: int) -> None:
        """The slots from `start` to `stop` are free again."""
        self.buffer.refresh(start, min(stop, self.slots))
        self._bias = None

    def newest_are_bad(self) -> torch.Tensor:
        """Whether what the last `update` appended and still is in the recent window has NaN or infinity, a bool scalar."""
        new = min(self.seen - self._undo[1], self.length) if self._undo is not None else 0
        start = self.length - new
        return ~(self.keys[:, :, start:].isfinite().all() & self.values[:, :, start:].isfinite().all())

    def settle(self) -> None:
        """The forward pass is over: what it appended stays."""
        self._undo = self._saved = None

    @unrecorded()
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a negative number, as transformers passes it; 0 settles the rest).

        Only tokens still held exactly can be removed: all of them before the first compaction, the recent window and what
        came after it later, and all of the last pass where past is recorded. Raises `ValueError` for more, before anything
        has changed.
        """
        if tokens_to_remove > 0:
            # Releases before 5.10 give the length to keep.
            tokens_to_remove = -max(0, self.seen - tokens_to_remove)
        gone = -tokens_to_remove
        if not self.is_initialized:
            return
        self.check_crop(gone)
        if gone:
            self._remove(gone)
        self.accept()

    def check_crop(self, gone: int) -> None:
        """Raise `ValueError` where the last `gone` tokens can't be removed."""
        if gone > self.loose:
            raise ValueError(
                f"crop({-gone}) asks for more than the last {self.loose} tokens, "
                "which are all that is held exactly; what was compacted can't be rolled back"
            )

    @property
    def loose(self) -> int:
        """The newest tokens that are held one by one: before the first compaction all of them."""
        return self.length - (self.config.dynamic_start_size + self.width if self.compacted else 0)

    def _remove(self, gone: int) -> None:
        waiting = 0 if self._waiting is None else self._waiting.shape[3]
        self.length -= gone
        self.seen -= gone
        if self.overflow is not None:
            # Nothing of the pass was written yet.
            whole, self.overflow = self.overflow, None
            start = whole.length - waiting
            if self.length > self.capacity:
                self.overflow = whole.slice(0, self.length)
            elif self.length > start:
                self.buffer.write(start, whole.slice(start, self.length))
        self._reuse(self.length, self.length + gone)
        if gone < waiting:
            self._waiting = self._waiting[:, :, :, : waiting - gone]
        elif waiting:
            self._waiting, gone = None, gone - waiting
        if self._waiting is None:
            self._remove_queries(gone)

    def _remove_queries(self, gone: int) -> None:
        # What came before a compaction is still there only where nothing has taken its place.
        self.query_last = 0 if self.query_count else max(0, self.query_last - gone)
        self.query_count = max(0, self.query_count - gone)
        self.query_folded = min(self.query_folded, self.query_count)

    def drop_queries(self, gone: set[int], known: float) -> list[bool]:
        """Count the queries without those of tokens of the ages `gone`, and those of tokens `known` or more old.

        Returns:
            Which of the slots in use hold queries that stay; the caller moves these to the front.
        """
        count, used = self.query_count, self.query_slots_used
        # Behind the newest queries lie those from before the last compaction (see `newest_queries`).
        ages = (*range(count - 1, -1, -1), *range(used - 1, count - 1, -1))
        stay = [age < known and age not in gone for age in ages]
        self.query_folded, self.query_count = sum(stay[: self.query_folded]), sum(stay[:count])
        self.query_last = min(self.query_last, sum(stay))
        return stay

    def reset(self) -> None:
        """Forget everything, as a new layer."""
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: what its group holds for it comes with the group, see `LayerGroup.__setstate__`."""
        own = {name: value for name, value in vars(self).items() if self.group is None or not self.group.holds(self, name)}
        return {name: map_tensors(value, in_own_storage) for name, value in own.items()} | {"_bias": None}

    @unrecorded()
    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor], leave: tuple[str, ...] = ()) -> None:
        """Replace everything that is there by row, but what `leave` names, by `function` of it."""
        for name in ROWS:
            if name not in leave:
                setattr(self, name, map_tensors(getattr(self, name), function))
        self._bias = None

    def take_rows(self, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Keep the rows that `chosen` gives, in its order, of all their numbers; a member leaves its group."""
        if self.is_initialized:
            self.group = None
            rows = chosen(torch.arange(self.buffer.keys.shape[0], device=self.device))
            self.map_rows(lambda tensor: tensor.index_select(0, rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        self.take_rows(rows_at(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        self.take_rows(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`."""
        self.take_rows(rows_at(indices))

    def offload(self) -> None:
        """Not supported: the cache is bounded, and its memory fits by choosing the budgets."""
        raise NotImplementedError("ADMSKVCache does not offload its layers; choose budgets with ADMSConfig.from_memory")

    prefetch = offload

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the layer holds."""
        total = 0 if self.buffer is None else self.buffer.nbytes
        return total + self.query_nbytes + self.state_nbytes + self.original_nbytes

    @property
    def original_nbytes(self) -> int:
        """Bytes of the originals kept outside the attended set."""
        return 0 if self.originals is None else self.originals.nbytes

    @property
    def state_nbytes(self) -> int:
        """Bytes of what the modules remember beside the originals."""
        states = [getattr(self, name) for name in STATES if name != "originals"]
        return sum(state.nbytes for state in states if state is not None)

    @property
    def query_nbytes(self) -> int:
        """Bytes of the stored queries."""
        return 0 if self.query_buffer is None else self.query_buffer.numel() * self.query_buffer.element_size()

    def held_tokens(self) -> torch.Tensor:
        """Tokens held per row, averaged over the heads, float32 `[batch]`."""
        if self.buffer is None:
            return torch.zeros(1, dtype=torch.float32)
        return self.held.valid.sum(-1).float().mean(-1)
