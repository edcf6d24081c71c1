"""A million tokens through a tiny random model: what must always hold is looked at after every forward pass.

The model's trained length is short, so that the stream is thousands of times longer. What is checked: no head holds more
than the bound, all logits are finite, no position given to the model reaches the trained length, and neither Python objects
nor tensors become more or larger. Apart from them are the ids of the tokens seen, which a cache keeps on the host: they may
take 4 bytes each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.facts import cache_argument
from ..stats import format_bytes
from . import flags
from .methods import METHODS, cache_factory
from .reading import settled_resident
from .run import Run
from .streaming import cache_bytes, held_tokens

# The widest cache of these sizes, with what comes between two compactions, fits into a trained length of 256.
RECENT = MIDDLE = 64
WINDOW = 256
VOCABULARY = 128
# How often objects and tensors are counted.
COUNTS = 40
# Objects that may come with Python's own caches; what leaks leaves some at each of thousands of forward passes.
SPARE_OBJECTS = 20


@dataclass(frozen=True)
class Census:
    """What is alive of all that was made since the soak began: Python objects the collector knows, tensors among them, and
    bytes of the tensors' storages."""

    objects: int
    tensors: int
    tensor_bytes: int

    @classmethod
    def take(cls, apart: Sequence[torch.Tensor] = ()) -> Census:
        """Count, after a collection, all but the tensors `apart`."""
        gc.collect()
        others = {id(tensor) for tensor in apart}
        objects = [item for item in gc.get_objects() if id(item) not in others]
        storages = {}
        tensors = 0
        for item in objects:
            # By type: `isinstance` would wake lazy objects that only pretend to be something.
            if issubclass(type(item), torch.Tensor):
                tensors += 1
                storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        return cls(len(objects), tensors, sum(storages.values()))

    def joined(self, other: Census | None, choose: Callable[..., int]) -> Census:
        """Each number chosen of the two."""
        if other is None:
            return self
        return Census(*(choose(pair) for pair in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True)
class SoakResult:
    """What was seen, up to the first violation: `violation` is its sentence, None where all held.

    `highest_position`: the largest position id any rotary module was given. `start` and `end`: the most that was alive at
    the counts of the first quarter, the least of the last; None where there were none. `resident_*`: bytes of the process
    at the first of these counts and the last.
    """

    tokens: int
    forwards: int
    seconds: float
    bound: int
    most_held: int
    window: int
    highest_position: int
    cache_bytes: int
    start: Census | None
    end: Census | None
    resident_start: int | None
    resident_end: int | None
    violation: str | None


def ids_seen(cache) -> list[torch.Tensor]:
    """The ids that a cache keeps on the host of the tokens it has seen."""
    return cache.seen_tokens.chunks if hasattr(cache, "seen_tokens") else []


def tiny_model(window: int = WINDOW, seed: int = 0, **settings: Any):
    """A Llama of 2 layers, 4 query and 2 KV heads of 16 dimensions with random weights, trained to `window` tokens.

    `settings`: other ones of `LlamaConfig`. torch's random numbers go on as if nothing had been drawn.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": window,
        # Large enough for attention to be far from uniform: a cache that loses the wrong token then shows.
        "initializer_range": 0.3,
    }
    config = LlamaConfig(**usual | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def only_new_objects() -> Iterator[None]:
    """Put aside all objects there are, so that the collector, and a `Census`, look at new ones only and are quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def watched_positions(model) -> Iterator[list[int]]:
    """A list of one number: the highest position id that a rotary module of the model has been given so far, at first -1."""
    highest = [-1]

    def look(module, args, kwargs):
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        highest[0] = max(highest[0], int(positions.max()))

    rotaries = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)]
    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in rotaries]
    try:
        yield highest
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def soak(
    model,
    cache,
    tokens: int,
    *,
    bound: int,
    window: int,
    chunk_size: int = 64,
    seed: int = 0,
    on_count: Callable[[int, Census], None] | None = None,
) -> SoakResult:
    """Give the model `tokens` random tokens in chunks, with `cache`, until something is violated.

    `bound`: most tokens a head may hold after a forward pass. `window`: what every position must stay below. Objects and
    tensors are counted once the cache has been full for some time, then `COUNTS` times, with `on_count(tokens, census)`: the
    least that is alive in the last quarter must not be more than the most of the first. (A cache whose layers trade budget
    has more tensors at some times than at others.)
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    given = {cache_argument(model): cache}
    generator = torch.Generator().manual_seed(seed)
    # Buffers may still be built and shared anew while the cache fills and the first budgets are set.
    due = settled = min(tokens // 4, 64 * bound)
    step = max(1, (tokens - settled) // COUNTS)
    start = end = None
    resident_start = resident_end = None
    most = seen = forwards = 0
    violation = None
    began = time.perf_counter()
    with only_new_objects(), watched_positions(model) as highest:
        while seen < tokens and violation is None:
            count = min(chunk_size, tokens - seen)
            chunk = torch.randint(vocabulary, (1, count), generator=generator)
            finite = bool(model(input_ids=chunk, **given).logits.isfinite().all())
            seen, forwards = seen + count, forwards + 1
            held = held_tokens(cache)
            most = max(most, held)
            if held > bound:
                violation = f"{held} tokens are held by a head; the bound is {bound}"
            elif not finite:
                violation = "the logits hold NaN or infinity"
            elif highest[0] >= window:
                violation = f"the model was given position {highest[0]}; the trained length is {window}"
            elif seen >= due or seen == tokens:
                ids = ids_seen(cache)
                violation = _too_much(ids, seen)
                census, resident = Census.take(ids), settled_resident()
                # The first count is to have counted and told once, which leaves objects of its own.
                passed = (seen - settled) / max(1, tokens - settled)
                if due > settled and passed <= 0.25:
                    start, resident_start = census.joined(start, max), resident_start or resident
                elif due > settled and passed > 0.75:
                    end, resident_end = census.joined(end, min), resident
                due += step
                if on_count is not None:
                    on_count(seen, census)
        if violation is None and start is not None and end is not None:
            violation = _growth(start, end)
    return SoakResult(
        tokens=seen,
        forwards=forwards,
        seconds=time.perf_counter() - began,
        bound=bound,
        most_held=most,
        window=window,
        highest_position=highest[0],
        cache_bytes=cache_bytes(cache),
        start=start,
        end=end,
        resident_start=resident_start,
        resident_end=resident_end,
        violation=None if violation is None else f"after {seen:,} tokens: {violation}",
    )


def _too_much(ids: list[torch.Tensor], seen: int) -> str | None:
    taken = sum(chunk.untyped_storage().nbytes() for chunk in ids)
    if taken <= 4 * seen and len(ids) <= seen.bit_length() and all(chunk.device.type == "cpu" for chunk in ids):
        return None
    return f"the ids of {seen:,} tokens take {taken:,} bytes in {len(ids)} tensors; 4 bytes each on the host are allowed"


def _growth(start: Census, now: Census) -> str | None:
    if now.tensors > start.tensors:
        return f"{now.tensors} tensors are alive at least; there were {start.tensors} at most"
    if now.tensor_bytes > start.tensor_bytes:
        return f"tensors take at least {now.tensor_bytes:,} bytes; they took {start.tensor_bytes:,} at most"
    if now.objects > start.objects + SPARE_OBJECTS:
        return f"{now.objects:,} Python objects are alive at least; there were {start.objects:,} at most"
    return None


def summary(result: SoakResult) -> str:
    """The result as lines of text."""

    def change(before, after, form: Callable[[Any], str] = lambda number: f"{number:,}") -> str:
        return "not counted" if before is None or after is None else f"{form(before)} -> {form(after)}"

    start, end = result.start, result.end
    lines = {
        "tokens": f"{result.tokens:,} in {result.forwards:,} forward passes, "
        f"{result.tokens / result.window:,.0f} times the trained length",
        "time": f"{result.seconds:.0f} s, {result.tokens / result.seconds:,.0f} tokens/s",
        "most tokens held": f"{result.most_held} of {result.bound} allowed",
        "highest position": f"{result.highest_position}, trained length {result.window}",
        "cache": format_bytes(result.cache_bytes),
        "Python objects": change(start and start.objects, end and end.objects),
        "tensors": change(start and start.tensors, end and end.tensors),
        "tensor bytes": change(start and start.tensor_bytes, end and end.tensor_bytes),
        "resident": change(result.resident_start, result.resident_end, format_bytes),
        "violation": result.violation or "none",
    }
    return "\n".join(f"{name + ':':18}{value}" for name, value in lines.items())


@dataclass
class SoakArguments:
    """The flags beside the settings of the cache."""

    tokens: int = flags.count("tokens of the stream (%(default)s)", 1_000_000)
    chunk_size: int = flags.count("tokens a forward pass; 1: one by one (%(default)s)", 64)
    window: int = flags.count("the model's trained length in tokens (%(default)s)", WINDOW)
    method: str = flags.argument(f"of {', '.join(name for name in METHODS if name != 'full')} (%(default)s)", "adms")


class Soak(Run):
    """Send random tokens through a tiny random model and check it after every forward pass.

    The cache must keep its bound, the logits be finite, no position leave the trained length and nothing grow; the exit code
    is 1 otherwise.
    """

    prog = "soak.py"
    Arguments = SoakArguments
    sizes = RECENT, MIDDLE

    def check(self) -> None:
        super().check()
        if self.arguments.method == "full":
            raise ValueError("method='full' has no bound; choose another")
        self.plans = self.plan([self.arguments.method])

    def measure(self) -> Iterator[None]:
        """Soak the cache."""
        given = self.arguments
        model = tiny_model(given.window, self.seed)
        cache = cache_factory(model, self.plans[0])()

        def on_count(tokens: int, census: Census) -> None:
            told = f"{tokens:,} tokens: {census.objects:,} objects, {census.tensors:,} tensors"
            self.console.print(told, highlight=False)

        limits = {"bound": cache.config.expected_max_tokens, "window": given.window}
        options = {"chunk_size": given.chunk_size, "seed": self.seed, "on_count": on_count}
        self.found = soak(model, cache, given.tokens, **limits, **options)
        yield

    def table(self) -> None:
        """Print the summary."""
        self.console.print(summary(self.found), highlight=False, soft_wrap=True)

    def code(self) -> int:
        """1 for a violation."""
        return 0 if self.found.violation is None else 1
