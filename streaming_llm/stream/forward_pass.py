"""A forward pass as a whole: what it brings, and the stacks that take the place of the stream's once it went well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..store.stack import Stack
from .arrival import Arrival
from .passes import StackPass
from .positions import PositionWindow


@dataclass
class Pass:
    """A forward pass under way.

    Attributes:
        arrival: what it brings.
        stacks: as they were when it began, what was due done.
        window: as `Stream.window` becomes.
        next_trades: as `Stream.next_trades` become.
        parts: what happened in each stack so far.
        of_layer: of these the one that a layer is in.
        over: whether the forward is over and the pass only waits to be committed or cropped.
        extra: what the cache knows of the pass beside, for `Stream.committed`.
    """

    arrival: Arrival
    stacks: list[Stack]
    window: PositionWindow
    next_trades: tuple[int, ...]
    parts: list[StackPass] = field(default_factory=list)
    of_layer: dict[int, StackPass] = field(default_factory=dict)
    over: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, part: StackPass) -> StackPass:
        """Take in what is to happen in a stack."""
        self.parts.append(part)
        self.of_layer.update(dict.fromkeys(part.stack.layers, part))
        return part

    def shifts(self, before: PositionWindow) -> list[tuple[int, int]]:
        """Offsets of each row after and before the moves it made, as pairs."""
        rows = max(len(self.window.offsets), len(before.offsets))
        both = (own * rows if len(own) == 1 else own for own in (self.window.offsets, before.offsets))
        return list(zip(*both, strict=True))


def with_layer(stacks: Sequence[Stack], layer: int) -> Stack | None:
    """The stack that holds a layer; None where there is none."""
    for stack in stacks:
        if layer in stack.layers:
            return stack
    return None
