"""What became of each token at a compaction, for whoever keeps originals of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data.tokens import WeightedTokens

_TINY = 1e-20


@dataclass
class Trace:
    """Where the candidates of a compaction are afterwards, and by which part of what is there they are it.

    Candidates are the tokens of the middle and what joins it, and behind them originals that returned among them.

    Attributes:
        parents: slot of the middle that each candidate is in now, int64 `[rows, kv_heads, candidates]`; -1 for none.
        mass: attention mass each brought there, float32.
        rest: part of its mass that was left when originals of it had returned, 1 for all.
        returned: positions of the originals that returned, `[rows, kv_heads, n]`: the last `n` candidates.
        there: which of these are any, bool.
        left: part of its mass that each slot of the middle has left after what was replayed, `[rows, kv_heads, middle]`.
    """

    parents: torch.Tensor
    mass: torch.Tensor
    rest: torch.Tensor
    returned: torch.Tensor
    there: torch.Tensor
    left: torch.Tensor

    @classmethod
    def unknown(cls, tokens: WeightedTokens, middle: int) -> Trace:
        """Nobody knows what became of the candidates `tokens`."""
        nothing = tokens.pos[:, :, :0]
        return cls(
            parents=torch.full_like(tokens.pos, -1, dtype=torch.int64),
            mass=tokens.mass,
            rest=torch.ones_like(tokens.mass),
            returned=nothing,
            there=nothing.bool(),
            left=torch.ones_like(tokens.pos[:, :, :1]).expand(-1, -1, middle),
        )

    def with_returned(self, tokens: WeightedTokens, lighter: WeightedTokens, returned: WeightedTokens) -> None:
        """Originals `returned` from the candidates `tokens`, which are `lighter` since; in place."""
        self.rest = _part(lighter.mass, tokens.mass)
        self.mass = torch.cat([lighter.mass, returned.mass], dim=2)
        self.returned, self.there = returned.pos, returned.valid

    def shares(self) -> torch.Tensor:
        """Part of the token it is in now that each candidate is, `[rows, kv_heads, candidates]`."""
        mass = self.mass.clamp_min(_TINY)
        slots = self.parents.clamp_min(0)
        total = mass.new_zeros(self.left.shape).scatter_add_(2, slots, mass * (self.parents >= 0))
        return mass / total.gather(2, slots).clamp_min(_TINY)

    def reordered(self, order: torch.Tensor, width: int | None = None) -> None:
        """The middle's slots were put into another order, `order` telling where each came from; in place."""
        moved = order.argsort(dim=2).gather(2, self.parents.clamp_min(0))
        there = self.parents >= 0 if width is None else (self.parents >= 0) & (moved < width)
        self.parents = torch.where(there, moved, -1)
        self.left = self.left.gather(2, order)[:, :, :width]


def _part(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`after / before`; 1 where there was nothing."""
    return torch.where(before > _TINY, after / before.clamp_min(_TINY), 1.0)


def left_of(before: WeightedTokens, after: WeightedTokens) -> torch.Tensor:
    """Part of its mass that each token has left, `[rows, kv_heads, tokens]`."""
    return _part(after.mass, before.mass)
