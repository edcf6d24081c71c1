"""Token scores: what the recent queries attend to, and what keys and values alone tell.

Attention-based scores follow H2O (Zhang et al. 2023, arXiv 2306.14048) and SnapKV (Li et al. 2024, arXiv 2404.14469); the
product with the value norm follows VATP (Guo et al. 2024, arXiv 2406.12335); without queries, KeyDiff (Park et al. 2025,
arXiv 2504.15364).
"""

from __future__ import annotations

import torch

from ..data.autograd import unrecorded
from ..data.queries import Queries
from ..data.select import top_slots
from ..data.tokens import WeightedTokens

# Logits that exist at once: what a CPU's caches hold, what an accelerator can spare.
_BLOCK_ELEMENTS = 1 << 25
_CPU_BLOCK_ELEMENTS = 1 << 19


def attention_logits(queries: Queries, keys: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Logits with log-mass, causal for the newest tokens: a query `a` places before the newest does not see the `a` newest.

    Args:
        queries: the newest queries; the last one belongs to the last key.
        keys: `[batch, kv_heads, tokens, head_dim]`, oldest first.
        beta: `[batch, kv_heads, tokens]`.

    Returns:
        float32 `[batch, kv_heads, groups, window, tokens]`, `-inf` where nothing is seen.
    """
    logits = queries.logits(keys).add_(beta[:, :, None, None])
    window, tokens = queries.window, keys.shape[2]
    tail = min((window - 1) * queries.step, tokens)
    if tail == 0:
        return logits
    age_of_query = torch.arange(window - 1, -1, -1, device=keys.device) * queries.step
    age_of_key = torch.arange(tail - 1, -1, -1, device=keys.device)
    hidden = age_of_key[None, :] < age_of_query[:, None]
    logits[..., tokens - tail :].masked_fill_(hidden, -torch.inf)
    return logits


@unrecorded()
def attention_statistics(
    queries: Queries, keys: torch.Tensor, beta: torch.Tensor, most_bytes: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square over the queries of each token's attention probability.

    The softmax runs over all tokens held. Computed in float32, in blocks of rows or queries, so that the probabilities of a
    long prefill never exist all at once.

    Args:
        queries, keys, beta: as for `attention_logits`.
        most_bytes: what it may work with, beside one row; None for no limit. Results are equal to the bit, whatever it is.

    Returns:
        `(mass, square)`, each float32 `[batch, kv_heads, tokens]`.
    """
    batch, heads, groups, window, _ = queries.states.shape
    tokens = keys.shape[2]
    mass = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=keys.device)
    square = torch.zeros_like(mass)
    most = _CPU_BLOCK_ELEMENTS if keys.device.type == "cpu" else _BLOCK_ELEMENTS
    per_query = max(1, heads * groups * tokens)
    rows = max(1, min(batch, most // (per_query * window)))
    block = max(1, min(window, most // (per_query * rows)))
    if most_bytes is not None and rows > 1:
        # float32 logits, and keys and values of a row of probabilities beside them.
        rows = max(1, min(rows, most_bytes // (8 * (per_query * window + heads * tokens * keys.shape[3]))))
    for row in range(0, batch, rows):
        at = slice(row, row + rows)
        for start in range(0, window, block):
            stop = min(window, start + block)
            part = queries.part(slice(start, stop), at=at)
            seen = tokens - (window - stop) * queries.step
            sums = _probability_sums(part, keys[at, :, :seen], beta[at, :, :seen])
            mass[at, :, :seen] += sums[0]
            square[at, :, :seen] += sums[1]
    return mass / (groups * window), square / (groups * window)


def _probability_sums(queries: Queries, keys: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the queries of the probabilities and of their squares, in place on one tensor of logits."""
    logits = attention_logits(queries, keys, beta).flatten(2, 3)
    # A query may see nothing but unused slots: its largest logit is -inf, and its weight 0.
    weights = logits.sub_(logits.amax(-1, keepdim=True).clamp_min(-1e30)).exp_()
    inverse = weights.sum(-1).clamp_min(1e-30).reciprocal_()[:, :, None]
    mass = (inverse @ weights)[:, :, 0]
    return mass, (inverse.square() @ weights.square_())[:, :, 0]


@unrecorded()
def less_drawn(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """By how much a token's log-mass must fall for it to draw no more than before, float32 `[batch, kv_heads, tokens]`.

    `before`, `after`: what `attention_logits` gave of the same queries, tokens and log-masses. What is compared is the sum
    over the queries of the probabilities, both over the weights that all tokens had before. 0 where a token draws less now.
    """
    before, after = before.flatten(2, 3), after.flatten(2, 3)
    normaliser = before.logsumexp(-1, keepdim=True)
    more = (after - normaliser).logsumexp(2) - (before - normaliser).logsumexp(2)
    return torch.nan_to_num(more, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)


@unrecorded()
def remember(
    tokens: WeightedTokens, mass: torch.Tensor, square: torch.Tensor, queries: int, window: int, decay: float
) -> None:
    """Fold the statistics of `queries` new queries into the tokens' averages and remembered scores, in place.

    The averages are exponential with weight `queries / window`, so about the last `window` queries count. The score is
    `max(decay ** (queries / 64) * score, sqrt(square))`: a token once needed is not forgotten the moment it is ignored.

    Args:
        tokens: the tokens the statistics were taken over; `score`, `mass` and `square` are updated.
        mass, square: what `attention_statistics` gave, `[batch, kv_heads, tokens]`.
    """
    weight = min(1.0, queries / window)
    tokens.mass.lerp_(mass, weight)
    tokens.square.lerp_(square, weight)
    tokens.score.mul_(decay ** (queries / 64))
    torch.maximum(tokens.score, tokens.square.sqrt(), out=tokens.score)


def value_norm(tokens: WeightedTokens) -> torch.Tensor:
    """Euclidean norm of the values, float32 `[batch, kv_heads, tokens]`."""
    return tokens.values.float().norm(dim=-1)


def key_norm(tokens: WeightedTokens) -> torch.Tensor:
    """Inverse norm of the keys: small keys draw attention (Devoto et al. 2024, arXiv 2406.11430)."""
    return 1.0 / tokens.keys.float().norm(dim=-1).clamp_min(1e-6)


def key_difference(tokens: WeightedTokens) -> torch.Tensor:
    """One minus the cosine of each key with the mean direction of its head's keys (KeyDiff), in [0, 2]."""
    valid = tokens.valid
    unit = torch.nn.functional.normalize(tokens.keys.float(), dim=-1) * valid[..., None]
    mean = torch.nn.functional.normalize(unit.sum(2, keepdim=True), dim=-1)
    return 1.0 - (unit * mean).sum(-1)


def _share(score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    score = score.masked_fill(~valid, 0.0)
    return score / score.sum(-1, keepdim=True).clamp_min(1e-20)


def importance(tokens: WeightedTokens, metric: str, blend: float, queries_seen: bool) -> torch.Tensor:
    """The importance of each token by `metric`, at least 0, comparable within a head.

    Args:
        tokens: the candidates.
        metric: `attention` (the remembered score), `value_norm`, `key_norm`, or `mixed` (score times value norm).
        blend: share of the attention score in `attention`; the rest is the value norm's.
        queries_seen: False where no query was ever shown; `attention` and `mixed` then fall back to `key_difference`.

    Returns:
        float32 `[batch, kv_heads, tokens]`.
    """
    valid = tokens.valid
    if metric == "value_norm":
        return value_norm(tokens)
    if metric == "key_norm":
        return key_norm(tokens)
    if not queries_seen:
        return key_difference(tokens)
    if metric == "mixed":
        return tokens.score * value_norm(tokens)
    if blend == 1.0:
        return tokens.score
    return blend * _share(tokens.score, valid) + (1 - blend) * _share(value_norm(tokens), valid)


def spread_over_segments(
    score: torch.Tensor, valid: torch.Tensor, pos: torch.Tensor, wanted: int, segments: int, share: float
) -> torch.Tensor:
    """Scores that put the best tokens of every segment of the middle first.

    `round(share * wanted)` tokens are taken evenly from `segments` stretches of equal length in position; the rest is
    left to the score. With a share of 0 the score comes back as it is.

    Returns:
        float32 as `score`: reserved tokens lifted above all others, their order kept.
    """
    per_segment = round(share * wanted) // segments
    if per_segment == 0:
        return score
    first = pos.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    last = pos.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    place = torch.nan_to_num((pos - first) / (last - first).clamp_min(1.0), nan=0.0, posinf=0.0, neginf=0.0)
    segment = (place * segments).long().clamp(0, segments - 1)
    lifted = score.clone()
    lift = score.masked_fill(~valid, 0.0).abs().amax(-1, keepdim=True) + 1.0
    per_segment = min(per_segment, score.shape[-1])
    for number in range(segments):
        index, picked = top_slots(score, valid & (segment == number), per_segment)
        lifted.scatter_add_(2, index, picked * lift)
    return lifted
