"""Some rows of a stack, as they are to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..compaction.memory import Memory
from ..data.tokens import WeightedTokens
from .links import Links
from .row import Row


def true_first(which: torch.Tensor) -> torch.Tensor:
    """The columns of `which`, bool `[rows, columns]`, those that are True first, each kind in its order; int64."""
    # Not every device sorts bools.
    return (~which).to(torch.int8).argsort(dim=1, stable=True)


class Part(NamedTuple):
    """Some rows of a stack, all at one point, as they are to be: see `Stack.with_parts`.

    `owned` says that the tokens are nobody else's, so that they may be the stack's own where they have its slots.
    """

    which: Sequence[int]
    row: Row
    tokens: WeightedTokens
    memory: Memory
    queries: torch.Tensor | None = None
    links: Links | None = None
    owned: bool = False
