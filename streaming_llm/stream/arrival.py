"""What comes to a stream: the tokens of a pass, the same for all layers, and the refusal of what are no numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..store.stack import Stack


class NonFiniteError(ValueError):
    """Keys or values with NaN or infinity were given to the cache; it is as it was before."""

    @classmethod
    def of(cls, stack: Stack) -> NonFiniteError:
        """What was to go into a stack is NaN or infinity in the dtype it holds."""
        # Of two dtypes what was too large was so for the narrower.
        dtype = min(stack.tokens.keys.dtype, stack.tokens.values.dtype, key=lambda own: torch.finfo(own).max)
        return cls(f"key_states or value_states hold NaN or infinity in {dtype}: the cache takes finite numbers")


@dataclass
class Arrival:
    """What a pass brings, beside keys and values, the same for all layers.

    Attributes:
        new: tokens, padding counted.
        positions: position ids `[batch or 1, new]`, None to count on from the last.
        real: which are no padding, bool `[batch, new]`, None when all are.
        counts: how many of each row are.
        masked: whether the model was given a padding mask for all tokens seen.
        tail: how many of the newest tokens are real in every row, where `real` is given.
    """

    new: int
    counts: tuple[int, ...]
    positions: torch.Tensor | None = None
    real: torch.Tensor | None = None
    masked: bool = False
    tail: int = 0

    def without(self, gone: int) -> Arrival:
        """The same without the last `gone` tokens, which are real in every row."""
        return dataclasses.replace(
            self,
            new=self.new - gone,
            counts=tuple(count - gone for count in self.counts),
            positions=None if self.positions is None else self.positions[:, : self.new - gone],
            real=None if self.real is None else self.real[:, : self.new - gone],
            tail=self.tail - gone,
        )
