"""Rows of different length: a padded batch, in which every row is held and compacted as it would be alone.

Rows that have seen equally many tokens form a cohort, whose state (lengths, originals, budgets) is an `ADMSLayer` of its own
without padding. What attention reads, and what every token adds to, is shared: one buffer and one store of queries for all
rows. A cohort borrows its rows of them when it is scored or compacted, and gives them back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from .autograd import unrecorded
from .layer import COUNTS, ADMSLayer, Arrival
from .padding import MaskChange
from .tokens import RECENT, WeightedTokens, concatenate


@dataclass
class Cohort:
    """Rows at the same point of their streams.

    Attributes:
        rows: which rows of the batch.
        part: their state; it has a buffer and queries only while these are lent to it.
    """

    rows: list[int]
    part: ADMSLayer


class PaddedLayer(ADMSLayer):
    """A layer whose rows differ in length.

    While all fits, padding keeps its slots: attention and masks are then the model's own. Then the rows are aligned: the
    tokens of each lie from slot 0 on, padding is gone, and a row's free slots have `beta = -inf`.

    Args:
        layer: what was used until now; it becomes the first cohort.
        batch: rows.
    """

    KEPT = (*ADMSLayer.KEPT, "cohorts", "aligned", "tail", "real", "offsets", "query_offsets")
    TRANSIENT = (*ADMSLayer.TRANSIENT, "_new_real", "_new_counts", "_starts", "_masked", "_undo_parts")

    def __init__(self, layer: ADMSLayer, batch: int):
        super().__init__(layer.config, layer.wired)
        layer.accept()
        self.rope, self.limit = layer.rope, layer.limit
        self.profile, self.compaction_seconds = layer.profile, layer.compaction_seconds
        self.record_past, self.seen, self.length = layer.record_past, layer.seen, layer.length
        self.query_scale, self.query_softcap, self.queries_seen = layer.query_scale, layer.query_softcap, layer.queries_seen
        layer.group = None
        layer.record_past = False
        self.buffer, self.query_buffer = layer.buffer, layer.query_buffer
        layer.buffer = layer.query_buffer = None
        self.cohorts = [Cohort(list(range(batch)), layer)]
        self._collect(layer)
        self.is_initialized = layer.is_initialized
        if self.is_initialized:
            self.dtype, self.device = layer.dtype, layer.device
            self._start_rows(batch)
            self.real[:, : self.length] = True
            if layer.compacted:
                self.align()

    def _forget(self) -> None:
        super()._forget()
        self.cohorts: list[Cohort] = []
        self.aligned = False
        self.real: torch.Tensor | None = None
        self.offsets: torch.Tensor | None = None
        self.query_offsets: torch.Tensor | None = None
        self.tail = 0
        self._new_real: torch.Tensor | None = None
        self._new_counts: list[int] = []
        self._starts: torch.Tensor | None = None
        self._masked = False
        self._undo_parts: list[tuple] = []

    def _start_rows(self, batch: int) -> None:
        part = self.cohorts[0].part
        self.real = torch.zeros(batch, self.buffer.length, dtype=torch.bool, device=self.device)
        self.offsets = torch.full((batch,), part.length, dtype=torch.int64, device=self.device)
        self.query_offsets = torch.full_like(self.offsets, part.query_count)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the shared buffer, and each cohort's state."""
        self.config.check_head_dim(key_states.shape[-1])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffer = WeightedTokens.empty(key_states, value_states, self.slots)
        self.buffer.refresh(0, self.slots)
        for cohort in self.cohorts:
            part, rows = cohort.part, slice(0, len(cohort.rows))
            part.dtype, part.device, part.is_initialized = self.dtype, self.device, True
            for name, state in part.new_states(key_states[rows], value_states[rows]).items():
                setattr(part, name, state)
        self._start_rows(key_states.shape[0])
        self.is_initialized = True

    # -- cohorts ---------------------------------------------------------------------------------------------------------

    def _index(self, cohort: Cohort) -> torch.Tensor:
        return torch.tensor(cohort.rows, device=self.device)

    def split(self, counts: list) -> None:
        """Let rows that are to get different numbers of tokens (or to differ in anything else) be of different cohorts."""
        cohorts = []
        for cohort in self.cohorts:
            wanted: dict[Any, list[int]] = {}
            for place, row in enumerate(cohort.rows):
                wanted.setdefault(counts[row], []).append(place)
            for places in wanted.values():
                if len(wanted) == 1:
                    cohorts.append(cohort)
                else:
                    cohorts.append(Cohort([cohort.rows[place] for place in places], _rows_of(cohort.part, places)))
        self.cohorts = cohorts

    def divide(self, number: int, places: list[list[int]]) -> list[Cohort]:
        """Let rows of a cohort, by their places in it, be cohorts of their own; what was lent to it is theirs then."""
        if not self.aligned:
            self.align()
        whole = self.cohorts[number]
        parts = [whole.part] if len(places) == 1 else [_rows_of(whole.part, own) for own in places]
        divided = [Cohort([whole.rows[at] for at in own], part) for own, part in zip(places, parts, strict=True)]
        self.cohorts[number : number + 1] = divided
        return divided

    def _marks(self) -> torch.Tensor:
        """Which slots are the rows' own, neither free nor padding: bool `[batch, slots]`, with what overflows."""
        if self.overflow is not None:
            before = self.overflow.length - self._new_real.shape[1]
            held = torch.arange(before, device=self.device) < self._starts[:, None]
            return torch.cat([held, self._new_real], dim=1)
        if self.aligned:
            return torch.arange(self.buffer.length, device=self.device) < self.offsets[:, None]
        return self.real[:, : self.length]

    def lend(self, cohort: Cohort) -> ADMSLayer:
        """The cohort's part with its rows' tokens and queries, copied, as a layer that could do without this one."""
        part, index = cohort.part, self._index(cohort)
        whole = self.buffer if self.overflow is None else self.overflow
        order = (~self._marks()[index]).to(torch.int8).argsort(dim=1, stable=True)[:, : part.length]
        tokens = whole.map(lambda tensor: tensor.index_select(0, index))
        tokens = tokens.gather(order[:, None].expand(-1, tokens.beta.shape[1], -1))
        part.buffer = WeightedTokens.empty(tokens.keys, tokens.values, part.slots, exact=tokens.exact)
        part.buffer.refresh(0, part.slots)
        if part.length > part.capacity:
            part.overflow = tokens
        else:
            part.buffer.write(0, tokens)
        if self.query_buffer is not None:
            part.query_buffer = self.query_buffer.index_select(0, index)
        part.query_scale, part.query_softcap, part.queries_seen = self.query_scale, self.query_softcap, self.queries_seen
        part.profile = self.profile
        return part

    def give_back(self, cohort: Cohort) -> None:
        """Write what `lend` gave and the cohort changed."""
        part, index = cohort.part, self._index(cohort)
        if self.aligned:
            self._make_slots(part.slots)
            for name, own in self.buffer.tensors().items():
                own[index, :, : part.length] = part.buffer.field(name)[:, :, : part.length]
            self.offsets[index] = part.length
            self._free_beyond()
        else:
            # Nothing was compacted: only scores changed.
            order = (~self._marks()[index]).to(torch.int8).argsort(dim=1, stable=True)[:, : part.length]
            for name in ("score", "mass", "square"):
                own = getattr(self.buffer, name)
                at = order[:, None].expand(-1, own.shape[1], -1)
                own[index] = own[index].scatter(2, at, getattr(part.buffer, name)[:, :, : part.length])
        if part.query_buffer is not None:
            if self.query_buffer is None:
                self.query_buffer = part.query_buffer.new_zeros(self.offsets.shape[0], *part.query_buffer.shape[1:])
            self.query_buffer[index] = part.query_buffer
        self.query_offsets[index] = part.query_count
        part.buffer = part.overflow = part.query_buffer = part._bias = None
        self._bias = None
        self._collect(part)
        self._agree()

    def _collect(self, part: ADMSLayer) -> None:
        """Take over what a part has counted."""
        for name in (*COUNTS, "compressions", "compaction_seconds"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
            setattr(part, name, 0)

    def _agree(self) -> None:
        """What is asked of the layer as a whole follows from its cohorts."""
        parts = [cohort.part for cohort in self.cohorts]
        self.compacted = any(part.compacted for part in parts)
        self.rounds = max(part.rounds for part in parts)
        self.width = max(part.width for part in parts)
        if self.aligned:
            self.length = max(part.length for part in parts)

    def align(self) -> None:
        """Give every row its tokens from slot 0 on, and padding no slot."""
        lengths = [0] * self.offsets.shape[0]
        for cohort in self.cohorts:
            for row in cohort.rows:
                lengths[row] = cohort.part.length
        order = (~self._marks()).to(torch.int8).argsort(dim=1, stable=True)[:, : max(lengths)]
        tokens = self.buffer.slice(0, self.length).gather(order[:, None].expand(-1, self.buffer.beta.shape[1], -1))
        self.offsets = torch.tensor(lengths, device=self.device)
        self.aligned = True
        self._agree()
        self.buffer = WeightedTokens.empty(tokens.keys, tokens.values, 0, exact=tokens.exact)
        self._make_slots(max(cohort.part.slots for cohort in self.cohorts))
        self.buffer.write(0, tokens)
        self._free_beyond()

    def _make_slots(self, slots: int) -> None:
        """Let the shared buffer have room for rows of so many, and one where writes of padding go."""
        missing = slots + 1 - self.buffer.length
        if missing > 0:
            more = WeightedTokens.empty(self.buffer.keys, self.buffer.values, missing, exact=self.buffer.exact)
            self.buffer = concatenate([self.buffer, more])
            self._free_beyond()

    def _free_beyond(self) -> None:
        """Mark the slots behind each row's last token as free, otherwise ready for an untouched token."""
        free = (torch.arange(self.buffer.length, device=self.device) >= self.offsets[:, None])[:, None]
        for name, value in (("beta", -torch.inf), ("score", 0), ("mass", 0), ("square", 0), ("count", 1), ("tier", RECENT)):
            getattr(self.buffer, name).masked_fill_(free, value)
        self._bias = None

    def of_row(self, row: int) -> tuple[ADMSLayer, int]:
        """The part of the row's cohort, and the row's place in it."""
        for cohort in self.cohorts:
            if row in cohort.rows:
                return cohort.part, cohort.rows.index(row)
        raise ValueError(f"row={row} must be a row of the batch")

    def row_lengths(self, new: int = 0, counts: list[int] | None = None) -> list[int]:
        """Slots each row uses, after the compaction that its new tokens make necessary."""
        lengths = [0] * sum(len(cohort.rows) for cohort in self.cohorts)
        for cohort in self.cohorts:
            for row in cohort.rows:
                lengths[row] = cohort.part._length_before(new if counts is None else counts[row])
        return lengths

    def unpadded(self) -> ADMSLayer:
        """A layer without rows, as new."""
        layer = ADMSLayer(self.config, self.wired)
        layer.rope, layer.limit = self.rope, self.limit
        layer.profile, layer.compaction_seconds = self.profile, self.compaction_seconds
        return layer

    # -- a pass ----------------------------------------------------------------------------------------------------------

    def make_room(self, new: int, counts: list[int] | None = None) -> None:
        """Compact the rows that `counts` more tokens would not fit into; see `ADMSLayer.make_room`."""
        self.accept()
        counts = [new] * sum(len(cohort.rows) for cohort in self.cohorts) if counts is None else counts
        self.split(counts)
        for cohort in self.cohorts:
            if cohort.part.will_compact(counts[cohort.rows[0]]):
                if not self.aligned:
                    self.align()
                self._compacting = True
                self.lend(cohort).compact()
                self.give_back(cohort)
                self._compacting = False

    def _append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, arrival: Arrival | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens, padding excepted; see `ADMSLayer.update`."""
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        arrival = arrival or Arrival()
        batch, _, new, _ = key_states.shape
        counts = arrival.counts or [new] * batch
        self.make_room(new, counts)
        parts = [(cohort.part, counts[cohort.rows[0]]) for cohort in self.cohorts]
        fits = all(part.length + count <= part.capacity for part, count in parts)
        if not self.aligned and (not fits or self.length + new > self.capacity):
            self.align()

        self._starts = self.offsets.clone()
        self._undo = (self.length, self.seen, self.tail, self._starts, self.query_offsets.clone())
        self._undo_parts = [(part, part.length, part.seen, part.query_count, part.query_folded) for part, _ in parts]
        self._sealed, self._saved = False, None
        real = torch.ones(batch, new, dtype=torch.bool, device=self.device)
        if arrival.real is not None:
            real = arrival.real.to(self.device)
        place = real.cumsum(-1)
        positions = arrival.positions
        if positions is None:
            seen = torch.empty_like(self.offsets)
            for cohort in self.cohorts:
                seen[self._index(cohort)] = cohort.part.seen
            positions = seen[:, None] + place - 1
        positions = positions.to(self.device)[:, None, :]
        self._new_real, self._new_counts = real, counts
        self._masked = arrival.masked
        start = self.length
        if not self.aligned:
            self.buffer.append(start, key_states, value_states, positions)
            self.buffer.hide(start, ~real[:, None])
            self.real[:, start : start + new] = real
            self._bias = None
            self.length += new
        elif fits:
            self._scatter(key_states, value_states, positions, real, place, all(count == new for count in counts))
        else:
            tokens = WeightedTokens.new(key_states, value_states, positions)
            tokens = tokens.where_valid(real[:, None].expand(tokens.beta.shape))
            self.overflow = concatenate([self.buffer.slice(0, start), tokens])
        self.seen += new
        self.tail = self.tail + new if arrival.counts is None else arrival.tail
        self.offsets = self.offsets + place[:, -1]
        for part, count in parts:
            part.length += count
            part.seen += count
        if self.aligned:
            self.length = max(part.length for part, _ in parts)
        held = self.overflow
        return (self.keys, self.values) if held is None else (held.keys, held.values)

    def _with_new(self, held: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        if not self.aligned or self.overflow is not None:
            return super()._with_new(held, states)
        # One more slot, which is dropped again, is where padding goes.
        length = held.shape[2]
        at = torch.where(self._new_real, self._starts[:, None] + self._new_real.cumsum(-1) - 1, length)
        wider = torch.nn.functional.pad(held, (0, 0, 0, 1))
        at = at[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
        return wider.scatter(2, at, states)[:, :, :length]

    def _scatter(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor,
        place: torch.Tensor,
        all_real: bool,
    ) -> None:
        """Write each row's new tokens behind its last, padding into the slot that is nobody's."""
        if keys.shape[2] == 1 and all_real:
            rows = torch.arange(keys.shape[0], device=self.device)
            self.buffer.keys[rows, :, self.offsets] = keys[:, :, 0]
            self.buffer.values[rows, :, self.offsets] = values[:, :, 0]
            self.buffer.pos[rows, :, self.offsets] = positions.expand(*keys.shape[:3])[:, :, 0].to(torch.float32)
            self.buffer.beta[rows, :, self.offsets] = 0.0
            if self._bias is not None:
                self._bias[rows, :, :, self.offsets] = 0.0
            return
        nobodys = self.buffer.length - 1
        at = torch.where(real, self.offsets[:, None] + place - 1, nobodys)[:, None].expand(*keys.shape[:3])
        for name, new in (("keys", keys), ("values", values)):
            own = getattr(self.buffer, name)
            own.scatter_(2, at[..., None].expand(new.shape), new.to(own.dtype))
        self.buffer.pos.scatter_(2, at, positions.expand(at.shape).to(torch.float32))
        self.buffer.beta.scatter_(2, at, 0.0)
        self.buffer.beta[:, :, nobodys:] = -torch.inf
        self._bias = None

    @unrecorded()
    def change_mask(self, change: MaskChange, tail: int) -> None:
        """Take the tokens out that a later mask hides; let padding that still has its slots be tokens where it is shown.

        `tail`: how many of the newest columns are real in every row then.
        """
        self.split(list(zip(change.hidden, change.shown, strict=True)))
        batch, heads = self.buffer.beta.shape[:2]
        slots = torch.ones(batch, self.buffer.length, dtype=torch.bool)
        queries = torch.ones(batch, self.config.query_slots, dtype=torch.bool)
        lengths, counts = [0] * batch, [0] * batch
        for cohort in self.cohorts:
            part, hidden, shown = cohort.part, change.hidden[cohort.rows[0]], change.shown[cohort.rows[0]]
            # Before the newest token that is shown there are no queries without a gap.
            stay = torch.tensor(part.drop_queries(set(hidden), min(shown, default=torch.inf)), dtype=torch.bool)
            for row in cohort.rows:
                slots[row, [part.length - 1 - age for age in hidden]] = False
                queries[row, : len(stay)] = stay
                lengths[row], counts[row] = part.length + len(shown) - len(hidden), part.query_count
            part.length, part.seen = lengths[row], part.seen + len(shown) - len(hidden)
        if self.query_buffer is not None:
            order = (~queries).to(torch.int8).argsort(dim=1, stable=True).to(self.device)
            self.query_buffer = self.query_buffer.gather(3, order[:, None, None, :, None].expand(self.query_buffer.shape))
        self.offsets = torch.tensor(lengths, device=self.device)
        self.query_offsets = torch.tensor(counts, device=self.device)
        self.tail = tail
        if self.aligned:
            order = (~slots).to(torch.int8).argsort(dim=1, stable=True).to(self.device)
            self.buffer = self.buffer.gather(order[:, None].expand(-1, heads, -1))
            self._free_beyond()
            self._agree()
            return
        real = change.real.to(self.device)
        fresh = (real & ~self.real[:, : self.length])[:, None]
        for name, value in (("beta", 0), ("score", 0), ("mass", 0), ("square", 0), ("count", 1), ("tier", RECENT)):
            getattr(self.buffer, name)[:, :, : self.length].masked_fill_(fresh, value)
        self.buffer.hide(0, ~real[:, None])
        self.real[:, : self.length] = real
        self._bias = None

    @property
    def plain(self) -> bool:
        """True while padding still has its slots and the model's own mask hides it."""
        return not self.aligned and self._masked

    @unrecorded()
    def attention_bias(self, new: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """As `ADMSLayer.attention_bias`, each row with its own length."""
        lowest = torch.finfo(dtype).min / 2
        empty = any(cohort.part.length == 0 for cohort in self.cohorts)
        if new == 1 and self.overflow is None and not empty:
            return super().attention_bias(new, groups, dtype)
        own, place = self._new_real, self._new_real.cumsum(-1)
        slots = torch.arange(self.length, device=self.device)
        if self.aligned and self.overflow is None:
            beta = self.buffer.beta[:, :, : self.length]
            seen = slots < (self.offsets[:, None] - place[:, -1:] + place)[..., None]
        else:
            beta = (self.overflow or self.held).beta
            causal = torch.ones(new, new, dtype=torch.bool, device=self.device).tril()
            before = self._marks()[:, None, :-new].expand(-1, new, -1)
            seen = torch.cat([before, own[:, None] & causal], dim=-1)
        batch, heads, tokens = beta.shape
        bias = beta.to(dtype).clamp_min(lowest)[:, :, None].masked_fill(~seen[:, None], lowest)
        # Padding before a row's first token sees nothing: it looks at the first slot, for a result that is finite.
        bias[..., :1].masked_fill_(~seen.any(-1)[:, None, :, None], 0.0)
        return bias[:, :, None].expand(-1, -1, groups, -1, -1).reshape(batch, heads * groups, new, tokens)

    def _take(self, states: torch.Tensor) -> None:
        new, counts = states.shape[3], self._new_counts
        if self.overflow is None and not self.config.middle_allocation:
            return
        room = all(cohort.part.query_count + new <= self.config.query_slots for cohort in self.cohorts)
        if self.overflow is None and new == 1 and min(counts) == 1 and room:
            if self.query_buffer is None:
                shape = (*states.shape[:3], self.config.query_slots, states.shape[-1])
                self.query_buffer = states.new_zeros(shape)
            rows = torch.arange(states.shape[0], device=self.device)
            self.query_buffer[rows, :, :, self.query_offsets] = states[:, :, :, 0]
            self.query_offsets = self.query_offsets + 1
            for cohort in self.cohorts:
                cohort.part.query_count += 1
            return
        self._save()
        self._sealed = self.overflow is not None
        order = (~self._new_real).to(torch.int8).argsort(dim=1, stable=True)
        for cohort in self.cohorts:
            count = counts[cohort.rows[0]]
            if not count:
                continue
            index = self._index(cohort)
            at = order[index, None, None, :count, None].expand(-1, *states.shape[1:3], -1, states.shape[-1])
            self.lend(cohort)._take(states[index].gather(3, at))
            self.give_back(cohort)
        self.overflow = None
        self._agree()

    @unrecorded()
    def roll_back(self) -> bool:
        """Take back the last `update`; see `ADMSLayer.roll_back`."""
        self._unanswered = False
        self._waiting = None
        if self._undo is None:
            return True
        if self._sealed or self._compacting:
            return False
        self.overflow = None
        self.length, self.seen, self.tail, self.offsets, self.query_offsets = self._undo
        for part, *numbers in self._undo_parts:
            part._go_back(*numbers)
        if self._saved is not None:
            for name, tensor in self._saved.items():
                if name == "query_buffer":
                    self.query_buffer = tensor
                else:
                    getattr(self.buffer, name).copy_(tensor)
        self._clear()
        self._undo = self._saved = None
        return True

    def _save(self) -> None:
        if self._undo is None or self._saved is not None:
            return
        self._saved = {name: getattr(self.buffer, name).clone() for name in ("score", "mass", "square")}
        self._saved["query_buffer"] = None if self.query_buffer is None else self.query_buffer.clone()

    def _clear(self) -> None:
        """What lies behind the last tokens is free."""
        if self.aligned:
            self._free_beyond()
            # What a failed pass left there must be finite: attention weighs free slots with 0, which does not undo NaN.
            free = torch.arange(self.buffer.length, device=self.device) >= self.offsets[:, None]
            for states in (self.buffer.keys, self.buffer.values):
                states.masked_fill_(free[:, None, :, None], 0)
        else:
            self.buffer.refresh(self.length, self.slots)
            self.real[:, self.length :] = False
        self._bias = None

    # -- rows and ends ---------------------------------------------------------------------------------------------------

    @property
    def held(self) -> WeightedTokens:
        """All slots up to the longest row's last; free ones and padding have `beta = -inf`."""
        held = super().held
        return held.where_valid(held.valid)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys for the model's own mask, which counts only while padding has its slots."""
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        before = min(self.seen, self.length)
        return before + new, self.seen - before

    def newest_are_bad(self) -> torch.Tensor:
        """Whether there is NaN or infinity among what is held; see `ADMSLayer.newest_are_bad`."""
        return ~(self.keys.isfinite().all() & self.values.isfinite().all())

    @unrecorded()
    def move_window(self, shift: torch.Tensor) -> None:
        """See `ADMSLayer.move_window`."""
        if not self.is_initialized:
            return
        if not self.aligned:
            self.align()
        self._keep_exact()
        shift = shift.to(self.device)
        for cohort in self.cohorts:
            shifts = shift[self._index(cohort)]
            if bool(shifts.any()):
                self.lend(cohort).move_window(shifts)
                self.give_back(cohort)

    def check_crop(self, gone: int) -> None:
        """Raise `ValueError` where the last `gone` tokens can't be removed; padding can't be told from tokens later on."""
        if gone > self.tail:
            raise ValueError(
                f"crop({-gone}) reaches back to padding: of this batch only the last {self.tail} tokens can be taken back"
            )
        for cohort in self.cohorts:
            cohort.part.check_crop(gone)

    @property
    def loose(self) -> int:
        """See `ADMSLayer.loose`; of the batch, and since its last padding."""
        return min(self.tail, *(cohort.part.loose for cohort in self.cohorts))

    def _remove(self, gone: int) -> None:
        waiting = 0 if self._waiting is None else self._waiting.shape[3]
        self.tail -= gone
        self.seen -= gone
        for cohort in self.cohorts:
            cohort.part.length -= gone
            cohort.part.seen -= gone
        self.offsets = self.offsets - gone
        taken = min(gone, waiting)
        if waiting > taken:
            self._waiting = self._waiting[:, :, :, : waiting - taken]
            self._new_real = self._new_real[:, : waiting - taken]
            self._new_counts = [count - taken for count in self._new_counts]
            if self.overflow is not None:
                self.overflow = self.overflow.slice(0, self.overflow.length - taken)
        else:
            self._waiting = self.overflow = None
            for cohort in self.cohorts:
                cohort.part._remove_queries(gone - taken)
            self.query_offsets = (self.query_offsets - (gone - taken)).clamp_min(0)
        if self.aligned:
            self._agree()
        else:
            self.length -= gone
        if self.overflow is None:
            self._clear()

    def _pick(self, chosen: list[int]) -> None:
        """Row `i` becomes what row `chosen[i]` was."""
        if not self.is_initialized:
            return
        self.accept()
        index = torch.tensor(chosen, device=self.device)
        cohorts = []
        for cohort in self.cohorts:
            rows = [row for row, source in enumerate(chosen) if source in cohort.rows]
            if rows:
                cohorts.append(Cohort(rows, _rows_of(cohort.part, [cohort.rows.index(chosen[row]) for row in rows])))
        self.cohorts = cohorts
        self.buffer = self.buffer.map(lambda tensor: tensor.index_select(0, index))
        for name in ("query_buffer", "real", "offsets", "query_offsets", "_new_real", "_starts"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index))
        self._new_counts = [self._new_counts[source] for source in chosen]
        self._bias = None
        self._agree()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        self._pick(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        if self.is_initialized:
            self._pick([row for row in range(self.offsets.shape[0]) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`."""
        if self.is_initialized:
            self._pick(torch.arange(self.offsets.shape[0])[indices.cpu() if hasattr(indices, "cpu") else indices].tolist())

    @property
    def original_nbytes(self) -> int:
        """Bytes of the originals kept outside the attended set."""
        return sum(cohort.part.original_nbytes for cohort in self.cohorts)

    @property
    def state_nbytes(self) -> int:
        """Bytes of what the modules remember beside the originals."""
        return sum(cohort.part.state_nbytes for cohort in self.cohorts)


def _rows_of(part: ADMSLayer, places: list[int]) -> ADMSLayer:
    """A cohort's part for some of its rows only, copied."""
    twin = copy.copy(part)
    twin.map_rows(lambda tensor: tensor[torch.tensor(places, device=tensor.device)])
    for name in (*COUNTS, "compressions", "compaction_seconds"):
        setattr(twin, name, 0)
    return twin
