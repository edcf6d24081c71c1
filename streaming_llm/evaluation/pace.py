"""How fast a model goes on with a cache: seconds of each forward pass, compaction's part of them, bytes at the peak.

Caches take turns, so that whatever else the machine does meets all of them. A history is made of random states that go to
the cache as a forward pass would give them: what a step costs does not depend on what the tokens say.
"""

from __future__ import annotations

import inspect
import os
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import ADMSKVCache
from ..layer import ADMSLayer
from ..model.facts import cache_argument
from ..sizing import ModelShape
from . import streaming

# Tokens of a made history that come at once: a bounded cache compacts after each.
FILL = 512
# How much more padding each row of a batch of different lengths has than the one before. No divisor of an interval: rows are
# due for a compaction at different steps.
PADDING_STEP = 37


class Lap(NamedTuple):
    """What a forward pass took: seconds by the clock on the wall, of all the process's threads, and of compaction (wall)."""

    wall: float
    process: float
    compaction: float


class Lane:
    """A cache that is measured, and what its model was given so far.

    Args:
        cache: it and `model` are used by nobody else at the same time.
        batch: rows; different: whether they begin with more padding the farther down they are.
        most: tokens that will come.
    """

    def __init__(self, model, cache, batch: int = 1, different: bool = False, most: int = 0):
        self.model, self.cache, self.batch, self.seen = model, cache, batch, 0
        self.device = next(model.parameters()).device
        self._given = {cache_argument(model): cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._given["logits_to_keep"] = 1
        self.padding = torch.arange(batch, device=self.device)[:, None] * PADDING_STEP if different else None
        self._columns = torch.arange(most, device=self.device)
        if hasattr(cache, "profile"):
            cache.profile = True

    def mask(self, new: int) -> torch.Tensor | None:
        """The padding mask of all tokens seen and `new` more, as `generate` gives it; None without padding."""
        if self.padding is None:
            return None
        return (self._columns[: self.seen + new] >= self.padding).long()

    @torch.no_grad()
    def feed(self, ids: torch.Tensor) -> Lap:
        """Give the model tokens `[batch, new]`."""
        new = ids.shape[1]
        given = self._given
        if self.padding is not None:
            positions = self._columns[self.seen : self.seen + new] - self.padding
            given = given | {"attention_mask": self.mask(new), "position_ids": positions.clamp_min(0)}
        before = getattr(self.cache, "compaction_seconds", 0.0)
        streaming.synchronize(self.device)
        wall, process = time.perf_counter(), time.process_time()
        self.model(input_ids=ids, **given)
        streaming.synchronize(self.device)
        lap = Lap(
            time.perf_counter() - wall,
            time.process_time() - process,
            getattr(self.cache, "compaction_seconds", 0.0) - before,
        )
        self.seen += new
        return lap

    def back(self, tokens: int) -> None:
        """Take the newest tokens back."""
        self.seen -= tokens
        # Releases before 5.10 take the length to keep.
        self.cache.crop(-tokens if self.cache.get_seq_length() > self.seen else self.seen)

    @torch.no_grad()
    def fill(self, tokens: int, generator: torch.Generator) -> None:
        """Let the cache have seen `tokens` in all, those it has not yet being random states that cost no model's time."""
        shape = ModelShape.of(self.model.config, self.model.dtype)
        while self.seen < tokens:
            own = isinstance(self.cache, ADMSKVCache)
            new = min(FILL, tokens - self.seen) if own else tokens - self.seen
            states = [
                torch.randn(self.batch, heads, new, shape.head_dim, generator=generator).to(self.device, self.model.dtype)
                for heads in (shape.kv_heads, shape.kv_heads, shape.kv_heads * shape.groups)
            ]
            if own:
                self._fill_bounded(new, *states)
            else:
                for number in range(self.model.config.get_text_config().num_hidden_layers):
                    self.cache.update(*states[:2], number)
            self.seen += new

    def _fill_bounded(self, new: int, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> None:
        cache = self.cache
        cache.begin_forward(None, self.mask(new), new, self.batch, self.device)
        for number, layer in enumerate(cache.layers):
            cache.update(keys, values, number)
            if isinstance(layer, ADMSLayer):
                layer.observe(queries, keys.shape[-1] ** -0.5)
        cache.end_forward()


def turns(lanes: Mapping[str, Lane], tokens: torch.Tensor, rounds: int, steps: int) -> dict[str, list[list[Lap]]]:
    """Let lanes decode in turns, each `steps` tokens a round, another one first in each.

    Args:
        tokens: ids `[batch, any]`, of which each step takes the next.

    Returns:
        The laps of each lane, by round.
    """
    laps: dict[str, list[list[Lap]]] = {name: [] for name in lanes}
    names = list(lanes)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            at = [(number * steps + step) % tokens.shape[1] for step in range(steps)]
            laps[name].append([lanes[name].feed(tokens[:, place : place + 1]) for place in at])
    return laps


def in_lockstep(lanes: Mapping[str, Lane], tokens: torch.Tensor, chunk_size: int) -> dict[str, list[Lap]]:
    """Let lanes read `tokens [batch, tokens]` in chunks, each chunk in turns; the laps of each."""
    laps: dict[str, list[Lap]] = {name: [] for name in lanes}
    for chunk in tokens.split(chunk_size, dim=1):
        for name, lane in lanes.items():
            laps[name].append(lane.feed(chunk))
    return laps


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that were there at any time during `run()` beyond those there before it; on a CPU without
    what an operator makes and gives back within itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Storages() as found:
        run()
    return found.most


class _Storages(TorchDispatchMode):
    """Follows the storages that operators make: `now` bytes of them are alive, `most` were at any time. (torch's profiler
    tells more, and takes gigabytes for the operators of a hundred steps.)"""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        given = {own.untyped_storage()._cdata for own in tree_leaves((args, kwargs)) if isinstance(own, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._follow(storage, storage._cdata, storage.nbytes())
        return result

    def _follow(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        def gone(_: object) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@dataclass(frozen=True)
class Pace:
    """Tokens a second: the median of the rounds and their range; None for what was not measured.

    `ratio`: to what is compared with, the median of the rounds' ratios. `compaction`: time of scoring and compaction over
    the rest. `longest`: the longest step over the median one, each place in the interval by the fastest of the rounds,
    so that what else the machine does is no long step; `longest_of_all`: of all steps of all rounds.
    """

    tokens_per_second: float
    slowest: float
    fastest: float
    ratios: Mapping[str, float]
    compaction: float | None
    longest: float
    longest_of_all: float


def pace(laps: Sequence[Sequence[Lap]], batch: int, clock: str, others: Mapping[str, Sequence[Sequence[Lap]]]) -> Pace:
    """What the laps of rounds come to.

    Args:
        laps: of each round, one token a row each.
        clock: `wall` or `process`; compaction's share is always by the first.
        others: the laps of what it is compared with, by name, of as many rounds.
    """
    seconds = torch.tensor([[getattr(lap, clock) for lap in own] for own in laps], dtype=torch.float64)
    totals = seconds.sum(1)
    rates = (batch * seconds.shape[1] / totals).tolist()
    ratios = {}
    for name, rounds in others.items():
        theirs = [sum(getattr(lap, clock) for lap in own) for own in rounds]
        ratios[name] = statistics.median(other / own for other, own in zip(theirs, totals.tolist(), strict=True))
    best = seconds.amin(0)
    return Pace(
        tokens_per_second=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        ratios=ratios,
        compaction=compaction_share([lap for own in laps for lap in own]),
        longest=float(best.max() / best.median()),
        longest_of_all=float(seconds.max() / seconds.median()),
    )


def compaction_share(laps: Sequence[Lap]) -> float | None:
    """The time of scoring and compaction over the rest; None where there was none."""
    spent = sum(lap.compaction for lap in laps)
    return spent / (sum(lap.wall for lap in laps) - spent) if spent else None


def free_cores() -> tuple[int, float]:
    """Cores this process may use, and how many of them nothing else used during the last minute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return cores, max(0.0, cores - load)


def random_ids(model, batch: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Random token ids `[batch, tokens]` on the model's device."""
    vocabulary: Any = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(next(model.parameters()).device)
