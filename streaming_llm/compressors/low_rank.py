"""Low rank: keep the tokens that span what the head's keys do, by leverage in a rank-r subspace.

Leverage scores follow Mahoney & Drineas (2009, "CUR matrix decompositions"), with the ridge of Alaoui & Mahoney (2015,
arXiv 1411.0306); the subspace is found by subspace iteration (Halko, Martinsson & Tropp 2011). Kept keys stay as they are:
projecting them onto the subspace was measured and made every result worse (see ADM_PLUS_PLUS_IMPLEMENTATION.md).
"""

from __future__ import annotations

import functools

import torch

from ..data.select import gather_tokens, top_slots
from ..data.tokens import WeightedTokens
from .base import Compressor, Reference
from .merge import keep_best

_RIDGE = 0.01
_ITERATIONS = 2
_ROUNDING = torch.finfo(torch.float32).eps


@functools.lru_cache(maxsize=8)
def _start(dim: int, rank: int, device: torch.device) -> torch.Tensor:
    return torch.randn(dim, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)


def leading_subspace(covariance: torch.Tensor, rank: int, iterations: int = _ITERATIONS) -> torch.Tensor:
    """Orthonormal basis `[..., dim, rank]` of the leading eigenvectors of `covariance [..., dim, dim]` (float32).

    Subspace iteration from a fixed start, so equal input gives equal output and no decomposition of the whole is needed.
    """
    dim = covariance.shape[-1]
    start = _start(dim, rank, covariance.device)
    scale = torch.diagonal(covariance, dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)[..., None, None]
    basis = start.expand(*covariance.shape[:-2], dim, rank)
    for _ in range(iterations):
        basis = torch.linalg.qr((covariance / scale) @ basis + 1e-7 * start).Q
    return basis


class LowRankCompressor(Compressor):
    """Keep the tokens of highest leverage, weighted by their remembered score; the rest joins them with its mass."""

    def leverage(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Ridge leverage of each token in the rank-r subspace of the weighted, centred states.

        Args:
            states: one row a token, float32 `[batch, kv_heads, tokens, dim]`.
            weight: `[batch, kv_heads, tokens]`, at least 0; tokens of weight 0 take no part and get 0.

        Returns:
            float32 `[batch, kv_heads, tokens]`, each in [0, rank].
        """
        root = (weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)).sqrt()[..., None]
        rows = states * root
        fitted, fitted_root = rows, root
        if states.shape[2] > self.config.svd_max_tokens:
            index, picked = top_slots(weight, weight > 0, self.config.svd_max_tokens)
            fitted_root = gather_tokens(root, index) * picked[..., None]
            fitted = gather_tokens(states, index) * fitted_root
            total = fitted_root.square().sum(2, keepdim=True).clamp_min(1e-30)
            fitted, fitted_root = fitted / total.sqrt(), fitted_root / total.sqrt()
        # Centring takes place on the small matrices: the sum of (x - m)(x - m)' is that of xx' less mm'.
        mean = fitted_root.transpose(-1, -2) @ fitted
        covariance = fitted.transpose(-1, -2) @ fitted - mean.transpose(-1, -2) @ mean
        # Where keys do not differ, or there is one alone, the covariance is rounding, which is not to be magnified.
        spread = torch.diagonal(covariance, dim1=-2, dim2=-1).sum(-1)[..., None, None]
        rounding = _ROUNDING * torch.linalg.vector_norm(fitted, dim=(2, 3), keepdim=True).square() + 1e-30
        covariance = torch.where(spread > rounding, covariance, 0.0)
        basis = leading_subspace(covariance, min(self.config.rank, states.shape[-1]))
        energy = ((covariance @ basis) * basis).sum(2, keepdim=True).clamp_min(0)
        ridge = torch.maximum(_RIDGE * spread, rounding)
        code = rows @ basis - root * (mean @ basis)
        return (code.square() / (energy + ridge)).sum(-1)

    def compress(
        self,
        tokens: WeightedTokens,
        reference: Reference,
        width: int,
        budget: torch.Tensor | None = None,
        least: int | None = None,
    ) -> WeightedTokens:
        """See `Compressor.compress`."""
        weight = reference.weight.masked_fill(reference.pinned | ~tokens.valid, 0.0)
        # Keys alone: with the values beside them the result was the same, at twice the cost.
        priority = self.leverage(tokens.keys.float(), weight)
        least = width if least is None else least
        return keep_best(tokens, reference, priority, width, budget, least, self.config.protect_exact)
