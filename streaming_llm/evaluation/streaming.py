"""Runs one token stream through several caches in lockstep and compares what the model predicts.

Each chunk goes to the full cache first, then to every other method's cache, and the predictions are compared right
there, so that no logits are stored. A token's loss comes from the logits of the token before it: a chunk is given to
the model before anything in it is known to the cache, and a cache that evicts does so only after the chunk's forward.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..model.facts import cache_argument
from .errors import EvaluationError, check_least

REFERENCE = "full"
BASELINE = "streaming"
# What of a cache's `memory_report` is recall's, beside what is attended.
ARCHIVE_USES = ("archive", "index")
# Rows of logits turned into float32 probabilities at once: with 50,000 words that is some 25 MB a tensor.
ROWS = 128
CURVE_STEP = 64
DECODE_WARM_UP = 8
# Scored tokens that a running perplexity is told from on: that of a handful says nothing.
LEAST_SCORED = 64
# What StreamingLLM's perplexity must be above the full cache's for a share of the difference to mean anything.
LEAST_GAP = 0.01

CacheFactory = Callable[[], Any]


@dataclass
class Chunk:
    """One method's logits for one chunk, `[rows, vocabulary]`; row i predicts token `first_row` + i + 1."""

    method: str
    start: int
    end: int
    first_row: int
    logits: torch.Tensor
    seconds: float


@dataclass
class Curve:
    """Samples along the stream; `perplexity` is that of all tokens scored so far, None before the first."""

    tokens: list[int] = field(default_factory=list)
    perplexity: list[float | None] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    held_tokens: list[int] = field(default_factory=list)


@dataclass
class Timing:
    """Wall-clock figures of one method; shares are None for a cache that doesn't compact.

    A share is the time of all compactions over the rest of the forward passes' time, counted from the first compaction
    on, so that the cheap start of a stream doesn't flatter it.
    """

    forward_seconds: float = 0.0
    tokens_per_second: float = 0.0
    compaction_seconds: float | None = None
    compaction_share: float | None = None
    decode_tokens: int = 0
    decode_tokens_per_second: float | None = None
    decode_compaction_share: float | None = None


@dataclass
class MethodResult:
    """What one method did on all streams; `kl` (nats a token), `gap_recovered`: None with nothing to compare to, the
    latter also where StreamingLLM loses less than `LEAST_GAP`.

    `archive_bytes`: what of `cache_bytes` is recall's archive and its index, which attention does not see as a whole.
    """

    method: str
    scored_tokens: int
    nll: float
    perplexity: float
    kl: float | None
    gap_recovered: float | None
    held_tokens: int
    cache_bytes: int
    memory: dict[str, int]
    stats: dict[str, Any]
    curve: Curve
    timing: Timing
    archive_bytes: int = 0


def default_score_from(tokens: int) -> int:
    """The first scored token of a stream of that length: 2,048, or a third of a shorter stream."""
    return max(1, min(2048, tokens // 3))


@torch.no_grad()
def lockstep(
    model: PreTrainedModel, token_ids: torch.Tensor, caches: Mapping[str, Any], chunk_size: int, first_row: int = 0
) -> Iterator[Chunk]:
    """Feed `token_ids` `[tokens]` to every cache, a chunk at a time, and yield each method's logits for it.

    Methods take turns within a chunk, in the order of `caches`. Logits of rows before `first_row` are left out where
    the model allows it (at least one row a chunk is kept).
    """
    device = next(model.parameters()).device
    token_ids = token_ids.to(device)
    argument = cache_argument(model)
    can_cut = "logits_to_keep" in inspect.signature(model.forward).parameters
    for start in range(0, token_ids.numel(), chunk_size):
        chunk = token_ids[start : start + chunk_size][None]
        end = start + chunk.shape[1]
        rows = max(1, end - max(start, first_row))
        keep = {"logits_to_keep": rows} if can_cut else {}
        for method, cache in caches.items():
            synchronize(device)
            began = time.perf_counter()
            output = model(input_ids=chunk, **{argument: cache}, use_cache=True, **keep)
            synchronize(device)
            seconds = time.perf_counter() - began
            yield Chunk(method, start, end, end - rows, output.logits[0, -rows:], seconds)


def scored_part(chunk: Chunk, tokens: int, score_from: int) -> tuple[torch.Tensor, range]:
    """The logits `[rows, vocabulary]` of a chunk that predict scored tokens of a stream of `tokens`, and their indices."""
    # Row i predicts token i + 1.
    first, last = max(chunk.first_row, score_from - 1), min(chunk.end, tokens - 1)
    last = max(first, last)
    return chunk.logits[first - chunk.first_row : last - chunk.first_row], range(first + 1, last + 1)


def predictions(
    chunk: Chunk, logits: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The log-probabilities of logits `[rows, vocabulary]`, `ROWS` rows at a time, and the loss of each row's target.

    Yields the rows, float32 `[rows, vocabulary]` and float64 `[rows]` in nats. Raises `EvaluationError` for a loss that is
    no finite number.
    """
    for start in range(0, logits.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        log_p = F.log_softmax(logits[rows].float(), dim=-1)
        losses = -log_p.gather(-1, targets[rows, None])[:, 0].double()
        if not bool(losses.isfinite().all()):
            raise EvaluationError(
                f"method {chunk.method!r} gives logits that are no numbers between tokens {chunk.start} and "
                f"{chunk.end}; try dtype float32"
            )
        yield rows, log_p, losses


def evaluate_streams(
    model: PreTrainedModel,
    streams: Sequence[torch.Tensor],
    methods: Mapping[str, CacheFactory],
    *,
    chunk_size: int = 64,
    score_from: int | None = None,
    decode_tokens: int = 0,
    on_chunk: Callable[[int, dict[str, float]], None] | None = None,
    on_decode: Callable[[str], None] | None = None,
) -> dict[str, MethodResult]:
    """Perplexity, KL divergence, memory and time of several methods on the same streams.

    `streams`: int64 tensors `[tokens]`; each is read with new caches. `methods`: names to functions giving a new cache;
    KL is measured against the one named "full", the recovered share of the gap between "streaming" and "full".
    `score_from`: index of the first scored token of each stream (default: `default_score_from`).
    `decode_tokens`: this many tokens are then fed one by one after the last stream, for their timing only.
    `on_chunk(tokens, perplexities)` is called after each chunk, `on_decode(method)` before its decoding. Results come in
    the order of `methods`.
    """
    _check_arguments(streams, methods, chunk_size, score_from, decode_tokens)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for stream in streams:
        if int(stream.max()) >= vocabulary:
            raise ValueError(f"the stream holds token {int(stream.max())}; the model has {vocabulary} tokens")
    # The full cache goes first: the others are compared to its logits of the same chunk.
    order = sorted(methods, key=lambda name: name != REFERENCE)
    tallies = {name: _Tally() for name in order}
    done = 0
    caches: dict[str, Any] = {}
    warm_up(model, streams[0][:chunk_size])
    for stream in streams:
        caches = {name: methods[name]() for name in order}
        for cache in caches.values():
            if hasattr(cache, "compaction_seconds"):
                cache.profile = True
        tokens = stream.numel()
        scored_from = default_score_from(tokens) if score_from is None else score_from
        reference: torch.Tensor | None = None
        targets = stream.to(next(model.parameters()).device)
        for chunk in lockstep(model, stream, caches, chunk_size, first_row=scored_from - 1):
            tally = tallies[chunk.method]
            tally.time(chunk, caches[chunk.method])
            logits, scored = scored_part(chunk, tokens, scored_from)
            if scored:
                if chunk.method == REFERENCE:
                    reference = logits
                tally.score(chunk, logits, targets[scored.start : scored.stop], reference)
            finished = chunk.end == tokens
            tally.sample(caches[chunk.method], done + chunk.end, force=finished)
            if chunk.method == order[-1]:
                reference = None
                if on_chunk is not None:
                    told = {name: t.perplexity for name, t in tallies.items() if t.scored >= LEAST_SCORED}
                    on_chunk(done + chunk.end, told)
        done += tokens
        for name, cache in caches.items():
            tallies[name].close(cache)
    if decode_tokens:
        for name, cache in caches.items():
            if on_decode is not None:
                on_decode(name)
            tallies[name].decode(model, streams[-1], cache, decode_tokens)
    return _results(methods, tallies, done)


def _check_arguments(streams, methods, chunk_size: int, score_from: int | None, decode_tokens: int) -> None:
    if not methods:
        raise ValueError("methods is empty; name at least one")
    if not streams or min(stream.numel() for stream in streams) < 2:
        raise ValueError("each stream needs at least 2 tokens: the first one is not predicted")
    check_least({"chunk_size": chunk_size, "decode_tokens": decode_tokens})
    longest = max(stream.numel() for stream in streams)
    if score_from is not None and not 1 <= score_from < longest:
        raise ValueError(
            f"score_from={score_from} leaves nothing to score; it must be between 1 and {longest - 1}, "
            f"the longest stream having {longest} tokens"
        )


class _Tally:
    """Sums of one method over the streams."""

    def __init__(self) -> None:
        self.nll = 0.0
        self.kl = 0.0
        self.scored = 0
        self.compared = 0
        self.held_tokens = 0
        self.cache_bytes = 0
        self.archive_bytes = 0
        self.memory: dict[str, int] = {}
        self.stats: dict[str, Any] = {}
        self.curve = Curve()
        self.timing = Timing()
        self._compaction_before = 0.0
        self._steady_seconds = 0.0
        self._steady_compaction = 0.0

    @property
    def perplexity(self) -> float:
        return _exp(self.nll / self.scored)

    def time(self, chunk: Chunk, cache) -> None:
        self.timing.forward_seconds += chunk.seconds
        total = getattr(cache, "compaction_seconds", None)
        if total is None:
            return
        spent = total - self._compaction_before
        self._compaction_before = total
        self.timing.compaction_seconds = (self.timing.compaction_seconds or 0.0) + spent
        if total > 0:
            self._steady_seconds += chunk.seconds
            self._steady_compaction += spent
            self.timing.compaction_share = _share(self._steady_compaction, self._steady_seconds)

    def score(self, chunk: Chunk, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> None:
        for rows, log_p, losses in predictions(chunk, logits, targets):
            if reference is not None:
                if chunk.method == REFERENCE:
                    kl = 0.0
                else:
                    log_full = F.log_softmax(reference[rows].float(), dim=-1)
                    kl = F.kl_div(log_p, log_full, log_target=True, reduction="none").sum(-1).double().sum().item()
                self.kl += kl
                self.compared += log_p.shape[0]
            self.nll += losses.sum().item()
            self.scored += log_p.shape[0]

    def sample(self, cache, tokens: int, force: bool) -> None:
        held, size = held_tokens(cache), cache_bytes(cache)
        self.held_tokens = max(self.held_tokens, held)
        if size > self.cache_bytes:
            self.cache_bytes, self.archive_bytes = size, archive_bytes(cache)
        if force or not self.curve.tokens or tokens - self.curve.tokens[-1] >= CURVE_STEP:
            self.curve.tokens.append(tokens)
            self.curve.perplexity.append(self.perplexity if self.scored else None)
            self.curve.cache_bytes.append(size)
            self.curve.held_tokens.append(held)

    def close(self, cache) -> None:
        """Read what a cache says of itself at the end of its stream."""
        self._compaction_before = 0.0
        if hasattr(cache, "memory_report"):
            self.memory = {name: int(size) for name, size in cache.memory_report().items()}
        for name, value in getattr(cache, "stats", {}).items():
            if isinstance(value, (int, float)):
                self.stats[name] = self.stats.get(name, 0) + value

    @torch.no_grad()
    def decode(self, model, stream: torch.Tensor, cache, count: int) -> None:
        """Time `count` tokens fed one at a time after the stream: its first ones, as any would do."""
        tokens = stream.repeat(-(-(count + DECODE_WARM_UP) // stream.numel()))[: count + DECODE_WARM_UP]
        seconds = compaction = 0.0
        before = 0.0
        for chunk in lockstep(model, tokens, {"": cache}, 1):
            total = getattr(cache, "compaction_seconds", 0.0)
            if chunk.start >= DECODE_WARM_UP:
                seconds += chunk.seconds
                compaction += total - before
            before = total
        self.timing.decode_tokens = count
        self.timing.decode_tokens_per_second = count / seconds
        if hasattr(cache, "compaction_seconds"):
            self.timing.decode_compaction_share = _share(compaction, seconds)


def cache_bytes(cache) -> int:
    """Bytes of all tensors a cache holds; of the keys and values of a transformers cache."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(tensor.numel() * tensor.element_size() for pair in _keys_and_values(cache) for tensor in pair)


def archive_bytes(cache) -> int:
    """Bytes of what a cache archived for recall, and of what it is found by; 0 for a cache without."""
    report = cache.memory_report() if hasattr(cache, "memory_report") else {}
    return int(sum(report.get(use, 0) for use in ARCHIVE_USES))


def held_tokens(cache) -> int:
    """The most tokens any KV head of a cache holds."""
    if hasattr(cache, "held_tokens"):
        return int(cache.held_tokens)
    return max((keys.shape[-2] for keys, _ in _keys_and_values(cache)), default=0)


def _keys_and_values(cache):
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            yield layer.keys, layer.values


def _results(methods, tallies: dict[str, _Tally], tokens: int) -> dict[str, MethodResult]:
    full, streaming = (
        tallies[name].perplexity if name in tallies and tallies[name].scored else None for name in (REFERENCE, BASELINE)
    )
    results = {}
    for name in methods:
        tally = tallies[name]
        tally.timing.tokens_per_second = tokens / tally.timing.forward_seconds
        gap = None
        if full is not None and streaming is not None and streaming > full * (1 + LEAST_GAP):
            gap = (streaming - tally.perplexity) / (streaming - full)
        results[name] = MethodResult(
            method=name,
            scored_tokens=tally.scored,
            nll=tally.nll / tally.scored,
            perplexity=tally.perplexity,
            kl=tally.kl / tally.compared if tally.compared else None,
            gap_recovered=gap,
            held_tokens=tally.held_tokens,
            cache_bytes=tally.cache_bytes,
            memory=tally.memory,
            stats=tally.stats,
            curve=tally.curve,
            timing=tally.timing,
            archive_bytes=tally.archive_bytes,
        )
    return results


@torch.no_grad()
def warm_up(model, chunk: torch.Tensor) -> None:
    """The first forward of a process pays for libraries and memory that no method should be charged with."""
    model(input_ids=chunk[None].to(next(model.parameters()).device), use_cache=False)


def _share(compaction: float, forward: float) -> float | None:
    rest = forward - compaction
    return compaction / rest if rest > 0 else None


def _exp(nll: float) -> float:
    return float(torch.tensor(nll, dtype=torch.float64).exp())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
