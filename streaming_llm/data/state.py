"""What a module of ADM++ remembers of each head, as batched tensors, and the read-only views users see of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class HeadState:
    """Base of a module's state for one layer: a dataclass of tensors `[batch, kv_heads, ...]`.

    By hand it is changed in place: `part` gives views, so that what is done to a part is done to the whole.
    """

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, those that are there."""
        named = ((item.name, getattr(self, item.name)) for item in dataclasses.fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]):
        """Each tensor replaced by `function(tensor)`."""
        return type(self)(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def part(self, row: int, head: int):
        """One head of one row as a state `[1, 1, ...]` of views."""
        return self.map(lambda tensor: tensor[row : row + 1, head : head + 1])

    @property
    def heads(self) -> int:
        """KV heads there is room for."""
        return next(iter(self.tensors().values())).shape[1]

    def with_heads(self, more):
        """This state followed by the heads of `more`, a state of the same shapes."""
        other = more.tensors()
        return type(self)(**{name: torch.cat([tensor, other[name]], dim=1) for name, tensor in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


class HeadView(Mapping):
    """A read-only mapping from `(layer, head)` to what `read(layer, row, head)` shows of that head, made when asked for.

    Shows row 0; `row(n)` is the view of another. A head is there once there is something to show (`read` gives None until
    then). `layers` tells which `(layer, heads)` may be asked for.
    """

    def __init__(
        self,
        name: str,
        layers: Callable[[], list[tuple[int, int]]],
        read: Callable[[int, int, int], Any],
        row: int = 0,
    ):
        self._name, self._layers, self._read, self._row = name, layers, read, row

    def row(self, number: int) -> HeadView:
        """The same view of row `number` of the batch."""
        return HeadView(self._name, self._layers, self._read, number)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        heads = dict(self._layers())
        if isinstance(key, tuple) and len(key) == 2 and 0 <= key[1] < heads.get(key[0], 0):
            shown = self._read(key[0], self._row, key[1])
            if shown is not None:
                return shown
        raise KeyError(key)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for layer, heads in self._layers():
            for head in range(heads):
                if self._read(layer, self._row, head) is not None:
                    yield layer, head

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{self._name}{list(self)}"
