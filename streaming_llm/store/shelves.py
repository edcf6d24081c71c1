"""Where an archive's tokens are: on the device, in the host's memory, or in a file that is mapped into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.select import gather_tokens
from ..data.tokens import WeightedTokens
from .codec import Codec

_CODE_DTYPES = {16: torch.bfloat16, 8: torch.bfloat16, 4: torch.int8}


class OutOfRoom(OSError):
    """The file system has no room for what an archive would grow to."""


@dataclass
class Shelves:
    """Slots for tokens `[rows, kv_heads, slots, ...]`, each written once while any snapshot counts it as its own.

    Attributes:
        codecs: how keys and values are stored.
        place: `device`, `host` or `disk`: where they are. Codes and positions are always on the device.
        device: where codes are, and what is read goes.
        keys, values: what the codecs made, a list of tensors each.
        codes: what keys are found by, `[rows, kv_heads, slots, rank]`.
        pos: true position of each token, float32 `[batch, slots]`: the same in all layers and heads.
        rotated: the position its key is rotated to, likewise.
    """

    codecs: tuple[Codec, Codec]
    place: str
    device: torch.device
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    codes: torch.Tensor
    pos: torch.Tensor
    rotated: torch.Tensor

    @classmethod
    def empty(
        cls,
        codecs: tuple[Codec, Codec],
        rank: int,
        place: str,
        rows: int,
        batch: int,
        heads: int,
        slots: int,
        device: torch.device,
    ) -> Shelves:
        """Free slots."""
        kept = [
            [_allocated((rows, heads, slots, length), dtype, place, device) for length, dtype in codec.fields()]
            for codec in codecs
        ]
        codes = torch.zeros(rows, heads, slots, rank, dtype=_CODE_DTYPES[codecs[0].bits], device=device)
        pos, rotated = (torch.zeros(batch, slots, dtype=torch.float32, device=device) for _ in range(2))
        return cls(codecs, place, device, *kept, codes, pos, rotated)

    @property
    def rows(self) -> int:
        """Rows there are."""
        return self.codes.shape[0]

    @property
    def slots(self) -> int:
        """Slots a head has."""
        return self.codes.shape[2]

    @property
    def floating(self) -> bool:
        """Whether codes are floating, not whole steps."""
        return self.codes.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and positions."""
        return sum(own.numel() * own.element_size() for own in (*self.keys, *self.values, self.pos, self.rotated))

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.numel() * self.codes.element_size()

    def _like(self, rows: int, batch: int, slots: int, device: torch.device | None = None) -> Shelves:
        rank, heads = self.codes.shape[3], self.codes.shape[1]
        device = self.device if device is None else device
        return Shelves.empty(self.codecs, rank, self.place, rows, batch, heads, slots, device)

    def _pairs(self, other: Shelves) -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = [*self.keys, *self.values, self.codes]
        return list(zip(own, [*other.keys, *other.values, other.codes], strict=True))

    def write(
        self,
        rows: slice | torch.Tensor,
        batch: Sequence[int],
        at: torch.Tensor,
        tokens: WeightedTokens,
        codes: torch.Tensor,
        moved: int,
    ) -> None:
        """Put tokens `[rows, kv_heads, n, ...]` and their codes into the slots `at [n]`, which no row uses."""
        coded = [*self.codecs[0].encode(tokens.keys), *self.codecs[1].encode(tokens.values), codes.to(self.codes.dtype)]
        for own, new in zip((*self.keys, *self.values, self.codes), coded, strict=True):
            if isinstance(rows, slice):
                own[rows].index_copy_(2, at.to(own.device), new.to(own.device))
            else:
                own[rows.to(own.device)[:, None], :, at.to(own.device)] = new.transpose(1, 2).to(own.device)
        pos = tokens.pos[: len(batch), 0]
        which = torch.tensor(list(batch), device=self.device)[:, None]
        self.rotated[which, at.to(self.device)] = pos
        self.pos[which, at.to(self.device)] = pos + moved

    def slots_of(self, batch: Sequence[int], live: torch.Tensor, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots of the tokens at true positions `pos [layers * batch, kv_heads, n]`, and whether each was found.

        Args:
            batch: the rows' numbers in the batch; live: slots in use, oldest token first.
        """
        live = live.to(self.device)
        known = self.pos[torch.tensor(list(batch), device=self.device)][:, live]
        rows = pos.unflatten(0, (-1, len(batch)))
        wanted = rows.transpose(0, 1).flatten(1)
        at = torch.searchsorted(known.contiguous(), wanted.contiguous()).clamp(max=len(live) - 1)
        found = known.gather(1, at) == wanted
        shape = rows.transpose(0, 1).shape[1:]
        return tuple(own.unflatten(1, shape).transpose(0, 1).flatten(0, 1) for own in (live[at], found))

    def read(self, start: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in `slots [rows, kv_heads, n]` of the rows from `start` on, on the device."""
        known: dict[int, torch.Tensor] = {}
        at = slots.to(self.keys[0].device)
        return tuple(
            codec.decode([gather_tokens(own[start : start + slots.shape[0]], at, known).to(self.device) for own in kept])
            for codec, kept in zip(self.codecs, (self.keys, self.values), strict=True)
        )

    def grown(self, slots: int, archived: Sequence[int], cap: int) -> Shelves:
        """Shelves of `slots` slots with what these hold, at the places its numbers have there.

        Args:
            archived: tokens of each row of the batch so far.
            cap: how many of the last of them are kept.
        """
        batch = self.pos.shape[0]
        other = self._like(self.rows, batch, slots)
        for own, new in (*self._pairs(other), (self.pos, other.pos), (self.rotated, other.rotated)):
            _relay(own, new, self.slots, archived, cap)
        return other

    def relaid(self, tensor: torch.Tensor, slots: int, archived: Sequence[int], cap: int, fill: float) -> torch.Tensor:
        """A tensor `[rows, kv_heads, slots]` beside shelves of `slots` slots, as it is to be beside these."""
        new = tensor.new_full((*tensor.shape[:2], self.slots), fill)
        _relay(tensor, new, slots, archived, cap)
        return new

    def as_dict(self, rows: slice, used: int) -> dict[str, Any]:
        """The first `used` slots of some rows, as tensors by name; see `fill`."""
        kept = {name: [own[rows, :, :used] for own in getattr(self, name)] for name in ("keys", "values")}
        return {**kept, "codes": self.codes[rows, :, :used], "pos": self.pos[:, :used], "rotated": self.rotated[:, :used]}

    def fill(self, told: dict[str, Any]) -> None:
        """Take what `as_dict` told into the first slots, in place."""
        for name in ("keys", "values"):
            for own, new in zip(getattr(self, name), told[name], strict=True):
                own[:, :, : new.shape[2]] = new
        self.codes[:, :, : told["codes"].shape[2]] = told["codes"]
        for name in ("pos", "rotated"):
            getattr(self, name)[:, : told[name].shape[1]] = told[name]

    def select(self, rows: torch.Tensor, batch: Sequence[int] | None, device: torch.device | None = None) -> Shelves:
        """A copy with rows `rows` of the tensors, and `batch` of the positions (None for all)."""
        batch = range(self.pos.shape[0]) if batch is None else batch
        other = self._like(len(rows), len(batch), self.slots, device)
        for own, new in self._pairs(other):
            new.copy_(own.index_select(0, rows.to(own.device)))
        at = torch.tensor(list(batch), dtype=torch.int64, device=self.device)
        other.pos.copy_(self.pos.index_select(0, at))
        other.rotated.copy_(self.rotated.index_select(0, at))
        return other

    @classmethod
    def join(cls, parts: Sequence[tuple[Shelves, int, int]]) -> Shelves:
        """Some rows of shelves of equal shapes, each `(shelves, start, rows)`, one after the other."""
        first = parts[0][0]
        other = first._like(sum(rows for _, _, rows in parts), first.pos.shape[0], first.slots)
        at = 0
        for shelves, start, rows in parts:
            for own, new in shelves._pairs(other):
                new[at : at + rows].copy_(own[start : start + rows])
            at += rows
        other.pos.copy_(first.pos)
        other.rotated.copy_(first.rotated)
        return other


def _relay(own: torch.Tensor, new: torch.Tensor, slots: int, archived: Sequence[int], cap: int) -> None:
    """Copy `own [rows, ..., slots, ...]`, number `n` of which is in slot `n % slots`, to where its numbers are in `new`."""
    axis = 1 if own.dim() == 2 else 2
    more = new.shape[axis]
    if max(archived, default=0) <= min(slots, more):
        used = min(slots, more)
        new.narrow(axis, 0, used).copy_(own.narrow(axis, 0, used))
        return
    # On the host, so that an accelerator is not asked where they are.
    total, at = torch.tensor(list(archived))[:, None], torch.arange(more)
    number = total - 1 - (total - 1 - at) % more
    there = (number >= (total - cap).clamp_min(0)) & (number >= 0)
    copies = own.shape[0] // len(archived)
    source = (number.clamp_min(0) % slots).repeat(copies, 1)
    there = there.repeat(copies, 1)
    for row in range(own.shape[0]):
        chosen = there[row].nonzero()[:, 0]
        taken = own[row].index_select(axis - 1, source[row, chosen].to(own.device))
        new[row].index_copy_(axis - 1, chosen.to(own.device), taken)


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, place: str, device: torch.device) -> torch.Tensor:
    """Zeros where `place` says."""
    if place == "device" or device.type == "meta":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    if place == "host" or size == 0:
        return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
    try:
        with tempfile.TemporaryFile(prefix="streaming-llm-archive-") as file:
            # All of it at once: a map whose blocks are not there dies of the first that is missing.
            os.posix_fallocate(file.fileno(), 0, size)
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    except OSError as error:
        raise OutOfRoom(error.errno, f"{size} bytes in {tempfile.gettempdir()}: {error.strerror}") from error
    return torch.from_numpy(mapped).view(dtype).view(shape)
