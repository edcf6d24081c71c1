"""Archived tokens that are taken back: what stood for them loses their part, and the archive forgets them.

Nothing on the shelves is changed: slots of tokens that are gone are written again when others come to their numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..compaction.originals import LEAST_REST
from ..data.rope import Rope
from ..data.tokens import CHANGED, SKETCH, WeightedTokens, as_held
from .archive import Archive, Links
from .row import Row

# Tokens of a head that are read at once.
_BLOCK = 512
# What is left of a token by rounding alone: of its mass, and of the shares of it that archived tokens have.
_LEAST, _NO_SHARE = 1e-3, 1e-6


def without(
    archive: Archive, index: torch.Tensor | None, row: Row, start: int, middle: WeightedTokens
) -> tuple[WeightedTokens, Links, torch.Tensor]:
    """The middle of equal rows, and their links, without the archived tokens from number `start` on.

    A token that loses shares `s` of its mass has `log_mass + log(1 - sum s)` and, where at least half of it stays, the value
    `(v - sum s v) / (1 - sum s)`; a sketch keeps its value. One that nothing is left of becomes an unused slot.

    Args:
        index: the rows in the archive's tensors; None for all.
        row: where each of them stands.
        middle: tokens `[rows, kv_heads, middle, ...]`, whose slots `Links.representative` names.

    Returns:
        `(middle, links, rest)`: and the part of its mass that each of these tokens has left, `[rows, kv_heads, middle]`.
    """
    links = archive.links.of_rows(index)
    device, slots = links.open.device, archive.slots
    oldest = row.first_archived(archive.config.recall_tokens)
    leaving = torch.arange(start, row.archived, device=device) % slots
    staying = torch.arange(oldest, start, device=device) % slots
    links = dataclasses.replace(links, open=links.open.index_fill(2, leaving, False))
    if not middle.length:
        return middle, links, torch.ones_like(middle.beta)
    share, representative = links.share.float(), links.representative.long()
    gone, count = _taken_up(share, representative, leaving, middle)
    kept, _ = _taken_up(share, representative, staying, middle)
    touched = count > 0
    left = middle.count - count
    # What stays is told by its own shares: those of all that went would magnify their roundings. Where not all that ever
    # left the window is in the archive, they also tell of what is not.
    complete = row.archives_all(archive.config, row.exact_length(archive.config))
    rest = kept if complete else torch.maximum(1.0 - gone, kept)
    empty = touched & (kept <= _NO_SHARE) & (complete | (left <= 0) | (rest <= _LEAST))
    rest = torch.where(touched & ~empty, rest.clamp(0.0, 1.0), 1.0)
    changed = touched & ~empty & (middle.tier != SKETCH) & (rest >= LEAST_REST)
    drawn = _values(archive, index, share, representative, leaving, changed, middle)
    remainder = (middle.values.float() - drawn) / rest[..., None]
    beta = middle.beta + rest.log()
    result = dataclasses.replace(
        middle,
        values=torch.where(changed[..., None], as_held(remainder, middle.values.dtype), middle.values),
        beta=torch.where(touched, torch.where(beta == 0, CHANGED, beta), middle.beta),
        mass=middle.mass * rest,
        count=torch.where(touched, left.clamp_min(1), middle.count),
    )
    slot = representative.clamp_min(0)
    known = (representative >= 0) & ~empty.gather(2, slot)
    known = known.index_fill(2, leaving, False)
    share = torch.where(known, (share / rest.gather(2, slot)).clamp(0.0, 1.0), 0.0)
    links = dataclasses.replace(
        links,
        share=share.to(links.share.dtype),
        representative=torch.where(known, representative, -1).to(links.representative.dtype),
    )
    return result.where_valid(middle.valid & ~empty), links, rest


def archived_window(
    archive: Archive,
    index: torch.Tensor | None,
    batch: Sequence[int],
    numbers: range,
    moved: int,
    like: WeightedTokens,
    rope: Rope | None,
) -> WeightedTokens:
    """Archived tokens of equal rows as untouched ones, where they stand once positions were moved so far.

    Args:
        index: the rows in the archive's tensors, None for all; batch: their numbers in the batch.
        numbers: which tokens; moved: by how much positions were moved since the stream began.
        like: tokens of the dtypes they are to have.
        rope: how keys turn with position.
    """
    at = torch.arange(numbers.start, numbers.stop, device=archive.links.open.device) % archive.slots
    keys, values = _read(archive, index, at)
    keys, values = keys.to(like.keys.dtype), values.to(like.values.dtype)
    pos, rotated = (_of_rows(own, batch, at, keys) for own in (archive.shelves.pos, archive.shelves.rotated))
    pos = pos - moved
    tokens = WeightedTokens.new(keys, values, pos)
    if rope is not None and rope.rotates:
        tokens.keys = torch.where((pos == rotated)[..., None], keys, rope.move(keys, rotated, pos))
    if like.exact:
        tokens.exact_keys, tokens.exact_pos = keys, rotated
    return tokens


def true_position(archive: Archive, batch: Sequence[int], number: int, like: torch.Tensor) -> torch.Tensor:
    """True positions of each row's archived token `number`, shaped to be compared with `like [rows, kv_heads, n]`."""
    at = torch.tensor([number % archive.slots], device=archive.shelves.pos.device)
    return _of_rows(archive.shelves.pos, batch, at, like)


def _of_rows(own: torch.Tensor, batch: Sequence[int], at: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What `own [batch, slots]` has in the slots `at [n]` of some rows, `[layers * rows, kv_heads, n]`."""
    chosen = own[torch.tensor(list(batch), device=own.device)][:, at]
    return chosen.repeat(like.shape[0] // len(batch), 1)[:, None].expand(-1, like.shape[1], -1).clone()


def _read(archive: Archive, index: torch.Tensor | None, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in the slots `at [n]`, the same of all rows and heads."""
    slots = at.expand(*archive.links.open.shape[:2], -1)
    states = archive.shelves.read(archive.start, slots)
    return states if index is None else tuple(own.index_select(0, index) for own in states)


def _taken_up(
    share: torch.Tensor, representative: torch.Tensor, at: torch.Tensor, middle: WeightedTokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which part of each token of the middle those in the slots `at [n]` are, and how many they are."""
    share, representative = share.index_select(2, at), representative.index_select(2, at)
    known, slot = representative >= 0, representative.clamp_min(0)
    part = torch.zeros_like(middle.beta).scatter_add_(2, slot, share * known)
    return part, torch.zeros_like(middle.count).scatter_add_(2, slot, known.to(middle.count.dtype))


def _values(
    archive: Archive,
    index: torch.Tensor | None,
    share: torch.Tensor,
    representative: torch.Tensor,
    leaving: torch.Tensor,
    changed: torch.Tensor,
    middle: WeightedTokens,
) -> torch.Tensor:
    """What the tokens in the slots `leaving` bring into the values of those of the middle that change, float32."""
    total = torch.zeros_like(middle.values, dtype=torch.float32)
    for at in leaving.split(_BLOCK):
        part, slot = share.index_select(2, at), representative.index_select(2, at)
        part = part * ((slot >= 0) & changed.gather(2, slot.clamp_min(0)))
        _, values = _read(archive, index, at)
        into = slot.clamp_min(0)[..., None].expand(values.shape)
        total.scatter_add_(2, into, values.float() * part[..., None])
    return total
