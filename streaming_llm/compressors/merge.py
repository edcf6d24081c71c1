"""Joining tokens into those that stay, with their attention mass.

The count term follows Transformer-VQ (Lingle 2023, arXiv 2309.16354): a token that stands for others must weigh as much in
the softmax as they did. Here the weights are the attention masses the recent queries really gave.
"""

from __future__ import annotations

import dataclasses

import torch

from ..tokens import EXACT, PRECISION, UNUSED, WeightedTokens, gather_tokens, top_slots
from .base import Reference

_TINY = 1e-12


def value_scale(tokens: WeightedTokens) -> torch.Tensor:
    """What values are multiplied by to stand beside keys in a distance, `[batch, kv_heads, 1, 1]`.

    Scaled so that keys and values vary equally much over the middle: differences of keys move the attention weights,
    differences of values move the output, and neither alone tells which token may stand for which.
    """
    valid = tokens.valid[..., None]
    total = valid.sum(2, keepdim=True).clamp_min(1)

    def variance(states: torch.Tensor) -> torch.Tensor:
        states = states.float() * valid
        mean = states.sum(2, keepdim=True) / total
        return (((states - mean) * valid).square().sum((2, 3), keepdim=True) / total).clamp_min(_TINY)

    return (variance(tokens.keys) / variance(tokens.values)).sqrt()


def features(tokens: WeightedTokens, scale: torch.Tensor) -> torch.Tensor:
    """Keys and scaled values side by side, float32 `[batch, kv_heads, tokens, head_dim + value_dim]`."""
    return torch.cat([tokens.keys.float(), tokens.values.float() * scale], dim=-1)


def squared_distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances `[..., m, n]` between rows of `left [..., m, dim]` and `right [..., n, dim]`."""
    product = left @ right.transpose(-1, -2)
    distance = left.square().sum(-1)[..., :, None] + right.square().sum(-1)[..., None, :] - 2 * product
    return distance.clamp_min_(0.0)


def merge_into(
    tokens: WeightedTokens,
    reference: Reference,
    index: torch.Tensor,
    picked: torch.Tensor,
    least: int,
    protect_exact: bool = False,
) -> WeightedTokens:
    """Keep the picked tokens; every other one joins the nearest of them.

    With `r` the mean attention probability, a kept token `c` and those `j` that join it:
    `beta_c += log(sum r_j / r_c)`, `v_c = sum r_j v_j / sum r_j` (sums over `c` and all `j`), `k_c` unchanged. The total
    mass under the reference queries stays as it was. A token that joins twice is weighted by the mass it already carries.

    Args:
        tokens: the candidates.
        reference: masses and pinned tokens.
        index: slots to keep `[batch, kv_heads, width]`, each at most once.
        picked: which of them are really kept (the others become unused slots).
        least: tokens that every head with that many valid ones keeps: bounds how many can join, without asking the device.
        protect_exact: nothing joins a pinned token, where a head keeps any other.

    Returns:
        `width` slots in the order of `index`.
    """
    batch, heads, width = index.shape
    valid = tokens.valid
    kept = tokens.gather(index).where_valid(picked)
    kept_mask = torch.zeros_like(valid).scatter(2, index, picked)
    joining = valid & ~kept_mask
    pinned = gather_tokens(reference.pinned, index) & picked

    accepts = picked
    if protect_exact:
        others = picked & ~pinned
        accepts = torch.where(others.any(-1, keepdim=True), others, picked)

    order = joining.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, : tokens.length - least]
    gone = tokens.gather(order)
    gone_mask = gather_tokens(joining, order)

    scale = value_scale(tokens)
    distance = squared_distance(features(gone, scale), features(kept, scale))
    distance.masked_fill_(~accepts[:, :, None, :], torch.inf)
    nearest = distance.argmin(dim=-1)

    if reference.log_mass:
        mass_kept = gather_tokens(reference.mass, index).clamp_min(_TINY)
        mass_gone = gather_tokens(reference.mass, order)
    else:
        mass_kept, mass_gone = kept.count.float(), gone.count.float()
    mass_gone = mass_gone * gone_mask

    joined = torch.zeros_like(mass_kept).scatter_add_(2, nearest, mass_gone)
    total = mass_kept + joined
    spread = nearest[..., None].expand(*nearest.shape, tokens.values.shape[-1])
    values = kept.values.float() * mass_kept[..., None]
    values = values.scatter_add_(2, spread, gone.values.float() * mass_gone[..., None]) / total.clamp_min(_TINY)[..., None]
    count = kept.count.scatter_add(2, nearest, gone.count * gone_mask)
    changed = count != kept.count

    beta = kept.beta
    if reference.log_mass:
        beta = beta + torch.log(total / mass_kept)
    return dataclasses.replace(
        kept,
        values=torch.where(changed[..., None], values.to(kept.values.dtype), kept.values),
        beta=torch.where(picked, beta, -torch.inf),
        mass=torch.where(picked, torch.where(changed, total, kept.mass), 0.0) if reference.log_mass else kept.mass,
        count=count,
        tier=torch.where(picked, torch.where(pinned & (count == 1), EXACT, PRECISION), UNUSED).to(torch.int8),
    )



def keep_best(
    tokens: WeightedTokens,
    reference: Reference,
    priority: torch.Tensor,
    width: int,
    budget: torch.Tensor | None,
    least: int,
    protect_exact: bool = False,
) -> tuple[WeightedTokens, torch.Tensor]:
    """Keep the pinned tokens and, of the others, those of highest priority (at least 0); the rest joins them.

    Returns:
        The kept tokens in the order they had, and their slots in `tokens` `[batch, kv_heads, width]`.
    """
    lift = priority.masked_fill(~tokens.valid, 0.0).amax(-1, keepdim=True) + 1.0
    index, picked = top_slots(priority + reference.pinned * lift, tokens.valid, width, budget)
    order = torch.where(picked, index, tokens.length).argsort(dim=2)
    index, picked = index.gather(2, order), picked.gather(2, order)
    return merge_into(tokens, reference, index, picked, least, protect_exact), index
