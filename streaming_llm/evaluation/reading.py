"""One method's reading of a long stream: perplexity along it, memory and time at its start and at its end."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import streaming

BIN = 1024
EIGHTHS = 8
TENTHS = 10


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a stream: how many of them were scored, and their summed loss in nats."""

    start: int
    end: int
    scored: int
    nll: float

    @property
    def perplexity(self) -> float | None:
        """None where nothing was scored."""
        return math.exp(self.nll / self.scored) if self.scored else None

    @property
    def whole(self) -> bool:
        """Whether all of it was read; the stream's first token has nothing to be predicted from."""
        return self.scored == self.end - self.start - (self.start == 0)


@dataclass(frozen=True)
class LongTiming:
    """What differs between two runs. Seconds a token of each tenth: mean and median over its forward passes.

    `tail_over_head`: the last tenth's median over the second's; the first tenth is left out, as it fills the cache.
    `resident_start`, `resident_end`: bytes of the process after `memory_from` tokens and at the end; None where the system
    does not tell.
    """

    tokens_per_second: float
    mean: tuple[float | None, ...]
    median: tuple[float | None, ...]
    tail_over_head: float | None
    resident_start: int | None
    resident_end: int | None
    resident_growth: float | None


@dataclass(frozen=True)
class LongResult:
    """What one method did on the stream, or on the first `tokens` of it.

    `eighths` are those of the whole stream, `bins` of `BIN` tokens. `worst_over_first`: the highest perplexity of an eighth
    over the first's; `last_over_baseline`: the last eighth's over StreamingLLM's; None where an eighth was not read.
    `cache_bytes_start`: after `memory_from` tokens. `archive_bytes_end`: what of `cache_bytes_end` is recall's archive and
    its index, which grow until they hold `recall_tokens`.
    """

    method: str
    tokens: int
    nll: float
    perplexity: float
    eighths: tuple[Part, ...]
    bins: tuple[Part, ...]
    worst_over_first: float | None
    last_over_baseline: float | None
    held_tokens: int
    memory_from: int
    cache_bytes_start: int
    cache_bytes_end: int
    archive_bytes_end: int
    timing: LongTiming


def resident_bytes() -> int | None:
    """Bytes of memory the process holds now; None where the system does not tell (it does on Linux)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None


@torch.no_grad()
def stream_method(
    model,
    stream: torch.Tensor,
    method: str,
    make_cache: streaming.CacheFactory,
    *,
    stream_tokens: int | None = None,
    chunk_size: int = 64,
    memory_from: int = 4096,
    restart: bool = False,
    on_chunk: Callable[[int, dict[str, float]], None] | None = None,
) -> LongResult:
    """Read `stream`, int64 `[tokens]`, through a new cache, every token but the first scored.

    `stream_tokens`: length of the stream of which this is the beginning, for the eighths (default: this is all).
    `memory_from`: the token after which memory is read for comparison with the end. `restart`: go on with a new cache after
    the chunk that ends an eighth, so that each is read by itself. `on_chunk(tokens, {method: perplexity})`
    is called after each chunk.
    """
    tokens = stream.numel()
    # All that is recorded has its place before the first reading of the memory.
    losses = torch.full((tokens,), math.nan, dtype=torch.float64)
    seconds = torch.zeros(-(-tokens // chunk_size), dtype=torch.float64)
    targets = stream.to(next(model.parameters()).device)
    held = total = spent = 0
    start_bytes = start_resident = None
    streaming.warm_up(model, stream[:chunk_size])
    whole = stream_tokens or tokens
    borders = [round(whole * number / EIGHTHS) for number in range(EIGHTHS + 1)]
    caches = {method: make_cache()}
    for number, chunk in enumerate(streaming.lockstep(model, stream, caches, chunk_size)):
        cache = caches[method]
        spent += chunk.seconds
        seconds[number] = chunk.seconds / (chunk.end - chunk.start)
        logits, scored = streaming.scored_part(chunk, tokens, 1)
        for rows, _, nll in streaming.predictions(chunk, logits, targets[scored.start : scored.stop]):
            losses[scored.start + rows.start :][: nll.numel()] = nll
            total += nll.sum().item()
        held = max(held, streaming.held_tokens(cache))
        if start_bytes is None and chunk.end >= min(memory_from, tokens):
            start_bytes, start_resident = streaming.cache_bytes(cache), settled_resident()
        if on_chunk is not None and scored:
            on_chunk(chunk.end, {method: math.exp(total / (scored.stop - 1))})
        if restart and any(chunk.start < border <= chunk.end for border in borders[1:-1]):
            caches[method] = make_cache()
    # Before anything else is computed: what follows is no part of the stream.
    end_resident = settled_resident()
    mean, median = _tenths(seconds)
    head, tail = median[1], median[-1]
    timing = LongTiming(
        tokens_per_second=tokens / spent,
        mean=mean,
        median=median,
        tail_over_head=tail / head if head and tail else None,
        resident_start=start_resident,
        resident_end=end_resident,
        resident_growth=end_resident / start_resident - 1 if start_resident and end_resident else None,
    )
    eighths = _parts(losses, borders)
    perplexities = [part.perplexity for part in eighths if part.whole]
    return LongResult(
        method=method,
        tokens=tokens,
        nll=total,
        perplexity=math.exp(total / (tokens - 1)),
        eighths=eighths,
        bins=_parts(losses, [*range(0, tokens, BIN), tokens]),
        worst_over_first=max(perplexities) / perplexities[0] if len(perplexities) == EIGHTHS else None,
        last_over_baseline=None,
        held_tokens=held,
        memory_from=min(memory_from, tokens),
        cache_bytes_start=start_bytes,
        cache_bytes_end=streaming.cache_bytes(cache),
        archive_bytes_end=streaming.archive_bytes(cache),
        timing=timing,
    )


def settled_resident() -> int | None:
    """`resident_bytes` once what was freed is handed back to the system, as far as the C library can."""
    gc.collect()
    # glibc keeps freed memory for the next allocation: how much is there by chance would be read as growth.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return resident_bytes()


def _tenths(seconds: torch.Tensor) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Mean and median seconds a token of each tenth of the forward passes; None where there are too few."""
    parts = torch.tensor_split(seconds, TENTHS)
    means = tuple(float(part.mean()) if part.numel() else None for part in parts)
    return means, tuple(float(part.median()) if part.numel() else None for part in parts)


def _parts(losses: torch.Tensor, borders: Sequence[int]) -> tuple[Part, ...]:
    parts = []
    for start, end in zip(borders, borders[1:], strict=False):
        part = losses[start:end]
        part = part[~part.isnan()]
        parts.append(Part(start, end, part.numel(), float(part.sum())))
    return tuple(parts)


def compare_to_baseline(results: Mapping[str, LongResult]) -> dict[str, LongResult]:
    """The results with `last_over_baseline` filled in, where StreamingLLM is among them."""
    baseline = results.get(streaming.BASELINE)
    last = baseline.eighths[-1] if baseline is not None else None
    if last is None or not last.whole:
        return dict(results)
    return {
        name: dataclasses.replace(result, last_over_baseline=result.eighths[-1].perplexity / last.perplexity)
        if result.eighths[-1].whole
        else result
        for name, result in results.items()
    }
