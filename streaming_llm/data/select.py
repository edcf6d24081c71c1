"""Picking slots of each head: by index, and the best by priority."""

from __future__ import annotations

import torch


def gather_tokens(tensor: torch.Tensor, index: torch.Tensor, known: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    """`tensor [batch, kv_heads, tokens(, dim)]` at `index [batch, kv_heads, picked]` of each head.

    `known` is for calls with the same index: what one of them worked out of it.
    """
    if tensor.dim() == 3:
        return tensor.gather(2, index)
    found = _by_row(tensor)
    if found is None:
        return tensor.gather(2, index[..., None].expand(*index.shape, tensor.shape[-1]))
    # Whole rows are copied several times as fast as elements each of which has an index of its own.
    rows, step = found
    known = {} if known is None else known
    if step not in known:
        known[step] = _row_index(index, step)
    return rows.index_select(0, known[step]).view(*index.shape, tensor.shape[-1])


def add_tokens(tensor: torch.Tensor, index: torch.Tensor, states: torch.Tensor) -> None:
    """Add `states [batch, kv_heads, n, dim]` to the slots `index [batch, kv_heads, n]` of a contiguous tensor, in place."""
    at = _row_index(index, tensor.shape[2])
    tensor.view(-1, tensor.shape[-1]).index_add_(0, at, states.reshape(-1, states.shape[-1]))


def put_tokens(tensor: torch.Tensor, index: torch.Tensor, states: torch.Tensor) -> None:
    """Write `states [batch, kv_heads, n, dim]` to the slots `index [batch, kv_heads, n]`, in place."""
    found = _by_row(tensor)
    if found is None:
        tensor.scatter_(2, index[..., None].expand(states.shape), states)
    else:
        rows, step = found
        rows.index_copy_(0, _row_index(index, step), states.reshape(-1, states.shape[-1]))


def _by_row(tensor: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """All of `[batch, kv_heads, tokens, dim]` as rows `[n, dim]`, a view, and how many of them lie between two heads.

    None where the tensor's layout has no such view.
    """
    batch, heads, tokens, dim = tensor.shape
    if not tensor.numel() or tensor.stride(3) != 1 or tensor.stride(2) != dim:
        return None
    between = tensor.stride(1 if heads > 1 else 0)
    if between % dim or (batch > 1 and heads > 1 and tensor.stride(0) != heads * between):
        return None
    step = between // dim
    return tensor.as_strided(((batch * heads - 1) * step + tokens, dim), (dim, 1)), step


def _row_index(index: torch.Tensor, step: int) -> torch.Tensor:
    """Where the slots `index [batch, kv_heads, n]` are in rows of which each head has `step`, int64, flat."""
    heads = index.shape[0] * index.shape[1]
    if heads == 1 or step == 0:
        return index.flatten()
    return (index + torch.arange(0, heads * step, step, device=index.device).view(*index.shape[:2], 1)).flatten()


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
