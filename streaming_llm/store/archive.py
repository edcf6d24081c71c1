"""The archive: every token that left the recent window, once, as it was; what recall reads.

Tokens are numbered in the order in which they came to it, and number `n` of a row is in slot `n % slots` of the `Shelves`.
Those are written once: what a snapshot knows never changes, because a new token goes to a slot that no snapshot in use
counts among its own. What changes at a compaction (which token of the middle stands for an archived one, with what share of
its mass) is in small tensors that each snapshot has for itself. Past `recall_tokens` the oldest leave; their mass stays in
the middle.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attend.recall import best_scores
from ..compaction.originals import is_original
from ..compaction.trace import Trace
from ..config import ADMSConfig
from ..data.rope import Rope
from ..data.tokens import WeightedTokens
from .codec import Codec
from .codes import coded, fit
from .links import Links
from .row import Row
from .shelves import OutOfRoom, Shelves

_TINY = 1e-12
# Most slots there are before the archive first grows.
_FIRST_SLOTS = 1024

# Links of each slot, and what they are where it is free.
_PER_TOKEN = {"share": 0, "representative": -1, "open": False}

logger = logging.getLogger("streaming_llm")


@dataclass
class Archive:
    """The archive of some layers of a stack.

    Attributes:
        config: the settings.
        shelves: where the tokens are, shared with other snapshots.
        links: what may change of them, this snapshot's own.
        start: the first of the shelves' rows that is this archive's.
    """

    config: ADMSConfig
    shelves: Shelves
    links: Links
    start: int = 0
    # Worked out of the links once, for all passes up to the next compaction.
    _parts: dict[tuple[int, int], Archive] = field(init=False, repr=False, compare=False, default_factory=dict)
    _shut: torch.Tensor | None = field(init=False, repr=False, compare=False, default=None)

    @classmethod
    def empty(cls, config: ADMSConfig, keys: torch.Tensor, values: torch.Tensor, layers: int) -> Archive:
        """An archive with no slots, for heads like those of `keys` and `values [batch, kv_heads, tokens, dim]`."""
        batch, heads, dim = keys.shape[0], keys.shape[1], keys.shape[3]
        rows, rank, device = layers * batch, config.code_rank(dim), keys.device
        codecs = (Codec(config.recall_bits, dim, keys.dtype), Codec(config.recall_bits, values.shape[3], values.dtype))
        shelves = Shelves.empty(codecs, rank, config.recall_store, rows, batch, heads, 0, device)

        def none(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, heads, 0, dtype=dtype, device=device)

        links = Links(
            # As coarse as the tokens are.
            share=none(torch.float16 if config.recall_bits == 4 else torch.float32),
            representative=none(torch.int16),
            open=none(torch.bool),
            basis=torch.zeros(rows, heads, dim, rank, device=device),
            mean=torch.zeros(rows, heads, 1, dim, device=device),
            step=torch.ones(rows, heads, 1, rank, device=device),
        )
        return cls(config, shelves, links)

    # -- shape -----------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of the tensors: layers times batch."""
        return self.links.share.shape[0]

    @property
    def slots(self) -> int:
        """Tokens there is room for."""
        return self.shelves.slots

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of what was archived, `archive`, and of what it is found by, `index`; this archive's part of each."""
        part = self.rows / max(1, self.shelves.rows)
        index = int(self.shelves.code_bytes * part) + self.links.nbytes + 2 * self.links.open.numel()
        return {"archive": int(self.shelves.nbytes * part), "index": index}

    def part(self, start: int, stop: int) -> Archive:
        """The rows from `start` to `stop`, of the same shelves."""
        if (start, stop) not in self._parts:
            links = self.links.map(lambda tensor: tensor[start:stop])
            part = dataclasses.replace(self, links=links, start=self.start + start)
            part._shut = None if self._shut is None else self._shut[start:stop]
            self._parts[start, stop] = part
        return self._parts[start, stop]

    @property
    def shut(self) -> torch.Tensor:
        """`links.open` as what is added to scores: 0, or `-inf` for what may not be recalled."""
        if self._shut is None:
            kept = torch.zeros(self.links.open.shape, dtype=torch.bfloat16, device=self.links.open.device)
            self._shut = kept.masked_fill_(~self.links.open, -torch.inf)
        return self._shut

    def select(self, index: torch.Tensor, batch: Sequence[int]) -> Archive:
        """A copy with the rows `index` of the tensors, which are rows `batch` of a batch."""
        at = index + self.start
        return Archive(self.config, self.shelves.select(at, batch), self.links.of_rows(index))

    def to(self, device: torch.device) -> Archive:
        """A copy on a device."""
        at = torch.arange(self.start, self.start + self.rows)
        return Archive(
            self.config, self.shelves.select(at, None, device), self.links.map(lambda own: own.to(device, copy=True))
        )

    def as_dict(self, archived: int) -> dict[str, Any]:
        """What tells the archive, as plain values and tensors; of slots those that `archived` tokens came to."""
        used, links = min(archived, self.slots), dict(self.links.tensors())
        for name in _PER_TOKEN:
            links[name] = links[name][:, :, :used]
        return {
            "recall_tokens": self.config.recall_tokens,
            "slots": self.slots,
            "links": links,
            "shelves": self.shelves.as_dict(slice(self.start, self.start + self.rows), used),
        }

    @classmethod
    def from_dict(
        cls, config: ADMSConfig, keys: torch.Tensor, values: torch.Tensor, layers: int, told: dict[str, Any]
    ) -> Archive:
        """The archive that `as_dict` told, for heads like those of `keys` and `values [batch, kv_heads, tokens, dim]`."""
        config = dataclasses.replace(config, recall_tokens=told["recall_tokens"])
        archive = cls.empty(config, keys, values, layers)
        archive.shelves = archive.shelves.grown(told["slots"], [], 0)
        archive.shelves.fill(told["shelves"])
        links = dict(told["links"])
        for name, fill in _PER_TOKEN.items():
            links[name] = torch.nn.functional.pad(links[name], (0, told["slots"] - links[name].shape[2]), value=fill)
        archive.links = Links(**links)
        return archive

    @classmethod
    def join(cls, archives: Sequence[Archive]) -> Archive:
        """Archives of equal shapes as one: of the same shelves where they are neighbours on them."""
        first = archives[0]
        links = Links(**{name: torch.cat([getattr(own.links, name) for own in archives]) for name in first.links.tensors()})
        at = first.start
        for own in archives:
            if own.shelves is not first.shelves or own.start != at:
                break
            at += own.rows
        else:
            return Archive(first.config, first.shelves, links, first.start)
        return Archive(first.config, Shelves.join([(own.shelves, own.start, own.rows) for own in archives]), links)

    # -- what is found and read ------------------------------------------------------------------------------------------

    def scores(
        self, query: torch.Tensor, basis: torch.Tensor, live: Sequence[int], real: torch.Tensor | None
    ) -> torch.Tensor:
        """`best_scores` of the tokens in the slots that rows use (`live` of each), `[batch, kv_heads, longest]`.

        Args:
            query: `[batch, heads, new, head_dim]`; basis: `[batch, kv_heads, head_dim, rank]`; one of the two is turned to
                the one distance, and the basis is times what logits and codes are multiplied by.
            real: which of the new are no padding, bool `[batch, new]`; None where all are.
        """
        heads = self.links.share.shape[1]
        groups = query.shape[1] // heads
        asked = query.unflatten(1, (heads, groups)).flatten(2, 3).float() @ basis
        real = None if real is None else real.repeat(1, groups)
        longest = max(live)
        codes = self.shelves.codes[self.start : self.start + self.rows, :, :longest]
        return best_scores(codes, asked, self.shut[:, :, :longest], live, real)

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values, shares and representatives of the tokens in `slots [batch, kv_heads, n]`."""
        share, representative = (own.gather(2, slots) for own in (self.links.share, self.links.representative))
        return *self.shelves.read(self.start, slots), share, representative.long()

    def positions(self, slots: torch.Tensor, moved: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where archived tokens stand in the positions the model has now, and where their keys are rotated to.

        Args:
            slots: `[batch, kv_heads, n]`; moved: by how much each row's positions were moved so far.
        """
        own = (self.shelves.pos, self.shelves.rotated)
        pos, rotated = (tensor[:, None].expand(-1, slots.shape[1], -1).gather(2, slots) for tensor in own)
        return pos - torch.tensor(list(moved), device=pos.device, dtype=pos.dtype)[:, None, None], rotated

    # -- another archive -------------------------------------------------------------------------------------------------

    def with_room(self, archived: Sequence[int], new: int) -> Archive:
        """The archive with free slots for `new` more tokens of each row, of which `archived` came so far.

        Where the store can't grow, it stays as it is: the oldest make room then, and a line in the log says so.
        """
        cap = self.config.recall_tokens
        # What the snapshot before this one counts among its own stays untouched.
        held = min(max(archived, default=0), cap + 2 * self.config.compression_interval)
        needed, spare = held + min(new, cap), self.config.archive_slots
        # What a long pass made room for is given back once it is not needed for long.
        if needed <= self.slots <= max(spare, needed + cap // 2):
            return self
        slots = max(needed, min(max(_FIRST_SLOTS, 2 * self.slots), spare))
        try:
            shelves = self.shelves.grown(slots, archived, cap)
        except OutOfRoom as error:
            least = min(new, cap) + 2 * self.config.compression_interval
            if self.slots <= least:
                raise
            logger.error(
                "recall_store=%r has no more room: the archive keeps the last %d tokens a head instead of %d (%s)",
                self.config.recall_store,
                self.slots - least,
                cap,
                error,
            )
            return dataclasses.replace(self, config=dataclasses.replace(self.config, recall_tokens=self.slots - least))
        grown = {
            name: shelves.relaid(getattr(self.links, name), self.slots, archived, cap, fill)
            for name, fill in _PER_TOKEN.items()
        }
        if self.start or self.rows != self.shelves.rows:
            shelves = shelves.select(torch.arange(self.start, self.start + self.rows), None)
        return Archive(self.config, shelves, dataclasses.replace(self.links, **grown))

    def compacted(
        self,
        index: torch.Tensor | None,
        batch: Sequence[int],
        row: Row,
        held: WeightedTokens,
        new: slice,
        middle: WeightedTokens,
        trace: Trace,
        old: int,
        rope: Rope | None,
    ) -> Links:
        """Take in what left the recent window of equal rows at a compaction, and follow what stood for what.

        Args:
            index: the rows in the tensors, None for all; batch: their numbers in the batch.
            row: where each of them stood before.
            held: all tokens before the compaction; `new`: those of them that are to be archived.
            middle: the middle now; trace: what became of the candidates, of which the first `old` were the middle before.
            rope: how keys turn with position.

        Returns:
            The links of these rows now. Only slots that no row uses were written. Of more tokens than `recall_tokens` the
        last are archived.
        """
        rows = self.links.of_rows(index)
        slots, cap, device = self.slots, self.config.recall_tokens, held.keys.device
        archived, moved = row.archived, row.moved
        old, new = old + max(0, new.stop - new.start - cap), slice(max(new.start, new.stop - cap), new.stop)
        count = new.stop - new.start
        tokens = held.map(lambda tensor: tensor[:, :, new])
        index_at = torch.arange(archived, archived + count) % slots
        # Until it is followed an archived token's representative is one of the candidates.
        share, among = rows.share.float(), rows.representative.long()
        here = torch.arange(old, old + count, device=device)
        if count:
            at = index_at.to(device)
            share = share.index_fill(2, at, 1.0)
            among = among.index_copy(2, at, here.expand(*among.shape[:2], -1))
        live = torch.arange(row.first_archived(cap), archived) % slots
        if trace.returned.shape[2] and len(live):
            at, found = self.shelves.slots_of(batch, live, trace.returned + moved)
            found = found & trace.there
            candidates = trace.parents.shape[2]
            own = torch.arange(candidates - trace.returned.shape[2], candidates, device=device).expand_as(at)
            share = share / trace.rest.gather(2, among.clamp(0, trace.rest.shape[2] - 1)).clamp_min(_TINY)
            among, share = _put(among, at, found, own), _put(share, at, found, 1.0)
        share, representative = _followed(among, share, trace, middle)
        there = torch.zeros(slots, dtype=torch.bool, device=share.device)
        total = archived + count
        numbers = torch.arange(row._replace(archived=total).first_archived(cap), total) % slots
        there[numbers.to(share.device)] = True
        closed = representative >= 0
        if middle.length:
            closed = closed & is_original(middle).gather(2, representative.clamp_min(0))
        basis, mean, step = rows.basis, rows.mean, rows.step
        unrotated = tokens.keys.float()
        if rope is not None and rope.rotates:
            unrotated = rope.move(unrotated, tokens.pos, 0)
        shelf = slice(self.start, self.start + self.rows) if index is None else index + self.start
        if archived == 0:
            every = held.keys.float() if rope is None or not rope.rotates else rope.move(held.keys.float(), held.pos, 0)
            basis, mean, step = fit(every, basis.shape[-1], self.shelves.floating)
        codes = coded(unrotated, basis, mean, step, self.shelves.floating)
        self.shelves.write(shelf, batch, index_at, tokens, codes, moved)
        if middle.length and len(numbers):
            # What returned to the middle by another way than through its representative: promoted, or replayed.
            at, found = self.shelves.slots_of(batch, numbers, middle.pos + moved)
            found = found & is_original(middle)
            here = torch.arange(middle.length, device=share.device).expand_as(at)
            closed = _put(closed, at, found, True)
            representative = _put(representative, at, found, here)
            share = _put(share, at, found, 1.0)
            if row._replace(archived=total).archives_all(self.config, self.config.recent_size):
                # Roundings of many compactions add up, and what is left over by them has a large log-mass.
                share = _adding_up(share, representative, numbers, middle.length)
        return Links(
            share=share.to(rows.share.dtype),
            representative=representative.to(rows.representative.dtype),
            open=there & ~closed,
            basis=basis,
            mean=mean,
            step=step,
        )


def _followed(
    among: torch.Tensor, share: torch.Tensor, trace: Trace, middle: WeightedTokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares and representatives of tokens whose representatives were the candidates `among [rows, kv_heads, n]`."""
    if not middle.length:
        return torch.zeros_like(share), torch.full_like(among, -1)
    at = among.clamp_min(0)
    parents = trace.parents.gather(2, at)
    slot = parents.clamp_min(0)
    share = (share * trace.shares().gather(2, at) / trace.left.gather(2, slot).clamp_min(_TINY)).clamp(0.0, 1.0)
    known = (among >= 0) & (parents >= 0)
    return torch.where(known, share, 0.0), torch.where(known, slot, -1)


def _adding_up(share: torch.Tensor, representative: torch.Tensor, live: torch.Tensor, middle: int) -> torch.Tensor:
    """The shares of the tokens in the slots `live`, in whatever `middle` slots they are, so that they add up to 1."""
    among = representative.index_select(2, live.to(share.device))
    part = share.index_select(2, live.to(share.device)) * (among >= 0)
    total = share.new_zeros(*share.shape[:2], middle).scatter_add_(2, among.clamp_min(0), part)
    return share / total.clamp_min(_TINY).gather(2, representative.clamp_min(0))


def _put(own: torch.Tensor, at: torch.Tensor, picked: torch.Tensor, new: torch.Tensor | float | bool) -> torch.Tensor:
    """`own [rows, kv_heads, slots]` with `new` in the slots `at [rows, kv_heads, n]`, where `picked`."""
    wide = torch.nn.functional.pad(own, (0, 1))
    at = torch.where(picked, at, own.shape[2])
    new = new if isinstance(new, torch.Tensor) else torch.full_like(at, new, dtype=own.dtype)
    return wide.scatter(2, at, new.to(own.dtype))[:, :, :-1]
