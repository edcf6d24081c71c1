"""How archived keys and values are stored: as they are, or in 8 or 4 bits a channel after a Hadamard rotation.

The rotation spreads outliers over the channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). The scale is each token's
own, so that a token is written and read by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_TINY = 1e-12


@dataclass(frozen=True)
class Codec:
    """Codes of vectors of one length.

    Attributes:
        bits: 16 for as they are (whatever their dtype), 8 or 4.
        dim: length of the vectors.
        dtype: what is given and returned.
    """

    bits: int
    dim: int
    dtype: torch.dtype

    def fields(self) -> list[tuple[int, torch.dtype]]:
        """Length and dtype of each tensor that holds a vector."""
        if self.bits == 16:
            return [(self.dim, self.dtype)]
        packed = self.dim if self.bits == 8 else -(-self.dim // 2)
        return [(packed, torch.int8 if self.bits == 8 else torch.uint8), (1, torch.float16)]

    @property
    def nbytes(self) -> int:
        """Bytes of a vector."""
        return sum(length * dtype.itemsize for length, dtype in self.fields())

    def encode(self, states: torch.Tensor) -> list[torch.Tensor]:
        """`states [..., dim]` as the tensors that `fields` describes, `[..., length]`."""
        if self.bits == 16:
            return [states.to(self.dtype)]
        levels = 127 if self.bits == 8 else 7
        turned = _rotated(states.float())
        largest = torch.finfo(torch.float16).max
        scale = (turned.abs().amax(-1, keepdim=True) / levels).clamp(_TINY, largest).to(torch.float16)
        # What the scale is stored as, so that rounding it costs nothing; one below what float16 has is nothing at all.
        steps = (turned / scale.float().clamp_min(_TINY)).round().clamp(-levels, levels)
        if self.bits == 8:
            return [steps.to(torch.int8), scale]
        steps = torch.nn.functional.pad(steps + 8, (0, self.dim % 2)).to(torch.uint8)
        return [steps[..., 0::2] | (steps[..., 1::2] << 4), scale]

    def decode(self, coded: Sequence[torch.Tensor]) -> torch.Tensor:
        """What `encode` was given, `[..., dim]`, as near as the bits allow; to the bit with 16."""
        if self.bits == 16:
            return coded[0]
        steps, scale = coded
        if self.bits == 4:
            steps = torch.stack([steps & 15, steps >> 4], dim=-1).flatten(-2)[..., : self.dim].to(torch.int8) - 8
        # The rotation is its own inverse.
        states = _rotated(steps.float() * scale.float())
        return states.clamp(torch.finfo(self.dtype).min, torch.finfo(self.dtype).max).to(self.dtype)


def _rotated(states: torch.Tensor) -> torch.Tensor:
    """`states [..., dim]` times an orthogonal, symmetric matrix: Hadamard's, in blocks of the largest power of two."""
    dim = states.shape[-1]
    block = dim & -dim
    matrix = _hadamard(block, states.device)
    return (states.unflatten(-1, (dim // block, block)) @ matrix).flatten(-2)


@functools.lru_cache(maxsize=32)
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, device=device)
        for _ in range(int(math.log2(size))):
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix / math.sqrt(size)
