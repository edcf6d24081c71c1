"""Vector quantisation: weighted k-means on the keys; a cluster becomes one token that weighs what its members weighed.

Transformer-VQ (Lingle 2023, arXiv 2309.16354) for the count term, k-means|| (Bahmani et al. 2012, arXiv 1203.6402) for the
first centres: the form of k-means++ that draws many centres at once.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from ..data.select import top_in_order
from ..data.tokens import EXACT, PRECISION, UNUSED, WeightedTokens, concatenate
from .base import Compressor, Reference, reference_probabilities
from .merge import squared_distance

_ROUNDS = 4
_STEPS = 4
_TINY = 1e-12


def weighted_kmeans(
    points: torch.Tensor, weight: torch.Tensor, clusters: int, seed: int, steps: int = _STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted k-means, batched.

    Args:
        points: float32 `[..., tokens, dim]`.
        weight: `[..., tokens]`, at least 0; a point of weight 0 draws no centre.
        clusters: number of centres, at most `tokens`.
        seed: of the draws; equal for every leading index, so that a permutation of heads permutes the result.

    Returns:
        `(centres [..., clusters, dim], nearest [..., tokens])`.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(_TINY)
    mean = (weight[..., None] * points).sum(-2, keepdim=True)
    distance = squared_distance(points, mean)[..., 0]
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    drawn = 0
    for step in range(_ROUNDS):
        take = (clusters * (step + 1)) // _ROUNDS - drawn
        if take == 0:
            continue
        noise = torch.rand(points.shape[-2], generator=generator, dtype=torch.float32).clamp(1e-7, 1 - 1e-7)
        gumbel = -torch.log(-torch.log(noise.to(points.device)))
        draw = torch.log((weight * distance).clamp_min(1e-30)) + gumbel
        draw = torch.where(weight > 0, draw, draw - 1e6)
        index = draw.masked_fill(chosen, -torch.inf).topk(take, dim=-1).indices
        chosen = chosen.scatter(-1, index, True)
        centres = points.gather(-2, index[..., None].expand(*index.shape, points.shape[-1]))
        distance = torch.minimum(distance, squared_distance(points, centres).amin(-1))
        drawn += take
    index = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :clusters]
    centres = points.gather(-2, index[..., None].expand(*index.shape, points.shape[-1]))
    nearest = squared_distance(points, centres).argmin(-1)
    for _ in range(steps):
        member = torch.nn.functional.one_hot(nearest, clusters).to(points.dtype) * weight[..., None]
        total = member.sum(-2)[..., None]
        means = member.transpose(-1, -2) @ points / total.clamp_min(_TINY)
        centres = torch.where(total > 0, means, centres)
        nearest = squared_distance(points, centres).argmin(-1)
    return centres, nearest


class VQCompressor(Compressor):
    """Pinned tokens stay; the others become at most `num_clusters` clusters. The rest of the budget is exact."""

    needs_queries: ClassVar[bool] = True
    averages_keys: ClassVar[bool] = True

    def compress(
        self,
        tokens: WeightedTokens,
        reference: Reference,
        width: int,
        budget: torch.Tensor | None = None,
        least: int | None = None,
    ) -> WeightedTokens:
        """See `Compressor.compress`."""
        fewest = width if least is None else least
        pins = max(self.config.min_importance_tokens, round(self.config.importance_ratio * fewest))
        clusters = max(1, min(self.config.num_clusters, fewest - pins))
        exact_width = width - clusters
        exact_budget = None if budget is None else (budget - clusters).clamp_min(0)
        index, picked = top_in_order(reference.weight, tokens.valid, exact_width, exact_budget, reference.pinned)
        exact = tokens.gather(index).where_valid(picked)
        exact.tier = torch.where(picked, torch.where(exact.count == 1, EXACT, PRECISION), UNUSED).to(torch.int8)
        taken = torch.zeros_like(tokens.valid).scatter(2, index, picked)
        made, nearest = self.cluster(tokens, reference, tokens.valid & ~taken, clusters)
        if budget is not None:
            # There is always room for a cluster, but for a head that may keep nothing.
            made = made.where_valid(made.valid & (torch.arange(clusters, device=index.device) < budget[..., None]))
        both = concatenate([exact, made])
        order = torch.where(both.valid, both.pos, torch.inf).argsort(dim=2, stable=True)
        places = torch.arange(exact_width, device=index.device).expand_as(index)
        assigned = (exact_width + nearest).scatter(
            2, index, torch.where(picked, places, exact_width + nearest.gather(2, index))
        )
        reference.assigned = order.argsort(dim=2).gather(2, assigned)
        return both.gather(order)

    def cluster(
        self, tokens: WeightedTokens, reference: Reference, member: torch.Tensor, clusters: int
    ) -> tuple[WeightedTokens, torch.Tensor]:
        """The tokens where `member [batch, kv_heads, tokens]` is True as `clusters` weighted tokens.

        A cluster's key is the mass-weighted mean key, its value the mass-weighted mean value, its `beta` the log of the
        members' attention over what the mean key draws by itself; an empty cluster is an unused slot. Returns the clusters
        and each token's nearest, int64 `[batch, kv_heads, tokens]`.
        """
        if reference.queries is not None:
            probabilities, normaliser = reference_probabilities(tokens, reference)
            mass = probabilities.mean(2)
        else:
            mass = tokens.count.float()
        mass = (mass * member).clamp_min(0)
        weight = torch.where(member, mass.clamp_min(_TINY), 0.0)
        points = tokens.keys.float()
        _, nearest = weighted_kmeans(points, weight, clusters, self.config.seed)
        assigned = torch.nn.functional.one_hot(nearest, clusters).float() * member[..., None]
        share = assigned * weight[..., None]
        total = share.sum(2)
        used = assigned.sum(2) > 0
        mean = share.transpose(-1, -2) / total.clamp_min(_TINY)[..., None]
        keys = (mean @ points).to(tokens.keys.dtype)
        values = (mean @ tokens.values.float()).to(tokens.values.dtype)
        # A cluster of one is that token as it was, to the bit.
        single = assigned.sum(2) == 1
        member_index = assigned.argmax(2)
        alone = tokens.gather(member_index)
        keys = torch.where(single[..., None], alone.keys, keys)
        values = torch.where(single[..., None], alone.values, values)
        beta = torch.zeros_like(total)
        if reference.queries is not None and reference.log_mass:
            own = torch.exp(reference.queries.logits(keys).flatten(2, 3) - normaliser).mean(2)
            beta = torch.log(total.clamp_min(1e-30)) - torch.log(own.clamp_min(1e-30))

        beta = torch.where(single, alone.beta, beta)

        def summed(field: torch.Tensor) -> torch.Tensor:
            return (assigned * field.float()[..., None]).sum(2)

        def largest(field: torch.Tensor) -> torch.Tensor:
            return (assigned * field[..., None]).amax(2)

        made = WeightedTokens(
            keys=keys,
            values=values,
            beta=torch.where(used, beta, -torch.inf),
            pos=(mean @ tokens.pos[..., None])[..., 0],
            score=largest(tokens.score),
            mass=summed(tokens.mass),
            square=largest(tokens.square),
            count=summed(tokens.count).round().int(),
            tier=torch.where(used, PRECISION, UNUSED).to(torch.int8),
        )
        if tokens.exact:
            made.exact_keys = torch.where(single[..., None], alone.exact_keys, keys)
            made.exact_pos = torch.where(single, alone.exact_pos, made.pos)
        return made, nearest
