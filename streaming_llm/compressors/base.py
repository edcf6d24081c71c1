"""What a compressor is: weighted tokens, reference queries and a budget in; at most that many weighted tokens out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..config import ADMSConfig
from ..data.queries import Queries
from ..data.tokens import WeightedTokens
from ..maths.importance import attention_logits, remember


@dataclass
class Reference:
    """What is known about how the tokens are attended to.

    Attributes:
        weight: how much each token matters, float32 `[batch, kv_heads, tokens]`: the remembered score, or the importance
            where no query was seen.
        mass: mean attention probability of the recent queries, as `weight`; 0 everywhere where no query was seen.
        pinned: tokens chosen by importance: they come out as tokens of their own, key unchanged. Bool, as `weight`.
        queries: the newest queries (the last one belongs to the last token of `context`), None where none was seen.
        context: everything the head holds, in the cache's order (sinks, middle, recent window), for the softmax.
        start: index in `context` of the first of the tokens.
        log_mass: False where the model's attention does not see `beta`: merged tokens then keep `beta` = 0.
        assigned: for `compress` to fill in: which of the returned slots each token went to, int64 as `weight`. Where it
            stays None no originals are kept of what was compressed. `merge.keep_best` fills it in.
    """

    weight: torch.Tensor
    mass: torch.Tensor
    pinned: torch.Tensor
    queries: Queries | None
    context: WeightedTokens
    start: int
    log_mass: bool = True
    assigned: torch.Tensor | None = field(default=None, kw_only=True)


class Compressor:
    """Base of all compressors. A subclass implements `compress` and is made known with `register_compressor`.

    Class attributes:
        needs_queries: True to have the last `attention_window` queries stored for `compress`; otherwise those since the
            last compaction are there.
        averages_keys: True where keys of made tokens are averages, whose positions may then be calibrated.
        conserves_mass: False for a method that drops tokens: `check_compressor` then does not ask for their `count` and
            attention mass.
        keeps_pinned: False for a method that chooses for itself: `check_compressor` then does not ask for pinned tokens.
    """

    needs_queries: ClassVar[bool] = False
    averages_keys: ClassVar[bool] = False
    conserves_mass: ClassVar[bool] = True
    keeps_pinned: ClassVar[bool] = True

    def __init__(self, config: ADMSConfig):
        self.config = config
        self.fallbacks: torch.Tensor | None = None

    def count_fallbacks(self, solved: torch.Tensor) -> None:
        """Add the heads where a solver gave up (`solved` False) to `fallbacks`, without waiting for the device."""
        failed = (~solved).sum()
        self.fallbacks = failed if self.fallbacks is None else self.fallbacks + failed.to(self.fallbacks.device)

    def remember(self, tokens: WeightedTokens, mass: torch.Tensor, square: torch.Tensor, queries: int) -> None:
        """Fold what `queries` new queries attended to into the tokens' `mass`, `square` and `score`, in place.

        The default is `importance.remember`; a method that scores tokens in its own way overrides it.

        Args:
            mass, square: mean attention probability and its mean square over the queries `[batch, kv_heads, tokens]`.
        """
        remember(tokens, mass, square, queries, self.config.attention_window, self.config.score_decay)

    def compress(
        self,
        tokens: WeightedTokens,
        reference: Reference,
        width: int,
        budget: torch.Tensor | None = None,
        least: int | None = None,
    ) -> WeightedTokens:
        """Reduce the middle of every head of a layer, batched.

        Args:
            tokens: candidates `[batch, kv_heads, tokens, ...]`; slots with `beta = -inf` hold nothing.
            reference: how they are attended to, and which of them are pinned.
            width: slots to return, more than 0 and less than `tokens.length`.
            budget: tokens each head may return `[batch, kv_heads]`, at most `width`; None for `width` everywhere.
            least: a lower bound of `budget` known without asking the device; None for `width`.

        Returns:
            `width` slots; those beyond a head's budget unused (`beta = -inf`). They come in the order of their
            positions, and their `count` sums to the tokens'. The tokens given stay as they are.
        """
        raise NotImplementedError


def check_made(
    name: str, made: WeightedTokens, reference: Reference, tokens: WeightedTokens, width: int, budget: torch.Tensor | None
) -> None:
    """Raise `TypeError` or `ValueError` naming the compressor where its result does not fit into the layer's buffer.

    Shapes, dtypes and devices everywhere; finite numbers and budgets only on a CPU, where looking costs no wait.
    Arguments as for `Compressor.compress`, which gave `made`.
    """
    if not isinstance(made, WeightedTokens):
        raise TypeError(f"compressor {name} returned {type(made).__name__}, not WeightedTokens")
    for field_name, like in tokens.tensors().items():
        tensor = made.field(field_name)
        got = tuple(tensor.shape), tensor.dtype, tensor.device
        expected = (*like.shape[:2], width, *like.shape[3:]), like.dtype, like.device
        if got != expected:
            raise ValueError(f"compressor {name} returned {field_name} of {_words(*got)}; {_words(*expected)} is asked for")
    to = reference.assigned
    if to is not None and (to.shape, to.dtype) != (tokens.beta.shape, torch.int64):
        raise ValueError(
            f"compressor {name} set reference.assigned of {_words(tuple(to.shape), to.dtype, to.device)}; "
            f"{_words(tuple(tokens.beta.shape), torch.int64, tokens.beta.device)} is asked for"
        )
    if made.beta.device.type != "cpu":
        return
    if not _finite(made.keys, made.values, made.beta.masked_fill(~made.valid, 0), made.mass, made.score):
        raise ValueError(f"compressor {name} returned NaN or infinity")
    if budget is not None and bool((made.valid.sum(-1) > budget).any()):
        raise ValueError(f"compressor {name} returned more tokens than a head's budget")


def _finite(*tensors: torch.Tensor) -> bool:
    """Whether all numbers are finite. A sum that is tells so at a tenth of the cost; of large numbers it may not be."""
    total = sum(float(tensor.sum()) for tensor in tensors)
    return math.isfinite(total) or all(bool(tensor.isfinite().all()) for tensor in tensors)


def _words(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {list(shape)}, {dtype}, on {device}"


def reference_probabilities(tokens: WeightedTokens, reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the reference queries: probabilities of the tokens, and each query's log-normaliser over all held.

    Returns:
        `(probabilities, normaliser)`, float32 `[batch, kv_heads, queries, tokens]` and `[batch, kv_heads, queries, 1]`,
        where queries = groups * window.
    """
    queries = reference.queries
    logits = attention_logits(queries, reference.context.keys, reference.context.beta).flatten(2, 3)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    probabilities = torch.exp(logits[..., reference.start : reference.start + tokens.length] - normaliser)
    return probabilities, normaliser
