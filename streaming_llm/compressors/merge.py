"""Joining tokens into those that stay, with their attention mass.

The count term follows Transformer-VQ (Lingle 2023, arXiv 2309.16354): a token that stands for others must weigh as much in
the softmax as they did. Here the weights are the attention masses the recent queries really gave.
"""

from __future__ import annotations

import torch

from ..data.select import add_tokens, gather_tokens, top_in_order
from ..data.tokens import EXACT, PRECISION, UNUSED, WeightedTokens, squared_norm
from .base import Reference

_TINY = 1e-12
# Share of the average mass below which a kept token takes no others in.
_FAINT = 0.1


def value_scale(tokens: WeightedTokens, reference: Reference) -> torch.Tensor:
    """What values are multiplied by to stand beside keys in a distance, `[batch, kv_heads, 1, 1]`.

    Letting `c` stand for `j` changes the output by about `p_j (|q.(k_j - k_c)| * scale * |v| + |v_j - v_c|)`. For queries of
    mean square length `Q` in `d` dimensions the square of the first term is `|k_j - k_c|^2 * Q * scale^2 / d * |v|^2` on
    average, so differences of values count `1 / (Q * scale^2 / d * |v|^2)` as much as those of keys. Without queries, logits
    are taken to vary by 2.5 over the keys, which is what trained models have.
    """
    valid = tokens.valid[..., None]
    total = valid.sum(2, keepdim=True).clamp_min(1)
    value_energy = (squared_norm(tokens.values)[..., None] * valid).sum(2, keepdim=True) / total
    if reference.queries is not None:
        per_dimension = reference.queries.energy()[..., None, None]
    else:
        keys = tokens.keys.float() * valid
        mean = keys.sum(2, keepdim=True) / total
        spread = ((keys - mean) * valid).square().sum((2, 3), keepdim=True) / total
        per_dimension = 2.5**2 / spread.clamp_min(_TINY)
    return (per_dimension * value_energy).clamp_min(_TINY).rsqrt()


def features(keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys and scaled values side by side, float32 `[batch, kv_heads, tokens, head_dim + value_dim]`."""
    return torch.cat([keys.float(), values.float() * scale], dim=-1)


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
    valid = tokens.valid
    kept = tokens.gather(index).where_valid(picked)
    kept_mask = torch.zeros_like(valid).scatter_(2, index, picked)
    joining = valid & ~kept_mask
    pinned = gather_tokens(reference.pinned, index) & picked

    accepts = picked
    if reference.log_mass:
        # What draws next to nothing would need a huge log-mass to stand for others, and explode for the query it suits.
        average = kept.mass.sum(-1, keepdim=True) / picked.sum(-1, keepdim=True).clamp_min(1)
        accepts = picked & (kept.mass >= _FAINT * average)
    if protect_exact:
        others = accepts & ~pinned
        others = torch.where(others.any(-1, keepdim=True), others, picked & ~pinned)
        accepts = torch.where(others.any(-1, keepdim=True), others, accepts)

    # Those that join go first; how many there are is bounded by the shapes, so nothing has to be asked of the device.
    order = joining.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, : tokens.length - least]
    gone_count = gather_tokens(tokens.count * joining, order)
    gone_keys, gone_values = gather_tokens(tokens.keys, order).float(), gather_tokens(tokens.values, order).float()
    scale = value_scale(tokens, reference).square()
    # |gone|^2 is the same for every candidate, so it takes no part in the choice.
    length = squared_norm(kept.keys) + squared_norm(kept.values) * scale[..., 0]
    distance = length.masked_fill(~accepts, torch.inf).flatten(0, 1)[:, None]
    own_keys, own_values = (states.float().flatten(0, 1).transpose(-1, -2) for states in (kept.keys, kept.values))
    distance = torch.baddbmm(distance, gone_keys.flatten(0, 1), own_keys, alpha=-2)
    distance.baddbmm_((gone_values * scale).flatten(0, 1), own_values, alpha=-2)
    nearest = distance.min(dim=-1).indices.unflatten(0, valid.shape[:2])
    places = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    assigned = torch.zeros_like(valid, dtype=torch.int64).scatter_(2, index, places)
    reference.assigned = assigned.scatter(
        2, order, torch.where(gather_tokens(joining, order), nearest, assigned.gather(2, order))
    )

    if reference.log_mass:
        mass_kept = kept.mass.clamp_min(_TINY)
        mass_gone = gather_tokens(reference.mass * joining, order)
    else:
        mass_kept, mass_gone = kept.count.float(), gone_count.float()

    total = mass_kept.scatter_add(2, nearest, mass_gone)
    count = kept.count.scatter_add(2, nearest, gone_count)
    changed = count != kept.count
    # What joins moves the value it joins, so that values nothing joins are not touched.
    share = (mass_gone / total.clamp_min(_TINY).gather(2, nearest))[..., None]
    values = kept.values if kept.values.dtype.itemsize >= 4 else kept.values.float()
    add_tokens(values, nearest, gone_values * share - gather_tokens(values, nearest) * share)
    kept.values = values.to(kept.values.dtype)
    kept.tier = torch.where(picked, torch.where(pinned & (count == 1), EXACT, PRECISION), UNUSED).to(torch.int8)
    kept.count = count
    if reference.log_mass:
        kept.beta = torch.where(changed & picked, kept.beta + torch.log(total / mass_kept), kept.beta)
        kept.mass = torch.where(changed, total, kept.mass)
    return kept


def keep_best(
    tokens: WeightedTokens,
    reference: Reference,
    priority: torch.Tensor,
    width: int,
    budget: torch.Tensor | None,
    least: int,
    protect_exact: bool = False,
) -> WeightedTokens:
    """Keep the pinned tokens and, of the others, those of highest priority (at least 0); the rest joins them.

    Arguments as for `merge_into` and `Compressor.compress`. The kept tokens come in the order they had.
    """
    index, picked = top_in_order(priority, tokens.valid, width, budget, reference.pinned)
    return merge_into(tokens, reference, index, picked, least, protect_exact)
