"""Picking slots of each head: by index, and the best by priority."""

from __future__ import annotations

import torch


def gather_tokens(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`tensor [batch, kv_heads, tokens(, dim)]` at `index [batch, kv_heads, picked]` of each head."""
    if tensor.dim() == 4:
        index = index[..., None].expand(*index.shape, tensor.shape[-1])
    return torch.gather(tensor, 2, index)


def top_slots(
    priority: torch.Tensor, valid: torch.Tensor, width: int, budget: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` slots of each head with the highest priority.

    Args:
        priority: `[batch, kv_heads, tokens]`, float.
        valid: which slots may be picked, bool, as `priority`.
        width: slots to pick; at most `tokens`.
        budget: per-head limit `[batch, kv_heads]` (at most `width`), None for `width` everywhere.

    Returns:
        `(index, picked)`, both `[batch, kv_heads, width]`: the slots by falling priority, and whether each is really picked
        (False beyond a head's budget or its valid slots).
    """
    ranked = torch.where(valid, torch.nan_to_num(priority, nan=0.0, posinf=3e38, neginf=-3e38), -torch.inf)
    best, index = ranked.topk(width, dim=2)
    picked = best > -torch.inf
    if budget is not None:
        picked &= torch.arange(width, device=priority.device) < budget[..., None]
    return index, picked


def top_in_order(
    priority: torch.Tensor,
    valid: torch.Tensor,
    width: int,
    budget: torch.Tensor | None = None,
    pinned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `top_slots`, in the order of the slots instead of their priority, what is not picked last.

    Args:
        pinned: slots that come before all others, bool, as `priority` (which then must be at least 0).
    """
    if pinned is not None:
        priority = priority + pinned * (priority.masked_fill(~valid, 0.0).amax(-1, keepdim=True) + 1.0)
    index, picked = top_slots(priority, valid, width, budget)
    order = torch.where(picked, index, priority.shape[-1]).argsort(dim=2)
    return index.gather(2, order), picked.gather(2, order)
