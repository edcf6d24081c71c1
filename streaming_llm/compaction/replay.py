"""Residual replay: while what compaction made has lost too much spectral energy, recent originals are re-injected.

Spectral energy is the sum of the largest squared singular values (Eckart & Young 1936: the most a matrix of that rank can
hold), found by subspace iteration (Halko, Martinsson & Tropp 2011), of what was made against what it was made from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compressors.low_rank import leading_subspace
from ..data.autograd import unrecorded
from ..data.select import top_slots
from ..data.state import HeadState, HeadView
from ..data.tokens import REPLAY, WeightedTokens
from ..sizing import REPLAY_BANK
from .dual_fidelity import as_batch, as_positions, check_head
from .originals import Originals, take_off

# Singular values that count.
SPECTRAL_RANK = 8


@dataclass
class ReplayState(HeadState):
    """What the replay tier knows of each head.

    Attributes:
        reserved: slots kept free for replayed tokens, int64 `[batch, kv_heads]`; the precision tier uses them while it is 0.
        energy: spectral energy of the last compaction, float32 `[batch, kv_heads]`.
    """

    reserved: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, budget: int, device: torch.device) -> ReplayState:
        """At first all slots are kept free."""
        return cls(
            reserved=torch.full((batch, heads), budget, dtype=torch.int64, device=device),
            energy=torch.ones(batch, heads, dtype=torch.float32, device=device),
        )


def leading_energy(rows: torch.Tensor, rank: int = SPECTRAL_RANK) -> torch.Tensor:
    """Sum of the `rank` largest squared singular values of `rows [..., tokens, dim]`, float32 `[...]`."""
    rows = rows.float()
    if rows.shape[-2] < rows.shape[-1]:
        gram = rows @ rows.transpose(-1, -2)
    else:
        gram = rows.transpose(-1, -2) @ rows
    total = torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1)
    if gram.shape[-1] <= rank:
        return total
    basis = leading_subspace(gram, rank)
    energy = ((gram @ basis) * basis).sum((-1, -2))
    # The Frobenius norm stands in where the iteration failed (overflow, NaN).
    return torch.where(energy.isfinite(), energy, total)


@unrecorded()
def spectral_energy(
    approx_k: torch.Tensor,
    approx_v: torch.Tensor,
    original_k: torch.Tensor,
    original_v: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Spectral energy of an approximation over the originals', each `[batch, kv_heads, tokens, dim]`.

    Args:
        valid: which tokens count (of originals and approximation alike, then as many), bool; None for all.

    Returns:
        float32 `[batch, kv_heads]` in [0, 1]; 1 where there are no originals.
    """
    approx = torch.cat([approx_k.float(), approx_v.float()], -1)
    original = torch.cat([original_k.float(), original_v.float()], -1)
    if valid is not None:
        approx, original = approx * valid[..., None], original * valid[..., None]
    if original.shape[2] == 0:
        return original.new_ones(original.shape[:2])
    if approx.shape[2] == 0:
        return original.new_zeros(original.shape[:2])
    if approx.shape == original.shape:
        made, given = leading_energy(torch.stack([approx, original]))
    else:
        made, given = leading_energy(approx), leading_energy(original)
    ratio = torch.where(given > 0, made / given.clamp_min(1e-30), 1.0)
    return torch.nan_to_num(ratio, nan=0.0, posinf=1.0).clamp(0.0, 1.0)


def replay_count(energy: torch.Tensor, threshold: float, budget: int) -> torch.Tensor:
    """Originals to replay: `max(1, int(budget * (threshold - energy) / threshold))` below the threshold, else 0; int64."""
    short = (budget * (threshold - energy) / threshold).long().clamp(1, max(budget, 1))
    return torch.where((energy < threshold) & (budget > 0), short, 0)


def replay(
    tokens: WeightedTokens, originals: Originals, count: torch.Tensor, budget: int, log_mass: bool = True
) -> tuple[WeightedTokens, WeightedTokens]:
    """Re-inject the most recent originals; their mass is taken off the tokens that stood for them.

    Args:
        tokens: the middle, whose slots `originals.parent` names.
        originals: what leaves is freed, in place.
        count: how many each head gets back, `[batch, kv_heads]`, at most `budget`.

    Returns:
        `(tokens, replayed)`: the middle without their mass, and `budget` slots of exact tokens in the order of their
        positions, unused where `count` is less.
    """
    width = min(budget, originals.slots)
    index, picked = top_slots(originals.order.double(), originals.valid, width, count)
    replayed = originals.take(index, picked, REPLAY)
    parent = originals.parent.clamp(max=tokens.length - 1).gather(2, index)
    share = originals.share.gather(2, index) * picked
    replayed.mass = tokens.mass.gather(2, parent) * share
    replayed.square = tokens.square.gather(2, parent) * share.square()
    replayed.score = originals.score.gather(2, index) * picked
    leaving = torch.zeros_like(originals.valid).scatter(2, index, picked)
    return take_off(tokens, originals, leaving, log_mass, width), replayed


class ReplayMixin:
    """The replay tier as documented for one head; the view shows row 0 (`.row(n)` another)."""

    @property
    def replay_bank(self) -> HeadView:
        """Per (layer, head): the last `4 * replay_budget` originals, oldest first: `keys`, `values`, `positions`."""
        return HeadView("replay_bank", self._state_heads("replay"), self._read_replay)

    def _read_replay(self, layer: int, row: int, head: int) -> dict[str, torch.Tensor] | None:
        bank = self._peek_state("replay", layer, row, head)
        if bank is None or self.config.replay_budget == 0 or not bool(bank.valid.any()):
            return None
        index, picked = top_slots(bank.order.double(), bank.valid, min(REPLAY_BANK * self.config.replay_budget, bank.slots))
        at = index[0, 0][picked[0, 0]].flip(0)
        return {"keys": bank.keys[0, 0][at], "values": bank.values[0, 0][at], "positions": bank.pos[0, 0][at]}

    @unrecorded()
    def _update_replay_bank(self, layer_idx: int, head_idx: int, middle_k, middle_v, middle_positions) -> None:
        """Put a head's tokens `[tokens, head_dim]` into its bank; the oldest leave beyond `4 * replay_budget`."""
        check_head(middle_k=middle_k, middle_v=middle_v)
        positions = as_positions("middle_positions", middle_positions, middle_k.shape[0], middle_k.device)
        if self.config.replay_budget == 0 or middle_k.shape[0] == 0:
            return
        bank = self._hand_replay(layer_idx, head_idx, middle_k, middle_v)
        keys, values = as_batch(middle_k[-bank.slots :], middle_v[-bank.slots :])
        new = WeightedTokens.new(keys, values, positions[None, None, -bank.slots :])
        nothing = torch.zeros_like(new.beta)
        bank.store(new, nothing, nothing.long(), int(bank.order.max()) + 1, bank.slots)

    def _compute_spectral_energy(self, approx_k, approx_v, original_k, original_v) -> float:
        """`spectral_energy` of one head's tokens `[tokens, head_dim]`."""
        check_head(approx_k=approx_k, approx_v=approx_v, original_k=original_k, original_v=original_v)
        return float(spectral_energy(*as_batch(approx_k, approx_v, original_k, original_v)))

    def _trigger_replay(
        self, layer_idx: int, head_idx: int, energy_ratio: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The originals `(k, v, positions)` to replay at this energy, oldest first; nothing at or above the threshold."""
        bank = self._hand_replay(layer_idx, head_idx)
        energy = torch.tensor([[float(energy_ratio)]], dtype=torch.float64, device=bank.order.device)
        count = replay_count(energy, self.config.energy_replay_threshold, self.config.replay_budget)
        index, picked = top_slots(bank.order.double(), bank.valid, min(self.config.replay_budget, bank.slots), count)
        at = index[0, 0][picked[0, 0]].flip(0)
        if at.numel():
            self._count_by_hand("replay_triggers", 1)
            self._count_by_hand("replayed", at.numel())
        return bank.keys[0, 0][at], bank.values[0, 0][at], bank.pos[0, 0][at]
