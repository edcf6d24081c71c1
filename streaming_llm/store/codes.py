"""What archived tokens are found by: coordinates of their unrotated keys in the principal directions of a head's keys."""

from __future__ import annotations

import torch

_TINY = 1e-12
# Of a head's keys every so many are looked at: this many at most.
_MOST = 2048


def fit(keys: torch.Tensor, rank: int, floating: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and principal directions of unrotated keys `[rows, kv_heads, n, head_dim]`, and the step of their codes."""
    keys = keys[:, :, :: -(-keys.shape[2] // _MOST)]
    mean = keys.mean(2, keepdim=True)
    centred = keys - mean
    _, vectors = torch.linalg.eigh(centred.transpose(-1, -2) @ centred)
    basis = vectors[..., -rank:].flip(-1)
    step = torch.ones_like(basis[:, :, :1])
    if not floating:
        step = (centred @ basis).square().mean(2, keepdim=True).sqrt().clamp_min(_TINY) * (4 / 127)
    return basis, mean, step


def coded(keys: torch.Tensor, basis: torch.Tensor, mean: torch.Tensor, step: torch.Tensor, floating: bool) -> torch.Tensor:
    """Codes of unrotated keys, `[rows, kv_heads, n, rank]`."""
    codes = (keys - mean) @ basis
    return codes if floating else (codes / step).round().clamp(-127, 127)
