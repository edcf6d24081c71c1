"""Sharing a layer's budget between its heads: whole tokens, within limits, the total exactly kept."""

from __future__ import annotations

import torch


def share_budget(weight: torch.Tensor, base: int, low: int, high: int) -> torch.Tensor:
    """Budgets in proportion to `weight`, each within `[low, high]`, summing to `base` times the number of heads.

    Args:
        weight: float `[..., heads]`, at least 0.
        base: tokens a head gets when all weights are equal; `low <= base <= high`.

    Returns:
        int64 `[..., heads]`.
    """
    heads = weight.shape[-1]
    total = base * heads
    weight = torch.nan_to_num(weight.double(), nan=0.0, posinf=1e12).clamp_min(0) + 1e-12
    # The scale that makes the clamped shares sum to the total, by bisection: the sum only grows with the scale. At the
    # lower bound no head gets more than the base, at the upper none gets less. In logarithms: weights differ by any factor.
    lower = (max(base, 1e-9) / weight.amax(-1, keepdim=True)).log()
    upper = (max(base, 1e-9) / weight.amin(-1, keepdim=True)).log()
    for _ in range(40):
        scale = (lower + upper) / 2
        enough = (weight * scale.exp()).clamp(low, high).sum(-1, keepdim=True) >= total
        upper, lower = torch.where(enough, scale, upper), torch.where(enough, lower, scale)
    share = (weight * upper.exp()).clamp(low, high)
    whole = share.floor()
    missing = total - whole.sum(-1, keepdim=True)
    # Largest remainders get the missing tokens, never beyond the limit.
    rest = torch.where(whole < high, share - whole, -1.0)
    rank = rest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < missing)).long()


def middle_variance(keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """How much the tokens of each head differ: variance of keys and of values, each over its mean square, averaged.

    Args:
        keys, values: `[batch, kv_heads, tokens, dim]`; valid: bool `[batch, kv_heads, tokens]`.

    Returns:
        float32 `[batch, kv_heads]`, in [0, 1].
    """
    mask = valid[..., None]
    total = mask.sum(2, keepdim=True).clamp_min(1)

    def relative(states: torch.Tensor) -> torch.Tensor:
        states = states.float() * mask
        mean = states.sum(2, keepdim=True) / total
        spread = ((states - mean) * mask).square().sum((2, 3))
        return spread / states.square().sum((2, 3)).clamp_min(1e-20)

    return (relative(keys) + relative(values)) / 2
