"""The methods users know, as policies of the same layer, so that a comparison differs in nothing but the method.

Each evicts: what is not kept is gone, nothing is merged and `beta` stays 0. StreamingLLM needs no policy: it is the cache
without a middle (`enable_streaming_llm`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedModel

from .cache import ADMSKVCache
from .compressors import register_compressor
from .compressors.base import Compressor, Reference, reference_probabilities
from .config import ADMSConfig, tell_settings
from .data.select import top_in_order
from .data.tokens import WeightedTokens
from .model.enable import enable_adms_llm, enable_streaming_llm
from .settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Eviction(Compressor):
    """Keep the tokens of highest score as they are; the rest is gone."""

    conserves_mass: ClassVar[bool] = False
    keeps_pinned: ClassVar[bool] = False

    def scores(self, tokens: WeightedTokens, reference: Reference) -> torch.Tensor:
        """The method: a score for each token, float32 `[batch, kv_heads, tokens]`."""
        return tokens.score

    def compress(
        self,
        tokens: WeightedTokens,
        reference: Reference,
        width: int,
        budget: torch.Tensor | None = None,
        least: int | None = None,
    ) -> WeightedTokens:
        """See `Compressor.compress`; `count` of what is evicted is lost with it."""
        # In the order of the stream: SnapKV's pooling is over neighbours.
        index, picked = top_in_order(self.scores(tokens, reference), tokens.valid, width, budget)
        return tokens.gather(index).where_valid(picked)


class H2O(Eviction):
    """Heavy-hitter oracle (Zhang et al. 2023, arXiv 2306.14048): the attention accumulated over all queries."""

    def remember(self, tokens: WeightedTokens, mass: torch.Tensor, square: torch.Tensor, queries: int) -> None:
        """Add up what the queries attended to."""
        tokens.score.add_(mass, alpha=queries)


class SnapKV(Eviction):
    """SnapKV (Li et al. 2024, arXiv 2404.14469): the mean attention of the last `attention_window` queries, max-pooled."""

    needs_queries: ClassVar[bool] = True
    kernel_size: ClassVar[int] = 5

    def scores(self, tokens: WeightedTokens, reference: Reference) -> torch.Tensor:
        """Mean over the window's queries of all heads of a group, pooled over neighbours."""
        if reference.queries is None:
            return tokens.score
        queries = reference.queries.last(self.config.attention_window)
        probabilities = reference_probabilities(tokens, Reference(**{**vars(reference), "queries": queries}))[0]
        return torch.nn.functional.max_pool1d(
            probabilities.mean(2), self.kernel_size, stride=1, padding=self.kernel_size // 2
        )


class TOVA(Eviction):
    """TOVA (Oren et al. 2024, arXiv 2401.06104): the last query's attention, averaged over the heads of a layer."""

    def scores(self, tokens: WeightedTokens, reference: Reference) -> torch.Tensor:
        """The newest query's probabilities, the same for all heads."""
        if reference.queries is None:
            return tokens.score
        newest = Reference(**{**vars(reference), "queries": reference.queries.last(1)})
        probabilities = reference_probabilities(tokens, newest)[0].mean(2)
        return probabilities.mean(1, keepdim=True).expand(probabilities.shape)


BASELINES: dict[str, type[Compressor] | None] = {"streaming": None, "h2o": H2O, "snapkv": SnapKV, "tova": TOVA}
for _name, _policy in BASELINES.items():
    if _policy is not None:
        register_compressor(_name, _policy)


@tell_settings(without=("compressor_type", "importance_ratio", "min_importance_tokens"))
def enable_baseline(model: PreTrainedModel, name: str, **settings: Unpack[Settings]) -> ADMSKVCache:
    """Wire a model for one of `BASELINES` and return its cache.

    `compressed_budget` is the number of middle tokens the method may choose; StreamingLLM, which chooses none, gets them as
    part of its recent window. So equal settings are equal tokens.

    Args:
        model: as for `enable_adms_llm`.
        name: one of `BASELINES`.
        **settings: as for `enable_adms_llm`.
    """
    if name not in BASELINES:
        raise ValueError(f"name={name!r} must be one of {', '.join(BASELINES)}")
    if name == "streaming":
        given = {name: settings.pop(name) for name in ("recent_size", "compressed_budget") if name in settings}
        sizes = ADMSConfig(**{"compressed_budget": 0, "min_importance_tokens": 0, **given})
        settings["recent_size"] = sizes.recent_size + sizes.compressed_budget
        for unused in ("min_importance_tokens", "compressor_type", "importance_ratio"):
            settings.pop(unused, None)
        return enable_streaming_llm(model, **settings)
    return enable_adms_llm(
        model, **{**settings, "compressor_type": name, "importance_ratio": 0.0, "min_importance_tokens": 0}
    )
