"""The adaptive budget controller: budgets follow what compaction does to the attention output, as measured from queries.

Reconstruction energy is `1 - |o' - o|^2 / |o|^2`, with `o` the attention output of recent queries before a compaction and
`o'` after it. With `controller_scope="layer"` heads trade budget within their layer by `budget_factor`; with `"model"`
layers trade with each other, in proportion to a power of what they lose: for losses that fall like a power of the budget,
equal marginal loss is optimal, and gives such a power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..data.autograd import unrecorded
from ..data.queries import Queries
from ..data.state import HeadState, HeadView
from ..data.tokens import WeightedTokens
from ..maths.budgets import middle_variance, share_budget
from ..maths.importance import attention_logits
from .dual_fidelity import check_head

# Of the stored queries every so many are asked; more were measured to tell no more.
QUERY_STEP = 8
# Exponent of the lost energy in a layer's share of the model's budget.
EXPONENT = 0.7
# Layers trade in steps of the base over this, so that many have equal budgets and are compacted in one call.
GRAIN = 4


@dataclass
class ControllerState(HeadState):
    """What the controller knows of each head, `[batch, kv_heads]` each.

    Attributes:
        energy: EMA of the reconstruction energy, float32; 1 is perfect.
        mass: EMA of the attention mass on the middle, float32 in [0, 1].
        measured: how many measurements there were, int64.
        budgets: budget in force, int64; 0 before the first decision.
    """

    energy: torch.Tensor
    mass: torch.Tensor
    measured: torch.Tensor
    budgets: torch.Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, device: torch.device) -> ControllerState:
        """Nothing measured yet."""
        return cls(
            energy=torch.ones(batch, heads, dtype=torch.float32, device=device),
            mass=torch.zeros(batch, heads, dtype=torch.float32, device=device),
            measured=torch.zeros(batch, heads, dtype=torch.int64, device=device),
            budgets=torch.zeros(batch, heads, dtype=torch.int64, device=device),
        )


def attention_output(queries: Queries, tokens: WeightedTokens) -> torch.Tensor:
    """Attention output of the queries over the tokens, float32 `[batch, kv_heads, queries, value_dim]`."""
    logits = attention_logits(queries, tokens.keys, tokens.beta).flatten(2, 3)
    return torch.nan_to_num(logits.softmax(-1)) @ tokens.values.float()


def reconstruction_energy(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`1 - |after - before|^2 / |before|^2` of `[batch, kv_heads, queries, dim]`: float32 `[batch, kv_heads]` in [0, 1]."""
    lost = (after - before).square().sum((2, 3)) / before.square().sum((2, 3)).clamp_min(1e-30)
    return torch.nan_to_num(1.0 - lost, nan=0.0, neginf=0.0).clamp(0.0, 1.0)


def update_controller(state: ControllerState, energy: torch.Tensor, mass: torch.Tensor, gain: float) -> None:
    """Fold one measurement of each head, `[batch, kv_heads]`, into the EMAs, in place; the first one sets them."""
    weight = torch.full_like(state.energy, gain).masked_fill_(state.measured == 0, 1.0)
    state.energy.lerp_(energy.clamp(0.0, 1.0), weight)
    state.mass.lerp_(mass.clamp(0.0, 1.0), weight)
    state.measured.add_(1)


@unrecorded()
def group_mean(values: torch.Tensor, measured: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over runs of `size` heads of those that were measured, given back to each; `[batch, kv_heads]`."""
    heads = values.shape[-1]
    group = torch.arange(heads, device=values.device) // size
    member = (group[:, None] == group[None, :]).to(values.dtype)
    known = (measured > 0).to(values.dtype)
    return (values * known) @ member / (known @ member).clamp_min(1.0)


def budget_factor(energy: torch.Tensor, mass: torch.Tensor, floor: float, ceiling: float) -> torch.Tensor:
    """What a head's base budget is multiplied by.

    Energy below `floor` grows it up to twofold, above `ceiling` shrinks it down to a half, both in proportion to the
    distance; the attention mass on the middle then counts `0.8 + 0.4 * min(1, mass)`.
    """
    growth = 1.0 + ((floor - energy) / max(floor, 1e-6)).clamp(0.0, 1.0)
    shrink = 1.0 - 0.5 * ((energy - ceiling) / max(1.0 - ceiling, 1e-6)).clamp(0.0, 1.0)
    return growth * shrink * (0.8 + 0.4 * mass.clamp(0.0, 1.0))


def head_budgets(state: ControllerState, base: int, floor: float, ceiling: float, group_size: int) -> torch.Tensor:
    """Budgets of a layer's heads in `[1, 2 * base]`, summing to `base` times their number; int64 `[batch, kv_heads]`."""
    energy = group_mean(state.energy, state.measured, group_size)
    mass = group_mean(state.mass, state.measured, group_size)
    factor = budget_factor(energy, mass, floor, ceiling)
    factor = torch.where(state.measured > 0, factor, torch.ones_like(factor))
    return share_budget(factor, base, min(1, base), 2 * base)


def layer_budgets(lost: torch.Tensor, base: int) -> torch.Tensor:
    """Budgets of a model's layers, summing to `base` times their number for every row.

    Args:
        lost: `1 - energy`, the mean over each layer's heads, `[batch, layers]`.
        base: budget of every layer if all lost the same.

    Returns:
        int64 `[batch, layers]`, in proportion to `lost ** EXPONENT` within `[base / GRAIN, 2 * base]`, in steps of
        `base / GRAIN` (whole tokens; what that leaves of the base every layer gets).
    """
    step = max(1, base // GRAIN)
    steps, rest = base // step, base % step
    return share_budget(lost.double().clamp_min(1e-9) ** EXPONENT, steps, min(1, steps), 2 * steps) * step + rest


class ControllerMixin:
    """The controller as documented for one head; the views show row 0 (`.row(n)` another)."""

    def _controller_view(self, name: str, read) -> HeadView:
        def shown(layer: int, row: int, head: int):
            state = self._peek_state("controller", layer, row, head)
            return None if state is None else read(state)

        return HeadView(name, self._state_heads("controller"), shown)

    @property
    def controller_energy_ema(self) -> HeadView:
        """Per (layer, head): EMA of the reconstruction energy, a float."""
        return self._controller_view("controller_energy_ema", lambda s: float(s.energy) if int(s.measured) else None)

    @property
    def controller_attention_mass(self) -> HeadView:
        """Per (layer, head): EMA of the attention mass on the middle, a float."""
        return self._controller_view("controller_attention_mass", lambda s: float(s.mass) if int(s.measured) else None)

    @property
    def controller_budgets(self) -> HeadView:
        """Per (layer, head): the budget last decided, an int."""
        return self._controller_view("controller_budgets", lambda s: int(s.budgets) or None)

    def _update_controller_state(
        self, layer_idx: int, head_idx: int, reconstruction_energy: float, attention_mass: float
    ) -> None:
        """Fold one measurement of a head into its EMAs; both numbers in [0, 1]."""
        numbers = {"reconstruction_energy": reconstruction_energy, "attention_mass": attention_mass}
        for name, value in numbers.items():
            number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            if not isinstance(number, (int, float)) or not 0.0 <= number <= 1.0:
                raise ValueError(f"{name}={value!r} must be in [0, 1]")
        state = self._head_state("controller", layer_idx, head_idx)
        energy, mass = (torch.full_like(state.energy, float(value)) for value in numbers.values())
        update_controller(state, energy, mass, self.config.controller_gain)

    def _get_adaptive_budget(self, layer_idx: int, head_idx: int, base_budget: int) -> int:
        """The head's budget in `[1, 2 * base_budget]` by its group's mean energy and attention mass."""
        if isinstance(base_budget, bool) or not isinstance(base_budget, int) or base_budget < 1:
            raise ValueError(f"base_budget={base_budget!r} must be a whole number, at least 1")
        config = self.config
        own = self._head_state("controller", layer_idx, head_idx)
        layer = self._layer_state("controller", layer_idx)
        energy = group_mean(layer.energy[:1], layer.measured[:1], config.controller_group_size)
        mass = group_mean(layer.mass[:1], layer.measured[:1], config.controller_group_size)
        measured = group_mean((layer.measured[:1] > 0).float(), layer.measured[:1], config.controller_group_size)
        factor = budget_factor(energy, mass, config.controller_energy_floor, config.controller_energy_ceiling)
        factor = float(factor[0, head_idx]) if float(measured[0, head_idx]) else 1.0
        budget = min(max(round(base_budget * factor), 1), 2 * base_budget)
        before = int(own.budgets)
        own.budgets.fill_(budget)
        if budget != (before or base_budget):
            self._count_by_hand("adjustments", 1)
        return budget

    def _scaled_budget(self, layer_idx: int, head_idx: int, middle_k: torch.Tensor, middle_v: torch.Tensor) -> int:
        """The budget in force for a head: the controller's, the variance-based one, or `compressed_budget`."""
        check_head(middle_k=middle_k, middle_v=middle_v)
        self._layer_by_hand(layer_idx, head_idx)
        config = self.config
        base = config.compressed_budget
        if base == 0:
            return 0
        if config.enable_adaptive_controller:
            return self._get_adaptive_budget(layer_idx, head_idx, base)
        if not config.use_adaptive_budget or middle_k.shape[0] == 0:
            return base
        keys, values = middle_k[None, None], middle_v[None, None]
        valid = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
        variance = float(middle_variance(keys, values, valid))
        if not math.isfinite(variance):
            raise ValueError("middle_k and middle_v must hold finite numbers only, not NaN or infinity")
        known = self._variances.setdefault(layer_idx, {})
        weight = config.adaptive_variance_smoothing
        known[head_idx] = variance if head_idx not in known else known[head_idx] * (1 - weight) + variance * weight
        mean = sum(known.values()) / len(known)
        scaled = base * known[head_idx] / max(mean, 1e-12)
        low, high = base * config.adaptive_budget_floor, base * config.adaptive_budget_cap
        return max(1, round(min(max(scaled, low), high)))
