"""Recall: archived tokens that the queries of a pass ask for are attended to beside what a layer holds, in that same pass.

A head's unrotated keys lie near few directions, so that a code of them finds the tokens a query would attend to, wherever
they stood: the query is turned as if all of them were at one distance. Of the tokens found the originals are read, and what
stands for them weighs less for this pass by their shares of its mass, so that nothing counts twice. For a chunk of queries
one set is chosen by the largest score that any query head of any of them gives.

InfLLM (Xiao et al. 2024, arXiv 2402.04617) has one distance for what it finds, Quest (Tang et al. 2024, arXiv 2406.10774)
a choice for each query, arXiv 2604.08426 codes of every key where averages of several fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data.rope import Rope
from ..data.tokens import gather_tokens
from ..store.archive import Archive

# The distance at which all archived keys are compared with a query: of those tried (64, 512, 2,048) the best.
DISTANCE = 512
# Scores that exist at once on a CPU, in elements.
_BLOCK_ELEMENTS = 1 << 20


@dataclass
class Recalled:
    """What a layer's queries attend to beside what it holds.

    Attributes:
        keys, values: `[batch, kv_heads, n, dim]`, in the dtypes they were archived in.
        picked: which of the `n` are really read, bool `[batch, kv_heads, n]`.
        slots: where they are in the archive, int64 as `picked`.
        less: what is added to the log-mass of each token of the middle, float32 `[batch, kv_heads, middle]`, at most 0.
        first: slot of the middle's first token among what the layer holds.
        query: what asked, `[batch, heads, new, head_dim]`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    picked: torch.Tensor
    slots: torch.Tensor
    less: torch.Tensor
    first: int
    query: torch.Tensor

    def beside(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The recalled keys and values behind what the layer holds, in its dtypes."""
        return torch.cat([keys, self.keys.to(keys.dtype)], dim=2), torch.cat([values, self.values.to(values.dtype)], dim=2)

    def bias(self, bias: torch.Tensor) -> torch.Tensor:
        """The additive mask `[batch, heads, new, tokens]` of what the layer holds, for both."""
        lowest = torch.finfo(bias.dtype).min / 2
        groups = bias.shape[1] // self.picked.shape[1]
        stop = self.first + self.less.shape[2]
        less = self.less.repeat_interleave(groups, 1)[:, :, None].to(bias.dtype)
        lighter = (bias[..., self.first : stop] + less).clamp_min(lowest)
        extra = torch.zeros_like(self.picked, dtype=bias.dtype).masked_fill(~self.picked, lowest)
        extra = extra.repeat_interleave(groups, 1)[:, :, None].expand(-1, -1, bias.shape[2], -1)
        return torch.cat([bias[..., : self.first], lighter, bias[..., stop:], extra], dim=-1)


def recall(
    archive: Archive,
    live: int,
    query: torch.Tensor,
    turned: torch.Tensor | None,
    real: torch.Tensor | None,
    budgets: list[int],
    first: int,
    middle: int,
) -> Recalled:
    """Choose and read what a layer's queries ask for.

    Args:
        archive: of this layer alone, `[batch, kv_heads, slots]`.
        live: slots in use by the longest row.
        query: `[batch, heads, new, head_dim]`, rotated.
        turned: the same with each query turned to `DISTANCE`; None where keys do not turn with position.
        real: which queries are no padding, bool `[batch, new]`; None where all are.
        budgets: tokens each row may read.
        first: slot of the middle's first token; middle: slots it has.
    """
    links, heads = archive.links, archive.links.share.shape[1]
    asking = (query if turned is None else turned).unflatten(1, (heads, -1)).flatten(2, 3).float()
    asked = asking @ links.basis * links.step
    best = best_scores(archive, asked, live, None if real is None else real.repeat(1, query.shape[1] // heads))
    best = best.masked_fill(~links.open[:, :, :live], -torch.inf)
    width = min(max(budgets), live)
    ragged = any(budget < width for budget in budgets)
    score, slots = best.topk(width, dim=2, sorted=ragged)
    picked = score > -torch.inf
    if ragged:
        most = torch.tensor(budgets, device=picked.device)[:, None, None]
        picked = picked & (torch.arange(width, device=picked.device) < most)
    keys, values = archive.shelves.read(archive.start, slots)
    representative = gather_tokens(links.representative, slots).long()
    share = gather_tokens(links.share, slots).float() * (picked & (representative >= 0))
    gone = share.new_zeros(*share.shape[:2], middle).scatter_add_(2, representative.clamp_min(0), share)
    less = torch.log1p(-gone.clamp(0.0, 1.0))
    return Recalled(keys, values, picked, slots, less, first, query)


def best_scores(archive: Archive, asked: torch.Tensor, live: int, real: torch.Tensor | None) -> torch.Tensor:
    """The largest score that any query gives each archived token, `[batch, kv_heads, live]`.

    Args:
        asked: queries in the codes' directions, float32 `[batch, kv_heads, queries, rank]`.
        real: which of the queries count, bool `[batch, queries]`; None where all do.
    """
    shelves, rows = archive.shelves, slice(archive.start, archive.start + archive.rows)
    codes = shelves.codes[rows, :, :live]
    kind = codes.dtype if shelves.floating else torch.bfloat16
    asked = asked.to(kind).transpose(-1, -2)
    block = max(256, _BLOCK_ELEMENTS // (asked.shape[-1] * asked.shape[1])) if codes.device.type == "cpu" else live
    best = []
    for start in range(0, live, block):
        scores = codes[:, :, start : start + block].to(kind) @ asked
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None], torch.finfo(scores.dtype).min)
        best.append(scores.amax(-1))
    return (best[0] if len(best) == 1 else torch.cat(best, dim=2)).float()


def turned_queries(query: torch.Tensor, positions: torch.Tensor, rope: Rope | None) -> torch.Tensor | None:
    """Queries `[batch, heads, new, head_dim]` at `positions [batch or 1, new]`, as if at `DISTANCE` from position 0."""
    if rope is None or not rope.rotates:
        return None
    return rope.move(query, positions[:, None].float(), DISTANCE)


def positions_of(archive: Archive, slots: torch.Tensor, moved: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where archived tokens stand in the positions the model has now, and where their keys are rotated to.

    Args:
        slots: `[batch, kv_heads, n]`; moved: by how much each row's positions were moved so far.
    """
    shelves = archive.shelves
    pos, rotated = (own[:, None].expand(-1, slots.shape[1], -1).gather(2, slots) for own in (shelves.pos, shelves.rotated))
    return pos - torch.tensor(moved, device=pos.device, dtype=pos.dtype)[:, None, None], rotated


def closed_up(pos: torch.Tensor, picked: torch.Tensor, first: int) -> torch.Tensor:
    """Positions `pos [batch, kv_heads, n]` with those that would be before their turn, counted from `first`, closed up.

    The order stays, and so do distances of what is recent enough: as the middle closes up when the window moves.
    """
    order = torch.where(picked, pos, torch.inf).argsort(dim=2)
    rank = order.argsort(dim=2)
    return torch.maximum(pos, (rank + first).to(pos.dtype))
