"""Sharing a layer's budget between its heads: whole tokens, within limits, the total exactly kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..data.state import HeadState


@dataclass(frozen=True)
class Budget:
    """Tokens that a tier may keep.

    Attributes:
        width: slots of the tier, the same for every head.
        per_head: int64 `[rows, kv_heads]`, at most `width`; None for `width` everywhere.
        least: a lower bound of `per_head` known without asking the device.
    """

    width: int
    per_head: torch.Tensor | None
    least: int

    def spread_over(self, like: torch.Tensor) -> Budget:
        """The same with a number for every head of `like [rows, kv_heads, ...]`."""
        if self.per_head is not None:
            return self
        return dataclasses.replace(self, per_head=torch.full(like.shape[:2], self.width, device=like.device))

    def plus(self, width: int, per_head: torch.Tensor | int, least: int) -> Budget:
        """So many more of each; one with numbers for every head only."""
        return Budget(self.width + width, self.per_head + per_head, self.least + least)


@dataclass
class VarianceState(HeadState):
    """How much the middle of each head varies, `[batch, kv_heads]` each, changed in place.

    Attributes:
        variance: EMA of `middle_variance`, float32.
        measured: how many measurements there were, int64.
        budgets: budget in force, int64; 0 before the first decision.
    """

    variance: torch.Tensor
    measured: torch.Tensor
    budgets: torch.Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, device: torch.device) -> VarianceState:
        """Nothing measured yet."""
        whole = torch.zeros(batch, heads, dtype=torch.int64, device=device)
        return cls(torch.zeros(batch, heads, dtype=torch.float32, device=device), whole, whole.clone())

    def update(self, variance: torch.Tensor, smoothing: float) -> None:
        """Fold a measurement `[batch, kv_heads]` in; the first one sets the average."""
        self.variance.copy_(torch.where(self.measured == 0, variance, self.variance.lerp(variance, smoothing)))
        self.measured.add_(1)


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
