"""A model that nobody tested is tried itself: a few short passes show whether this cache can be right for it.

Each check holds the model to what `transformers.DynamicCache` gives it. Nothing of the model is changed afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..cache import ADMSKVCache
from ..config import ADMSConfig
from ..layer import ADMSLayer
from ..sizing import ModelShape
from .facts import cache_argument
from .rope_reading import evaluating, restore_frequencies, rope_layers
from .wrappers import find_decoder

# Sizes of the passes: below the bound of the first cache, and past that of the second, by chunks and token by token.
BELOW, PAST = (9, 1, 1), (14, 5, 1, 1, 1, 7, 1, 1, 1, 1)
_SIZES = {"start_size": 2, "recent_size": 6, "compressed_budget": 6, "min_importance_tokens": 2, "compression_interval": 4}


def probe_model(model: PreTrainedModel, cached: Callable[[ADMSConfig], ADMSKVCache]) -> None:
    """Raise `ValueError`, naming the check and what it means, unless the cache is right for the model.

    Args:
        model: any that can be wired.
        cached: wires the model and makes it a cache of these settings.
    """
    with _as_it_was(model), torch.no_grad():
        _Probe(model, cached).run()


class _Probe:
    def __init__(self, model: PreTrainedModel, cached: Callable[[ADMSConfig], ADMSKVCache]):
        self.model, self.cached, self.argument = model, cached, cache_argument(model)

    def run(self) -> None:
        with self._check("shape", "the config does not say what shape its keys have"):
            rank = min(4, ModelShape.of(self.model.config).head_dim)
            vocabulary = self.model.get_input_embeddings().weight
            generator = torch.Generator().manual_seed(0)
            # From the middle of the vocabulary: its ends hold padding and special tokens.
            size = vocabulary.shape[0]
            ids = torch.randint(size // 4, max(size // 4 + 1, 3 * size // 4), (1, sum(PAST)), generator=generator)
            ids = ids.to(vocabulary.device)
            find_decoder(self.model).config.num_hidden_layers  # noqa: B018
        with self._check("RoPE", "its positions can't be read, so that stored keys can't be moved"):
            rope_layers(self.model)
        with self._check("cache", "it does not go on from the cache it is given"):
            cache = DynamicCache(config=self.model.config)
            below = self._read(ids, BELOW, cache)
            _require(cache.get_seq_length() == sum(BELOW), f"of {sum(BELOW)} tokens {cache.get_seq_length()} were stored")
            full = self._read(ids, PAST, DynamicCache(config=self.model.config))
        # Half the digits: what is lost otherwise is of the size of the logits themselves.
        eps, spread = torch.finfo(self.model.dtype).eps, (full.amax() - full.amin()).item()
        with self._check("queries", "its attention is not reached by this cache, neither queries nor log-mass"):
            own = self._read(ids, BELOW, self.cached(ADMSConfig(rank=rank, **_SIZES | {"recent_size": sum(BELOW)})))
        with self._check("below the bound", "the logits are not those that DynamicCache gives"):
            off = (own - below).abs().max().item()
            _require(off <= 32 * eps * max(1.0, below.abs().max().item()), f"they are {off:.3g} off")
        with self._check("past the bound", "it does not go on once tokens are compacted"):
            cache = self.cached(ADMSConfig(rank=rank, **_SIZES))
            own = self._read(ids, PAST, cache)
            _require(bool(own.isfinite().all()), "its logits are NaN or infinite")
            held, most = cache.held_tokens, cache.config.expected_max_tokens
            _require(held <= most, f"the cache holds {held} tokens, of {most} that it may")
            compacted = [layer.compacted for layer in cache.layers if isinstance(layer, ADMSLayer)]
            _require(bool(compacted) and all(compacted), "no layer, or not every one, was compacted")
        with self._check("log-mass", "a token that stands for others does not count as these did"):
            recalling = {"enable_recall": True, "recall_rank": rank, "recall_budget": 64, "recall_chunk_budget": 64}
            own = self._read(ids, PAST, self.cached(ADMSConfig(rank=rank, **_SIZES, **recalling)))
            off = (own - full).abs().max().item() / (spread or 1.0)
            _require(off <= 4 * eps**0.5, f"with everything recalled the logits are off by {off:.3g} of their range")

    def _read(self, ids: torch.Tensor, sizes: tuple[int, ...], cache: Any) -> torch.Tensor:
        """Logits float32 `[1, tokens, vocabulary]` of tokens given in passes of these sizes."""
        parts, start = [], 0
        for size in sizes:
            given = {"input_ids": ids[:, start : start + size], self.argument: cache, "use_cache": True}
            parts.append(self.model(**given).logits.float())
            start += size
        return torch.cat(parts, dim=1)

    @contextlib.contextmanager
    def _check(self, name: str, meaning: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kind = self.model.config.model_type
            raise ValueError(
                f"model type {kind!r} can't be enabled: of its probe the check {name!r} failed, {meaning} ({error})"
            ) from error


def _require(right: bool, otherwise: str) -> None:
    if not right:
        raise ValueError(otherwise)


@contextlib.contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Random numbers, modes and buffers as before, whatever happens."""
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"})
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=devices), evaluating(model):
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # one without a decoder has no frequencies
                restore_frequencies(model)
            for name, buffer in model.named_buffers():
                kept = buffers.get(name)
                if kept is not None and kept.shape == buffer.shape and not torch.equal(kept, buffer):
                    buffer.copy_(kept)
