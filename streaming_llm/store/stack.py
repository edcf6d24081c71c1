"""A stack: layers of equal shape on one device, and the only owner of what they hold.

Its tensors are `[layers * batch, kv_heads, ...]`, one layer after the other, so that one batched call serves all. A stack is
a snapshot: what a row uses of it never changes. A pass writes into slots that no row uses yet; whatever else becomes of the
tokens (scores, a compaction, a move, other rows) gives a new stack, which takes the place of the old one when all went well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..compaction.counts import Counts
from ..compaction.memory import Memory
from ..config import ADMSConfig
from ..data.padding import MaskChange
from ..data.queries import Queries
from ..data.rope import Rope
from ..data.tokens import WeightedTokens
from .archive import Archive
from .part import Part, true_first
from .row import Row


@dataclass
class Stack:
    """See the module. Tensors are changed only where no row uses them.

    Attributes:
        layers: numbers of the layers, in the order of the tensors.
        config: the settings.
        rope: how the layers' keys turn with position; None where that is not known.
        rows: where each row of the batch stands.
        tokens: the buffer, `[layers * batch, kv_heads, slots, ...]`; slots not in use are as those of untouched tokens.
        memory: what the modules remember, of as many rows and heads.
        queries: stored queries `[layers * batch, kv_heads, groups, slots, head_dim]`; None before the first.
        scale, softcap: what the logits of the queries are multiplied by, and the model's soft-capping.
        seen: columns of the stream, padding counted.
        tail: how many of the newest columns are real in every row.
        counts: what compactions did.
        real: while padding has slots, which of the columns are none, bool `[batch, columns]`; None once it has not.
        archive: what left the recent window, where it can be recalled; None otherwise.
    """

    layers: tuple[int, ...]
    config: ADMSConfig
    rope: Rope | None
    rows: tuple[Row, ...]
    tokens: WeightedTokens
    memory: Memory
    queries: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    seen: int = 0
    tail: int = 0
    counts: Counts = field(default_factory=Counts)
    real: torch.Tensor | None = None
    archive: Archive | None = None

    @classmethod
    def empty(
        cls, layers: tuple[int, ...], config: ADMSConfig, rope: Rope | None, keys: torch.Tensor, values: torch.Tensor
    ) -> Stack:
        """Free slots for layers whose states are shaped, typed and placed like `keys` and `values`."""
        config.check_head_dim(keys.shape[-1])
        row = Row(width=config.widest_middle)
        tokens = WeightedTokens.empty(keys, values, 0, copies=len(layers)).widened(row.slots(config))
        memory = Memory.empty(config, keys, values, len(layers))
        archive = Archive.empty(config, keys, values, len(layers)) if config.enable_recall else None
        return cls(layers, config, rope, (row,) * keys.shape[0], tokens, memory, archive=archive)

    # -- shape -----------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tokens.keys.device

    @property
    def columns(self) -> int:
        """Slots in use by the longest row; padding that has slots is counted."""
        return self.real.shape[1] if self.real is not None else max(row.length for row in self.rows)

    @property
    def compacted(self) -> bool:
        """Whether any row was compacted."""
        return any(row.compactions for row in self.rows)

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether all rows are at the same point, and padding has no slots."""
        if self.real is not None:
            return False
        point = self.rows[0].point
        return len(self.rows) == 1 or all(row.point == point for row in self.rows)

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        """Slots in use by each row, int64 `[batch]`, on the device."""
        return torch.tensor([row.length for row in self.rows], device=self.device)

    def fits(self, states: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether a layer with such keys and values can be of this stack."""
        own = self.tokens
        shape = (self.batch, own.keys.shape[1], own.keys.shape[3], own.values.shape[3], own.keys.device)
        return shape == (*states.shape[:2], states.shape[3], values.shape[3], states.device)

    def alike(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """As `fits`, and of the same dtypes."""
        own = self.tokens
        return self.fits(keys, values) and (own.keys.dtype, own.values.dtype) == (keys.dtype, values.dtype)

    @functools.cached_property
    def shows_columns(self) -> bool:
        """Whether each slot is a column of the stream: nothing was compacted, and padding has its slots or never was."""
        unpadded = all(row.seen == self.seen for row in self.rows)
        return not self.compacted and (self.real is not None or unpadded)

    def classes(self, key: Callable[[int], object] = lambda number: None) -> list[list[int]]:
        """Numbers of the rows that are at one point, and equal in `key(number)`."""
        found: dict[tuple, list[int]] = {}
        for number, row in enumerate(self.rows):
            found.setdefault((row.point, key(number)), []).append(number)
        return list(found.values())

    def of_layer(self, layer: int, tensor: torch.Tensor) -> torch.Tensor:
        """The part of one of the stack's tensors that is a layer's, a view `[batch, ...]`."""
        rows = len(self.rows)
        start = self.layers.index(layer) * rows
        return tensor[start : start + rows]

    def index(self, which: Sequence[int]) -> torch.Tensor | None:
        """Where rows of the batch are in the tensors, int64 `[layers * rows]`; None for all of them, in their order."""
        if len(which) == self.batch and list(which) == list(range(self.batch)):
            return None
        starts = range(0, len(self.layers) * self.batch, self.batch)
        return torch.tensor([start + number for start in starts for number in which], device=self.device)

    # -- what rows hold --------------------------------------------------------------------------------------------------

    def held(self, which: Sequence[int]) -> WeightedTokens:
        """The tokens of equal rows, oldest first, `[layers * rows, kv_heads, length, ...]`; views where all are asked."""
        length, index = self.rows[which[0]].length, self.index(which)
        held = self.tokens.slice(0, length if self.real is None else self.columns)
        if index is not None:
            held = held.map(lambda tensor: tensor.index_select(0, index))
        if self.real is None:
            return held
        order = self.order(which, length).repeat(len(self.layers), 1)
        return held.gather(order[:, None].expand(-1, held.beta.shape[1], -1))

    def order(self, which: Sequence[int], length: int) -> torch.Tensor:
        """The columns of rows whose padding has slots that are none, int64 `[rows, length]`."""
        return true_first(self.real[list(which)])[:, :length]

    def remembered(self, which: Sequence[int]) -> Memory:
        """What the modules remember of these rows; the very tensors where all rows are asked."""
        index = self.index(which)
        return self.memory if index is None else self.memory.map(lambda tensor: tensor.index_select(0, index))

    def stored_queries(self, which: Sequence[int], start: int = 0, stop: int | None = None) -> Queries | None:
        """Queries of equal rows from number `start` to `stop`, oldest first; None where there are none."""
        stop = self.rows[which[0]].queries if stop is None else stop
        if self.queries is None or stop <= start:
            return None
        states, index = self.queries[:, :, :, start:stop], self.index(which)
        return Queries(states if index is None else states.index_select(0, index), self.scale, self.softcap)

    def attended(self) -> WeightedTokens:
        """All slots up to the longest row's last; those a row does not use, and padding, have `beta = -inf`."""
        held = self.tokens.slice(0, self.columns)
        if self.uniform:
            return held
        return held.where_valid(self.used.repeat(len(self.layers), 1)[:, None] & held.valid)

    @functools.cached_property
    def used(self) -> torch.Tensor:
        """Which slots each row uses, bool `[batch, columns]`."""
        if self.real is not None:
            return self.real
        return torch.arange(self.columns, device=self.device) < self.lengths[:, None]

    # -- another stack -----------------------------------------------------------------------------------------------------

    def with_parts(self, parts: Sequence[Part]) -> Stack:
        """The stack in which the rows of each part hold what it says from slot 0 on; the others are as they were.

        What each row has seen stays its own.
        Padding has no slots in it, so where it has any now, all rows must be in a part.
        """
        rows = list(self.rows)
        for part in parts:
            for number in part.which:
                rows[number] = part.row._replace(seen=rows[number].seen)
        slots = max(row.slots(self.config) for row in rows)
        # Rows of different length need a slot where padding among new tokens is written to.
        slots = max(slots, max(row.length for row in rows)) + any(row.point != rows[0].point for row in rows)
        if len(parts) == 1 and self.index(parts[0].which) is None:
            part = parts[0]
            tokens, memory, queries, links = part.tokens, part.memory, part.queries, part.links
            if not part.owned or tokens.length != slots:
                tokens = tokens.widened(slots)
        else:
            exact = any(part.tokens.exact for part in parts) or self.tokens.exact
            own = self.tokens.with_exact() if exact else self.tokens
            tokens, memory = own.widened(slots), self.memory.map(torch.clone)
            queries = None if self.queries is None else self.queries.clone()
            links = None if self.archive is None else self.archive.links
            for part in parts:
                index = self.index(part.which)
                links = links if part.links is None else links.with_rows(index, part.links)
                index = torch.arange(len(self.layers) * self.batch, device=self.device) if index is None else index
                full = part.tokens.widened(slots)
                for name, tensor in tokens.tensors().items():
                    tensor[index] = full.field(name)
                for name, state in memory.states().items():
                    for key, tensor in state.tensors().items():
                        tensor[index] = getattr(getattr(part.memory, name), key)
                if part.queries is not None:
                    queries[index] = part.queries
        archive = self.archive if links is None else dataclasses.replace(self.archive, links=links)
        return dataclasses.replace(
            self, rows=tuple(rows), tokens=tokens, memory=memory, queries=queries, real=None, archive=archive
        )

    def with_row(self, which: Sequence[int], row: Row) -> Stack:
        """The stack whose rows `which` stand where `row` says, each with what it has seen itself."""
        chosen = set(which)
        rows = tuple(row._replace(seen=own.seen) if number in chosen else own for number, own in enumerate(self.rows))
        return dataclasses.replace(self, rows=rows)

    def empty_queries(self, states: torch.Tensor) -> torch.Tensor:
        """A store of queries like `states [rows, kv_heads, groups, new, head_dim]`, for all rows, with none in it."""
        shape = (self.tokens.keys.shape[0], *states.shape[1:3], self.config.query_slots, states.shape[4])
        return torch.zeros(shape, dtype=states.dtype, device=states.device)

    def with_queries(self, which: Sequence[int], queries: Queries, start: int) -> Stack:
        """The stack whose rows `which` have these queries stored from number `start` on."""
        states, index = queries.states, self.index(which)
        own = self.empty_queries(states) if self.queries is None else self.queries.clone()
        at = slice(None) if index is None else index
        own[at, :, :, start : start + states.shape[3]] = states.to(own.dtype)
        return dataclasses.replace(self, queries=own, scale=queries.scale, softcap=queries.softcap)

    def aligned(self) -> Stack:
        """The same with no slots for padding."""
        if self.real is None:
            return self
        return self.with_parts([self.part(which) for which in self.classes()])

    def part(self, which: Sequence[int]) -> Part:
        """Equal rows as they are."""
        index = self.index(which)
        queries = self.queries if index is None or self.queries is None else self.queries.index_select(0, index)
        return Part(which, self.rows[which[0]], self.held(which), self.remembered(which), queries)

    def pick(self, rows: Sequence[int]) -> Stack:
        """The stack whose row `i` is what row `rows[i]` was."""
        starts = range(0, len(self.layers) * self.batch, self.batch)
        index = torch.tensor([start + row for start in starts for row in rows], device=self.device)
        real = None if self.real is None else self.real[list(rows)]
        picked = self._map(lambda tensor: tensor.index_select(0, index))
        if self.archive is not None and list(rows) != list(range(self.batch)):
            picked.archive = self.archive.select(index, rows)
        return dataclasses.replace(picked, rows=tuple(self.rows[row] for row in rows), real=real)

    def single(self, layer: int) -> Stack:
        """One of the layers as a stack of its own, of views. The counts stay with the first."""
        at = self.layers.index(layer)
        return self.of_layers(at, at + 1)

    def of_layers(self, start: int, stop: int) -> Stack:
        """The layers from the `start`-th to the `stop`-th as a stack of their own, as `single`."""
        rows = slice(start * self.batch, stop * self.batch)
        return dataclasses.replace(
            self._map(lambda tensor: tensor[rows]),
            layers=self.layers[start:stop],
            counts=Counts() if start else self.counts,
            archive=None if self.archive is None else self.archive.part(rows.start, rows.stop),
        )

    def archive_of(self, layer: int) -> Archive | None:
        """The archive of one of the layers, of views."""
        start = self.layers.index(layer) * self.batch
        return None if self.archive is None else self.archive.part(start, start + self.batch)

    @property
    def archive_cap(self) -> int:
        """Tokens of each row that the archive keeps."""
        return 0 if self.archive is None else self.archive.config.recall_tokens

    @property
    def archived_tokens(self) -> int:
        """Tokens in the archive, over layers, rows and heads."""
        there = sum(row.archived - row.first_archived(self.archive_cap) for row in self.rows)
        return there * len(self.layers) * self.tokens.keys.shape[1]

    def leaving(self, new: int, row: Row) -> int:
        """Tokens of a row that have left the recent window since the last compaction once `new` more have come."""
        fixed = self.config.dynamic_start_size + self.config.recent_size
        return min(max(0, row.length + new - fixed - (row.width if row.compactions else 0)), self.archive_cap)

    def with_archive_room(self, new: int) -> Stack:
        """The stack whose archive has room for `new` more tokens of each row."""
        if self.archive is None:
            return self
        return dataclasses.replace(self, archive=self.archive.with_room([row.archived for row in self.rows], new))

    @classmethod
    def join(cls, stacks: Iterable[Stack], count: int) -> Stack:
        """Stacks of equal rows and shapes, of `count` layers in all, as one; none is needed once the next is asked for."""
        rest = iter(stacks)
        stack = next(rest)
        if len(stack.layers) == count:
            return stack
        rows = count * stack.batch
        whole = stack._map(lambda tensor: tensor.new_empty(rows, *tensor.shape[1:]))
        whole.layers, whole.counts, archives, start = (), Counts(), [], 0
        while stack is not None:
            stop = start + len(stack.layers) * stack.batch
            for own, part in zip(whole._tensors(), stack._tensors(), strict=True):
                own[start:stop] = part
            whole.layers, whole.counts, start = whole.layers + stack.layers, whole.counts + stack.counts, stop
            archives.append(stack.archive)
            # Not while the next is made.
            del stack
            stack = next(rest, None)
        whole.archive = None if archives[0] is None else Archive.join(archives)
        return whole

    def to(self, device: torch.device) -> Stack:
        """A copy on a device."""
        own = self._map(lambda tensor: tensor.to(device, copy=True))
        archive = None if self.archive is None else self.archive.to(device)
        return dataclasses.replace(own, real=None if self.real is None else self.real.to(device), archive=archive)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Stack:
        """Each tensor `[layers * batch, ...]` replaced by `function(tensor)`."""
        return dataclasses.replace(
            self,
            tokens=self.tokens.map(function),
            memory=self.memory.map(function),
            queries=None if self.queries is None else function(self.queries),
        )

    def _tensors(self) -> list[torch.Tensor]:
        """The tensors `[layers * batch, ...]`, but for the archive's."""
        states = [self.tokens, *self.memory.states().values()]
        tensors = [tensor for state in states for tensor in state.tensors().values()]
        return tensors if self.queries is None else [*tensors, self.queries]

    def masked(self, change: MaskChange) -> Stack:
        """The stack without the tokens that a later mask hides; padding that still has its slots is tokens where it is
        shown."""
        slots = torch.ones(self.batch, self.tokens.length, dtype=torch.bool)
        queries = torch.ones(self.batch, self.config.query_slots, dtype=torch.bool)
        rows = []
        for number, (row, hidden, shown) in enumerate(zip(self.rows, change.hidden, change.shown, strict=True)):
            # Before the newest token that is shown there are no queries without a gap.
            known, gone = min(shown, default=self.seen), set(hidden)
            stay = [age < known and age not in gone for age in range(row.queries - 1, -1, -1)]
            queries[number, : len(stay)] = torch.tensor(stay, dtype=torch.bool)
            slots[number, [row.length - 1 - age for age in hidden]] = False
            counts = {name: sum(stay[: getattr(row, name)]) for name in ("kept", "queries", "scored")}
            rows.append(row.after(len(shown) - len(hidden))._replace(**counts))
        tail = int(change.real.flip(1).int().cumprod(1).sum(1).amin())
        layers, heads = len(self.layers), self.tokens.keys.shape[1]
        result = dataclasses.replace(self, rows=tuple(rows), tail=tail)
        if self.queries is not None and not bool(queries.all()):
            order = true_first(queries).to(self.device).repeat(layers, 1)
            result.queries = self.queries.gather(3, order[:, None, None, :, None].expand(self.queries.shape))
        if self.shows_columns:
            result.real = change.real.to(self.device)
        else:
            order = true_first(slots).to(self.device).repeat(layers, 1)
            tokens = self.tokens.gather(order[:, None].expand(-1, heads, -1))
            free = torch.arange(tokens.length, device=self.device) >= result.lengths[:, None]
            result.tokens = tokens.cleared(free.repeat(layers, 1)[:, None])
        return result

    # -- sizes -----------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the tensors, by use: see `ADMSKVCache.memory_report`."""
        queries = 0 if self.queries is None else self.queries.numel() * self.queries.element_size()
        originals = 0 if self.memory.originals is None else self.memory.originals.nbytes
        modules = sum(state.nbytes for state in self.memory.states().values()) - originals
        sizes = {"attended": self.tokens.nbytes, "query_window": queries, "originals": originals, "modules": modules}
        return sizes if self.archive is None else sizes | self.archive.nbytes
