"""Recall: archived tokens that the queries of a pass ask for are attended to beside what a layer holds, in that same pass.

A head's unrotated keys lie near few directions, so that a code of them finds the tokens a query would attend to, wherever
they stood: the query is turned as if all of them were at one distance. Of the tokens found the originals are read, and what
stands for them weighs less for this pass by their shares of its mass, so that nothing counts twice. For a chunk of queries
one set is chosen, by the largest probability that any query head of any of them gives.

InfLLM (Xiao et al. 2024, arXiv 2402.04617) has one distance for what it finds, Quest (Tang et al. 2024, arXiv 2406.10774)
a choice for each query, arXiv 2604.08426 codes of every key where averages of several fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.rope import Rope
from ..data.select import gather_tokens

# The distance at which all archived keys are compared with a query: of those tried (64, 512, 2,048) the best.
DISTANCE = 512
# A query's normaliser is estimated from this many of the scores: enough to rank one query's against another's.
_SAMPLED = 512
# Queries of a pass that choose what all of them read.
_ASKING = 128
# Scores that exist at once on a CPU, in elements.
_BLOCK_ELEMENTS = 1 << 20
# Of many tokens the largest are looked for in the columns of a table of so many rows, where it has this many columns.
_ROWS = 16
_LEAST_COLUMNS = 512
# What shares that add up to 1 leave is rounding, at most this, which a large log-mass would magnify.
_NONE = 2e-5


@dataclass
class Recalled:
    """What a layer's queries attend to beside what it holds.

    Attributes:
        keys, values: `[batch, kv_heads, n, dim]`.
        picked: which of the `n` are really read, bool `[batch, kv_heads, n]`.
        slots: where they are in the archive, int64 as `picked`.
        less: what is added to the log-mass of each token of the middle, float32 `[batch, kv_heads, middle]`, at most 0.
        first: slot of the middle's first token among what the layer holds.
        query: what asked, `[batch, heads, new, head_dim]`.
        room: keys and values of the layer with those recalled behind them, views of its buffer; None where it had no room.
    """

    keys: torch.Tensor
    values: torch.Tensor
    picked: torch.Tensor
    slots: torch.Tensor
    less: torch.Tensor
    first: int
    query: torch.Tensor
    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def beside(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The recalled keys and values behind what the layer holds, in its dtypes."""
        if self.room is not None and keys.data_ptr() == self.room[0].data_ptr() and values.dtype == self.room[1].dtype:
            return self.room
        return torch.cat([keys, self.keys.to(keys.dtype)], dim=2), torch.cat([values, self.values.to(values.dtype)], dim=2)

    def bias(self, bias: torch.Tensor) -> torch.Tensor:
        """The additive mask for both, of the one `[batch, heads, new, tokens]` of what the layer holds."""
        lowest = torch.finfo(bias.dtype).min / 2
        groups = bias.shape[1] // self.picked.shape[1]
        tokens, more = bias.shape[-1], self.picked.shape[2]
        both = torch.nn.functional.pad(bias, (0, more)).unflatten(1, (-1, groups))
        both[..., self.first : self.first + self.less.shape[2]].add_(self.less[:, :, None, None].to(bias.dtype))
        both[..., tokens:].masked_fill_(~self.picked[:, :, None, None], lowest)
        return both.flatten(1, 2)


def best_scores(
    codes: torch.Tensor,
    asked: torch.Tensor,
    shut: torch.Tensor,
    live: Sequence[int],
    real: torch.Tensor | None,
) -> torch.Tensor:
    """The largest log-probability that any query gives each archived token, up to one constant.

    A query's log-probabilities are over the archive alone, its normaliser estimated from a sample: logits of different
    queries and heads can't be compared, and the head with the largest would choose for all.

    Args:
        codes: `[batch, kv_heads, tokens, rank]`.
        asked: queries in the codes' directions, times what logits are multiplied by, `[batch, kv_heads, queries, rank]`.
        shut: 0 for tokens that may be recalled, `-inf` for others, `[batch, kv_heads, tokens]`.
        live: slots each row uses, of which the sample is taken: no row's choice depends on another row.
        real: which of the queries count, bool `[batch, queries]`; None where all do.

    Returns:
        `[batch, kv_heads, tokens]`, `-inf` for those that may not; bfloat16 where the codes are no floating numbers.
    """
    kind = codes.dtype if codes.dtype.is_floating_point else torch.bfloat16
    asked, tokens = asked.to(kind), codes.shape[2]
    block = max(256, _BLOCK_ELEMENTS // (asked.shape[2] * asked.shape[1])) if codes.device.type == "cpu" else tokens
    # Tokens along the last axis: the maximum over queries is then one over whole rows. The product is taken the other way
    # round: of codes that are part of a longer buffer a kernel makes a copy where they are to be transposed.
    whole = (codes.to(kind) @ asked.transpose(-1, -2)).transpose(-1, -2).contiguous() if block >= tokens else None
    if any(own != live[0] for own in live):
        some, may = _sample(codes, shut, live)
        sample = asked @ some.to(kind).transpose(-1, -2)
    else:
        step = max(1, -(-live[0] // _SAMPLED))
        sample = asked @ codes[:, :, ::step].to(kind).transpose(-1, -2) if whole is None else whole[..., ::step]
        may = shut[:, :, ::step]
    # Where none of the sample may be recalled the query counts with what it gives.
    normaliser = (sample.float() + may[:, :, None]).logsumexp(-1, keepdim=True).nan_to_num_(neginf=0.0)
    if real is not None:
        normaliser = normaliser.masked_fill(~real[:, None, :, None], torch.inf)
    normaliser = normaliser.to(kind)
    if whole is not None:
        return whole.sub_(normaliser).amax(2).add_(shut)
    best = []
    for start in range(0, tokens, block):
        scores = asked @ codes[:, :, start : start + block].to(kind).transpose(-1, -2)
        best.append(scores.sub_(normaliser).amax(2))
    return torch.cat(best, dim=2).add_(shut)


def _sample(codes: torch.Tensor, shut: torch.Tensor, live: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every so many codes of each row, at most `_SAMPLED`, and which of them may be recalled, as `shut` says it."""
    steps = torch.tensor([max(1, -(-own // _SAMPLED)) for own in live])[:, None]
    at = torch.arange(_SAMPLED) * steps
    beyond = (at >= torch.tensor(list(live))[:, None])[:, None].to(codes.device)
    at = at.clamp(max=codes.shape[2] - 1).to(codes.device)[:, None].expand(-1, codes.shape[1], -1)
    return gather_tokens(codes, at), gather_tokens(shut, at).masked_fill(beyond, -torch.inf)


def chosen(best: torch.Tensor, budgets: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of highest score, `(slots, picked)`, both `[batch, kv_heads, n]`.

    Args:
        best: what `best_scores` gave; budgets: tokens each row may read.
    """
    width = min(max(budgets), best.shape[2])
    ragged = any(budget < width for budget in budgets)
    score, slots = _largest(best, width, ragged)
    picked = score > -torch.inf
    if ragged:
        most = torch.tensor(budgets, device=picked.device)[:, None, None]
        picked = picked & (torch.arange(width, device=picked.device) < most)
    return slots, picked


def _largest(best: torch.Tensor, width: int, sorted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`best.topk(width)`, over many tokens in two steps: the largest are among the columns with the largest maxima."""
    columns = -(-best.shape[2] // _ROWS)
    if columns < _LEAST_COLUMNS or columns < 2 * width:
        return best.topk(width, dim=2, sorted=sorted)
    table = torch.nn.functional.pad(best, (0, columns * _ROWS - best.shape[2]), value=-torch.inf)
    _, at = table.unflatten(2, (_ROWS, columns)).amax(2).topk(width, dim=2, sorted=False)
    slots = (at[:, :, None] + torch.arange(0, table.shape[2], columns, device=at.device)[:, None]).flatten(2)
    score, among = table.gather(2, slots).topk(width, dim=2, sorted=sorted)
    return score, slots.gather(2, among).clamp_(max=best.shape[2] - 1)


def lighter(share: torch.Tensor, representative: torch.Tensor, picked: torch.Tensor, middle: int) -> torch.Tensor:
    """What the log-masses of the middle lose by what is recalled: `log(1 - sum of the shares)`, float32.

    Args:
        share, representative: of the recalled tokens, `[batch, kv_heads, n]`; -1 for no representative.
        picked: which of them are recalled; middle: slots there are.

    Returns:
        `[batch, kv_heads, middle]`; `-inf` where nothing is left.
    """
    if not middle:
        return share.new_zeros(*share.shape[:2], 0, dtype=torch.float32)
    # The share of a token that nothing stands for is 0.
    gone = share.float() * picked
    left = gone.new_ones(*share.shape[:2], middle).scatter_add_(2, representative.clamp_min(0), gone.neg_())
    return torch.nn.functional.threshold_(left, _NONE, 0.0).log_()


def turned_queries(query: torch.Tensor, positions: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Queries `[batch, heads, new, head_dim]` at `positions [batch or 1, new]`, as if at `DISTANCE` from position 0."""
    if rope is None or not rope.rotates:
        return query
    return rope.move(query, positions[:, None].float(), DISTANCE)


def turned_basis(basis: torch.Tensor, positions: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """The basis `[rows, kv_heads, head_dim, rank]` whose products with a query at `positions [rows or 1, 1]` are those of
    the query that `turned_queries` gives with `basis`: for one query a row less work, done once for all layers."""
    if rope is None or not rope.rotates:
        return basis
    vectors = rope.move(basis.transpose(-1, -2), DISTANCE, positions[:, None].float())
    return vectors.transpose(-1, -2)


def asking(query: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None) -> tuple:
    """Of a long pass's queries `[batch, heads, new, head_dim]` those that choose for all: every so many, the last too.

    Returns:
        `(query, positions, real)`, at most `_ASKING` of each row.
    """
    step = -(-query.shape[2] // _ASKING)
    if step == 1:
        return query, positions, real
    at = slice((query.shape[2] - 1) % step, None, step)
    return query[:, :, at], positions[:, at], None if real is None else real[:, at]


def closed_up(pos: torch.Tensor, picked: torch.Tensor, first: int) -> torch.Tensor:
    """Positions `pos [batch, kv_heads, n]` with those that would be before their turn, counted from `first`, closed up.

    The order stays, and so do distances of what is recent enough: as the middle closes up when the window moves.
    """
    order = torch.where(picked, pos, torch.inf).argsort(dim=2)
    rank = order.argsort(dim=2)
    return torch.maximum(pos, (rank + first).to(pos.dtype))
