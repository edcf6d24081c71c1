"""Attention matching: keep real keys, then fit log-masses and values so that attention mass and output stay.

Follows Attention Matching (Zweiger et al., arXiv 2602.16284), made incremental: the fit is a ridge regression towards what
merging gives, because an unregularised fit follows the window's queries and diverges on a stream.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..data.tokens import CHANGED, WeightedTokens, as_held
from .base import Compressor, Reference, reference_probabilities
from .merge import keep_best

_RIDGE = 0.1
_QUERY_STEP = 2
_MASS_RANGE = (0.05, 20.0)


def ridge_towards(
    design: torch.Tensor, target: torch.Tensor, start: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise `|design x - target|^2 + ridge * mean(diag(design' design)) * |x - start|^2` in float32.

    Args:
        design: `[..., rows, unknowns]`; target: `[..., rows, columns]`; start: `[..., unknowns, columns]`.

    Returns:
        `(x, solved)`: the solution, and whether the Cholesky factorisation succeeded (`[...]`, bool); where it did not
        (the ridge makes that an accident of NaN or overflow), `x` is `start`.
    """
    gram = design.transpose(-1, -2) @ design
    level = torch.diagonal(gram, dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-20)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * level * eye)
    residual = design.transpose(-1, -2) @ (target - design @ start)
    step = torch.cholesky_solve(residual, factor)
    solved = (failed == 0) & step.isfinite().all(-1).all(-1)
    return torch.where(solved[..., None, None], start + step, start), solved


class AttentionMatchingCompressor(Compressor):
    """Keep the tokens of highest remembered score, merge the rest into them, then fit masses and values."""

    needs_queries: ClassVar[bool] = True

    def compress(
        self,
        tokens: WeightedTokens,
        reference: Reference,
        width: int,
        budget: torch.Tensor | None = None,
        least: int | None = None,
    ) -> WeightedTokens:
        """See `Compressor.compress`. Without queries, or without log-mass, nothing is fitted: the merge stands."""
        least = width if least is None else least
        kept = keep_best(tokens, reference, reference.weight, width, budget, least, self.config.protect_exact)
        if reference.queries is None or not reference.log_mass:
            return kept
        sampled = dataclasses.replace(reference, queries=reference.queries.every(_QUERY_STEP))
        truth, normaliser = reference_probabilities(tokens, sampled)
        target_mass = truth.sum(-1, keepdim=True)
        target = truth @ (tokens.values.float() * tokens.valid[..., None])
        logits = sampled.queries.logits(kept.keys).flatten(2, 3)
        design = torch.exp(logits + kept.beta[:, :, None] - normaliser)
        ones = torch.ones_like(kept.beta)[..., None]
        factor, mass_solved = ridge_towards(design, target_mass, ones, _RIDGE)
        free = kept.valid
        if self.config.protect_exact:
            free = free & (kept.count > 1)
        factor = torch.where(free, factor[..., 0].clamp(*_MASS_RANGE), 1.0)
        # The clamp may have moved the total: bring it back, so that the mass is conserved as the merge conserved it.
        before, after = target_mass.sum((2, 3)), (design @ factor[..., None]).sum((2, 3))
        factor = torch.where(free, factor * (before / after.clamp_min(1e-20))[..., None], 1.0)
        design = design * factor[:, :, None]
        values, value_solved = ridge_towards(design, target, kept.values.float(), _RIDGE)
        self.count_fallbacks(mass_solved & value_solved)
        values = torch.where(free[..., None], values, kept.values.float())
        beta = kept.beta + factor.log()
        beta = torch.where(free & (beta == 0), CHANGED, beta)
        return dataclasses.replace(kept, values=as_held(values, kept.values.dtype), beta=beta, mass=kept.mass * factor)
