"""Attention kernels that take the tokens' log-mass as an additive mask, around whichever function computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..data.autograd import autocast_dtype
from .recall import Recalled

# Devices where torch's attention takes a float32 mask beside half-precision queries. CUDA's kernels want the queries' dtype;
# an eager attention adds and normalises in float32 anywhere.
WIDE_MASKS = ("cpu",)


class Attended(Protocol):
    """What is asked of the pass through layers whose keys and values are attended to; see `StackPass`."""

    @property
    def plain(self) -> bool:
        """True while attention is the model's own, to the bit."""

    def bias(self, layer: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """Log-mass and what is hidden, additive `[batch, kv_heads * groups, new, tokens]`."""

    def recall(self, layer: int, query: torch.Tensor, scale: float) -> Recalled:
        """What the queries attend to beside the keys and values; only where `recalls`."""

    @property
    def recalls(self) -> bool:
        """Whether there is anything to recall."""


def packed_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """torch's attention with the query heads of a group in the query axis, so that no keys or values are repeated.

    Args:
        query: `[batch, heads, new, head_dim]`; key, value: `[batch, kv_heads, tokens, dim]`; mask: additive
            `[batch, heads, new, tokens]`.

    Returns:
        `(output [batch, new, heads, value_dim], None)`, as transformers' own.
    """
    batch, heads, new, dim = query.shape
    rows = (batch, key.shape[1], heads // key.shape[1] * new)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(*rows, dim), key, value, attn_mask=mask.reshape(*rows, -1), dropout_p=dropout, scale=scaling
    )
    return output.view(batch, heads, new, -1).transpose(1, 2).contiguous(), None


def attend_weighted(
    part: Attended,
    layer: int,
    kernel: Callable,
    masked: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    wide: bool,
    scale: float,
) -> Any:
    """`kernel(query, key, value, mask)`; once log-mass counts, `masked(query, key, value, log_mass)`, `wide`: in float32.

    Autocast would round the log-mass, and make of its lowest number one that leaves nothing of a row: what it would do to
    the other three is done here, and it is off in the kernel. `scale`: what logits are multiplied by, for what is recalled.
    """
    if query.requires_grad and torch.is_grad_enabled() and not key.requires_grad:
        # Only the queries are learnt: the backward pass needs the keys and values as they are now.
        key, value = key.clone(), value.clone()
    if part.plain:
        return kernel(query, key, value, mask)
    kind = query.device.type
    dtype = autocast_dtype(query.dtype, kind)
    wide = wide and dtype.itemsize < 4
    bias = part.bias(layer, query.shape[1] // key.shape[1], torch.float32 if wide else dtype)
    if part.recalls:
        recalled = part.recall(layer, query, scale)
        key, value = recalled.beside(key, value)
        bias = recalled.bias(bias)
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return masked(query, key, value, bias)
    with torch.autocast(kind, enabled=False):
        return masked(query.to(dtype), key.to(dtype), value.to(dtype), bias)
