"""A forward pass: what is due is done on new stacks, new tokens go to slots that no row uses, and `commit` makes it so.

    begin     rows that are due are scored, compacted and moved: new stacks, the cache's own stay as they are
    write     each layer's keys and values go behind the last token; a pass too long for the buffer into one of its own
    attend    the model's kernel, with the mask that `bias` gives
    observe   the layer's queries go to free slots; what was too long is scored and compacted, again as a stack of its own
    commit    the pass's stacks take the place of the cache's

A pass that is dropped instead has never been.
"""

from __future__ import annotations

import dataclasses

import torch

from ..attend.recall import Recalled
from ..data.autograd import unrecorded
from ..data.queries import Queries
from ..data.tokens import WeightedTokens, concatenate
from ..store.row import Row
from ..store.stack import Stack, true_first
from .arrival import Arrival, NonFiniteError
from .recall_pass import RecallPass
from .upkeep import Upkeep


class StackPass:
    """A pass through one stack's layers.

    Args:
        stack: what was due is done already.
        arrival: what comes.
    """

    def __init__(self, stack: Stack, arrival: Arrival, upkeep: Upkeep):
        self.arrival, self.upkeep = arrival, upkeep
        config, new = stack.config, arrival.new
        self.overflows = any(
            row.length + count > row.capacity(config) for row, count in zip(stack.rows, arrival.counts, strict=True)
        )
        if stack.real is None and arrival.real is not None and stack.shows_columns and stack.uniform:
            # Until the first compaction padding has slots: attention is then the model's own, to the bit.
            held = torch.ones(stack.batch, stack.columns, dtype=torch.bool, device=stack.device)
            stack = dataclasses.replace(stack, real=held)
        if self.overflows or stack.columns + new > stack.rows[0].capacity(config):
            stack = stack.aligned()
        # Rows at different points, or to be: each has its own place for the next token.
        self.ragged = stack.real is None and (not stack.uniform or arrival.real is not None)
        longest = max(row.length + count for row, count in zip(stack.rows, arrival.counts, strict=True))
        if self.ragged and not self.overflows and longest >= stack.tokens.length:
            stack = dataclasses.replace(stack, tokens=stack.tokens.widened(longest + 1))
        self.stack, self.start = stack, stack.columns
        self.stop = longest if self.ragged else self.start + new
        self.real = arrival.real
        if self.real is None and (self.ragged or stack.real is not None):
            self.real = torch.ones(stack.batch, new, dtype=torch.bool, device=stack.device)
        self.real = None if self.real is None else self.real.to(stack.device)
        self.stores_queries = (
            bool(config.middle_allocation)
            and not self.overflows
            and all(row.queries + count <= config.query_slots for row, count in zip(stack.rows, arrival.counts, strict=True))
        )
        self.position_ids = self._positions()
        self.scale, self.softcap = stack.scale, stack.softcap
        self.queries = stack.queries
        self.singles: dict[int, Stack] = {}
        self.waiting: dict[int, tuple[Stack, Queries | None]] = {}
        self.bad: torch.Tensor | None = None
        # Layers whose states came, and of these the ones whose queries were not seen yet.
        self.written: set[int] = set()
        self.unanswered: set[int] = set()
        self._biases: dict[tuple[torch.dtype, int], torch.Tensor] = {}
        if self.overflows:
            # Once for all layers, so that their parts are of the same shelves.
            self.stack = self.stack.with_archive_room(max(map(self.stack.leaving, arrival.counts, stack.rows)))
        # Set once all that belongs to the stack is as it stays.
        self.recalling = RecallPass.of(self.stack, arrival, self.position_ids, self.real)
        self.recalls = self.recalling is not None
        # Where each layer's rows are in the stack's tensors, and what shape its states have, once there are any.
        batch, own = stack.batch, stack.tokens
        self._at = {layer: slice(number * batch, (number + 1) * batch) for number, layer in enumerate(stack.layers)}
        shape = (batch, own.keys.shape[1], own.keys.shape[3], own.values.shape[3], own.keys.device)
        self._shape = shape if stack.columns else None
        if not self.overflows:
            self._write_positions()

    # -- what comes --------------------------------------------------------------------------------------------------------

    def _positions(self) -> torch.Tensor:
        """Positions of the new tokens, `[batch or 1, new]`."""
        stack, arrival = self.stack, self.arrival
        if arrival.positions is not None:
            return arrival.positions.to(stack.device)
        seen = [row.seen for row in stack.rows]
        if self.real is None:
            seen = seen[:1] if min(seen) == max(seen) else seen
            return torch.tensor(seen, device=stack.device)[:, None] + torch.arange(arrival.new, device=stack.device)
        return torch.tensor(seen, device=stack.device)[:, None] + self.real.cumsum(-1) - 1

    def _slots(self) -> torch.Tensor:
        """Slots of the new tokens, `[batch, new]`, where rows differ; padding goes to the last, which is nobody's."""
        place = self.stack.lengths[:, None] + self.real.cumsum(-1) - 1
        return torch.where(self.real, place, self.stack.tokens.length - 1)

    def _write_positions(self) -> None:
        """Write the new tokens' positions for all layers; padding that has slots is no token."""
        stack, start, stop = self.stack, self.start, self.start + self.arrival.new
        pos, layers = stack.tokens.pos, len(stack.layers)
        positions = self.position_ids.to(torch.float32)
        if self.ragged:
            self.slots = self._slots()
            at = self.slots.repeat(layers, 1)[:, None].expand(-1, pos.shape[1], -1)
            positions = positions.expand(self.slots.shape).repeat(layers, 1)[:, None].expand(at.shape)
            pos.scatter_(2, at, positions)
            if stack.tokens.exact:
                stack.tokens.exact_pos.scatter_(2, at, positions)
            return
        if positions.shape[0] > 1:
            positions = positions.repeat(layers, 1)
        for own in (pos, stack.tokens.exact_pos):
            if own is not None:
                own[:, :, start:stop] = positions[:, None]
        if stack.real is not None:
            self.columns = torch.cat([stack.real, self.real], dim=1)

    def takes(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether states have the shape of those that the stack holds; False where it holds none."""
        return (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3], keys.device) == self._shape

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's keys and values `[batch, kv_heads, new, dim]`; returns all that its queries attend to."""
        stack = self.stack
        self.written.add(layer)
        self.unanswered.add(layer)
        if self.overflows:
            return self._write_aside(layer, keys, values)
        own, at = stack.tokens, self._at[layer]
        for whole, new in ((own.keys, keys), (own.values, values), (own.exact_keys, keys)):
            if whole is None:
                continue
            if self.ragged:
                whole[at].scatter_(2, self.slots[:, None, :, None].expand(new.shape), new.to(whole.dtype))
            else:
                whole[at, :, self.start : self.stop] = new
        return own.keys[at, :, : self.stop], own.values[at, :, : self.stop]

    def attended(self, layer: int, name: str) -> torch.Tensor:
        """All keys or values (`name`) that a layer's queries attend to, `[batch, kv_heads, tokens, dim]`, a view."""
        if self.overflows:
            return getattr(self.singles[layer].tokens, name)
        return getattr(self.stack.tokens, name)[self._at[layer], :, : self.stop]

    def _write_aside(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `write`, into a buffer of its own: nothing of the stack is touched, whatever is done to it."""
        single = self.stack.single(layer)
        own = single.tokens
        tokens = WeightedTokens.new(keys.to(own.keys.dtype), values.to(own.values.dtype), self.position_ids[:, None])
        if self.real is not None:
            tokens = tokens.where_valid(self.real[:, None].expand(tokens.beta.shape))
        self.singles[layer] = dataclasses.replace(single, tokens=concatenate([single.attended(), tokens]))
        self._check(tokens.keys, tokens.values)
        return self.attended(layer, "keys"), self.attended(layer, "values")

    def _check(self, *states: torch.Tensor) -> None:
        """Note whether there is NaN or infinity, without asking an accelerator; a CPU tells before it is compacted."""
        for tensor in states:
            bad = ~tensor.isfinite().all()
            self.bad = bad if self.bad is None else self.bad | bad
        if self.bad.device.type == "cpu" and bool(self.bad):
            raise NonFiniteError.of(self.stack)

    # -- what attention asks -----------------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Whether attention is the model's own, to the bit: nothing compacted, and padding hidden by the model's mask."""
        if self.ragged or not self.stack.shows_columns:
            return False
        return self.stack.real is None or self.arrival.masked

    def bias(self, layer: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """Log-mass, causality among the new tokens and padding as one additive mask.

        Returns:
            `[batch, kv_heads * groups, new, tokens]` in `dtype`; half the smallest number where nothing is to be seen.
        """
        # Half: with a negative logit the smallest float16 overflows, and a row of padding that sees nothing becomes NaN.
        lowest = torch.finfo(dtype).min / 2
        if self.overflows:
            return self._grouped(self.singles[layer].tokens.beta, groups, dtype, lowest)
        if (dtype, groups) not in self._biases:
            self._biases[dtype, groups] = self._grouped(self.stack.tokens.beta[:, :, : self.stop], groups, dtype, lowest)
        return self._biases[dtype, groups][self._at[layer]]

    @unrecorded()
    def recall(self, layer: int, query: torch.Tensor, scale: float) -> Recalled:
        """What a layer's queries `[batch, heads, new, head_dim]` attend to beside what it holds; only where `recalls`."""
        return self.recalling.recall(layer, query, scale, None if self.overflows else self.stop)

    @unrecorded()
    def _grouped(self, beta: torch.Tensor, groups: int, dtype: torch.dtype, lowest: float) -> torch.Tensor:
        bias = self._hidden(beta.to(dtype).clamp_min(lowest), lowest)
        rows, heads, new, tokens = bias.shape
        return bias[:, :, None].expand(-1, -1, groups, -1, -1).reshape(rows, heads * groups, new, tokens)

    def _hidden(self, beta: torch.Tensor, lowest: float) -> torch.Tensor:
        """`beta [rows, kv_heads, tokens]` for each new token, with what it must not see hidden.

        Returns:
            `[rows, kv_heads, new, tokens]`.
        """
        new, tokens = self.arrival.new, beta.shape[-1]
        if self.real is None and new == 1:
            return beta[:, :, None]
        if self.real is None:
            hidden = torch.ones(new, new, dtype=torch.bool, device=beta.device).triu(1)
            bias = beta[:, :, None].expand(-1, -1, new, -1)
            return torch.cat([bias[..., : tokens - new], bias[..., tokens - new :].masked_fill(hidden, lowest)], dim=-1)
        if self.ragged and not self.overflows:
            last = self.stack.lengths[:, None] + self.real.cumsum(-1)
            seen = torch.arange(tokens, device=beta.device) < last[..., None]
        else:
            causal = torch.ones(new, new, dtype=torch.bool, device=beta.device).tril()
            before = self.stack.used[:, None].expand(-1, new, -1)
            seen = torch.cat([before, self.real[:, None] & causal], dim=-1)
        copies = beta.shape[0] // self.stack.batch
        bias = beta[:, :, None].masked_fill(~seen.repeat(copies, 1, 1)[:, None], lowest)
        # Padding before a row's first token sees nothing: it looks at the first slot, for a result that is finite.
        bias[..., :1].masked_fill_(~seen.any(-1).repeat(copies, 1)[:, None, :, None], 0.0)
        return bias

    @unrecorded()
    def observe(self, layer: int, query: torch.Tensor, scale: float, softcap: float | None, waits: bool) -> None:
        """Take note of the queries that attended to what `write` returned.

        Args:
            query: `[batch, kv_heads * groups, new, head_dim]`, rotated.
            scale, softcap: what the logits were multiplied by, and the model's soft-capping.
            waits: True to leave what is too long as it is until `settle`.
        """
        self.unanswered.discard(layer)
        self.scale, self.softcap = scale, softcap
        keys = self.stack.tokens.keys
        batch, heads, new, dim = query.shape
        states = query.detach().view(batch, keys.shape[1], heads // keys.shape[1], new, dim).to(keys.dtype)
        if self.stores_queries:
            if self.queries is None:
                self.queries = self.stack.empty_queries(states)
            if self.ragged or self.stack.real is not None:
                self._store(self.queries[self._at[layer]], states)
            else:
                start = self.stack.rows[0].queries
                self.queries[self._at[layer], :, :, start : start + new] = states
        elif self.overflows or self.stack.config.middle_allocation:
            single = self.singles.get(layer) or self.stack.single(layer)
            self.waiting[layer] = (single, Queries(states, scale, softcap))
            if not waits:
                with self.upkeep.clock.timed(query.device):
                    self._settle(layer)

    def _store(self, own: torch.Tensor, states: torch.Tensor) -> None:
        """Write queries `[batch, kv_heads, groups, new, head_dim]` of rows that differ behind those stored, in place."""
        rows, counts = self.stack.rows, self.arrival.counts
        # Padding is written to the slot that comes next, or to one that is free as well.
        start = torch.tensor([row.queries for row in rows], device=own.device)[:, None]
        if states.shape[3] == 1 and min(counts) == 1:
            own[torch.arange(own.shape[0], device=own.device), :, :, start[:, 0]] = states[:, :, :, 0]
            return
        # Real ones first: picked by a mask they would make an accelerator wait.
        order = true_first(self.real)
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            new = states[number].index_select(2, order[number, :count])
            own[number, :, :, row.queries : row.queries + count] = new

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _settle(self, layer: int) -> None:
        """Score a layer by queries that the store has no room for, and compact it where it is too long."""
        single, queries = self.waiting.pop(layer)
        arrival, config = self.arrival, single.config
        single = dataclasses.replace(
            single,
            rows=tuple(row.after(count) for row, count in zip(single.rows, arrival.counts, strict=True)),
            seen=single.seen + arrival.new,
            real=self._columns_after(),
        )
        classes = single.classes(lambda number: arrival.counts[number])
        for which in classes:
            count = arrival.counts[which[0]]
            if queries is not None and count and config.middle_allocation:
                single = self._taken(single, which, self._of(queries, which, count))
        if self.overflows:
            due = [which for which in classes if single.rows[which[0]].overfull(config, 0)]
            single = self.upkeep.compacted(single, due)
        self.singles[layer] = single

    def _taken(self, single: Stack, which: list[int], queries: Queries) -> Stack:
        """Store the queries of rows that fit, as they would be without the others; else let them count now."""
        row, config = single.rows[which[0]], single.config
        if row.overfull(config, 0) or row.queries + queries.window > config.query_slots:
            return self.upkeep.scored_by(single, which, queries)
        stored = row._replace(queries=row.queries + queries.window)
        return single.with_queries(which, queries, row.queries).with_row(which, stored)

    def _columns_after(self) -> torch.Tensor | None:
        """Which of the columns, the new ones among them, are no padding; None where padding has no slots."""
        if self.overflows and self.real is not None:
            return torch.cat([self.stack.used, self.real], dim=1)
        return self.columns if not self.overflows and self.stack.real is not None else None

    def _of(self, queries: Queries, which: list[int], count: int) -> Queries:
        """The queries of some rows' real tokens, `count` each."""
        states = queries.states
        if self.real is not None:
            order = true_first(self.real[which])[:, None, None, :count, None]
            states = states[which]
            states = states.gather(3, order.expand(-1, *states.shape[1:3], -1, states.shape[-1]))
        return dataclasses.replace(queries, states=states)

    def finished(self) -> Stack:
        """The stack after the pass."""
        for layer in list(self.waiting):
            self._settle(layer)
        stack, arrival = self.stack, self.arrival
        tail = stack.tail + arrival.new if arrival.real is None else arrival.tail
        if self.singles:
            joined = Stack.join((self.singles.pop(layer) for layer in stack.layers), len(stack.layers))
            counts = joined.counts + self.recalling.counts if self.recalls else joined.counts
            return dataclasses.replace(joined, tail=tail, counts=counts)
        rows = tuple(self._row(row, count) for row, count in zip(stack.rows, arrival.counts, strict=True))
        return dataclasses.replace(
            stack,
            rows=rows,
            queries=self.queries,
            scale=self.scale,
            softcap=self.softcap,
            seen=stack.seen + arrival.new,
            tail=tail,
            real=self._columns_after(),
            counts=stack.counts + self.recalling.counts if self.recalls else stack.counts,
        )

    def _row(self, row: Row, count: int) -> Row:
        row = row.after(count)
        return row._replace(queries=row.queries + count) if self.stores_queries else row

    def cropped(self, gone: int) -> None:
        """Take back the last `gone` new tokens, which are real in every row, before anything is settled."""
        self.arrival = self.arrival.without(gone)
        if self.real is not None:
            self.real = self.real[:, : self.arrival.new]
        if not self.overflows and self.stack.real is not None:
            self.columns = self.columns[:, : self.columns.shape[1] - gone]
        for layer, (single, queries) in self.waiting.items():
            if self.overflows:
                tokens = single.tokens.slice(0, single.tokens.length - gone)
                single = dataclasses.replace(single, tokens=tokens)
            states = queries.states[:, :, :, : self.arrival.new]
            self.waiting[layer] = (single, dataclasses.replace(queries, states=states))

    def narrow(self, layers: tuple[int, ...]) -> None:
        """Keep only these first layers: the others' shapes turned out to differ. Nothing was stored before."""
        self.stack = self.stack.of_layers(0, len(layers))
        self._biases = {}
        if self.queries is not None:
            self.queries = self.queries[: len(layers) * self.stack.batch]

    def clear(self) -> None:
        """Clean what a dropped pass wrote to slots that rows of other lengths may attend to: weighed with 0, NaN is NaN."""
        if self.overflows:
            return
        start = min(row.length for row in self.stack.rows) if self.ragged else self.start
        free = torch.arange(start, self.stop, device=self.stack.device)[None]
        if self.ragged:
            free = (free >= self.stack.lengths[:, None]).repeat(len(self.stack.layers), 1)
        else:
            free = free >= start
        for whole in (self.stack.tokens.keys, self.stack.tokens.values):
            whole[:, :, start : self.stop].masked_fill_(free[:, None, :, None], 0)

    def finite(self) -> torch.Tensor | None:
        """Whether all new keys and values are finite, a bool on the device; None where nothing was written."""
        if self.bad is not None:
            return ~self.bad
        if self.overflows:
            return None
        if not self.arrival.new:
            return None
        start = min(row.length for row in self.stack.rows) if self.ragged else self.start
        own = self.stack.tokens
        return own.keys[:, :, start : self.stop].isfinite().all() & own.values[:, :, start : self.stop].isfinite().all()
