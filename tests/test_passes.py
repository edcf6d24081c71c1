"""A pass that fails has never been: wherever it is interrupted, state and all that follows are as if it had not begun."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from conftest import make_tiny_llama, random_queries, random_states, stream, token_ids
from test_controller import deep_llama
from test_families import make
from test_positions import small_window
from torch.overrides import TorchFunctionMode

from streaming_llm import ADMSConfig, enable_adms_llm
from streaming_llm.evaluation.lone_layer import LoneLayer
from streaming_llm.store.stack import Stack
from streaming_llm.stream.arrival import Arrival

SIZES = {
    "start_size": 1, "recent_size": 6, "compressed_budget": 4, "compression_interval": 4, "rank": 2,
    "attention_window": 6, "num_clusters": 2, "min_middle_size_for_compress": 0, "min_importance_tokens": 0,
}  # fmt: skip
MODULES = {"sketch_budget": 2, "replay_budget": 1, "energy_replay_threshold": 1.0, "sketch_originals": 8}
PLUS = ADMSConfig.adm_plus_plus(**SIZES, **MODULES)
BASE = ADMSConfig(**SIZES)


class Fault(Exception):
    """Raised by a test in the middle of a pass."""


class FaultAt(TorchFunctionMode):
    """The `number`-th call of a torch function within raises; `calls` counts them. None only counts."""

    def __init__(self, number: int | None = None):
        super().__init__()
        self.number, self.calls = number, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # What only asks a tensor for what it is can't fail.
        if getattr(func, "__name__", "") not in ("__get__", "_set_grad_enabled"):
            self.calls += 1
            if self.calls == self.number:
                raise Fault(str(func))
        return func(*args, **(kwargs or {}))


def state(value: object, seen: dict | None = None) -> object:
    """All that decides what a cache or stream says next: tensors as far as rows use them, numbers, lists."""
    if isinstance(value, Stack):
        own = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        del own["tokens"], own["queries"], own["config"], own["rope"]
        own["held"] = [[t.clone() for t in value.held(which).tensors().values()] for which in value.classes()]
        stored = [value.stored_queries(which) for which in value.classes()]
        own["queries"] = [None if queries is None else queries.states.clone() for queries in stored]
        own["free"] = [
            getattr(value.tokens, name)[index, :, row.length :].clone()
            for name in ("beta", "count", "score", "mass", "square", "tier")
            for number, row in enumerate(value.rows)
            for index in [[start * value.batch + number for start in range(len(value.layers))]]
            if value.real is None
        ]
        return state(own)
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: state(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [state(item) for item in value]
    if value is None or isinstance(value, (int, float, str)):
        return value
    return {name: state(item) for name, item in vars(value).items()}


def cache_state(cache) -> object:
    """As `state`, of a cache: its stream, padding, what was seen and transformers' own layers."""
    sliding = [
        (layer.keys.clone(), layer.values.clone(), layer.get_seq_length())
        for layer in cache.layers
        if not hasattr(layer, "stream") and layer.is_initialized
    ]
    ids = cache.seen_tokens
    return [
        stream_state(cache.stream),
        state(cache.padding),
        state([ids.length, ids.rows, ids.chunks, ids.waiting]),
        sliding,
    ]


def stream_state(own) -> object:
    """As `state`, of a stream."""
    known = (own.stacks, own.next_trades, own.window, own.open, own.records_past, own.cut)
    return state(list(known))


def first_difference(left: object, right: object, path: str = "") -> str | None:
    """Where two states differ; None where they are equal to the bit."""
    if type(left) is not type(right):
        return path
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return None if same else path
    if isinstance(left, (list, tuple)):
        left, right = dict(enumerate(left)), dict(enumerate(right))
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return path
        found = (first_difference(left[key], right[key], f"{path}/{key}") for key in left)
        return next((where for where in found if where is not None), None)
    return None if left == right else path


def assert_same(left: object, right: object, what: object) -> None:
    where = first_difference(left, right)
    assert where is None, f"{what}: {where}"


# -- one layer: every operation -------------------------------------------------------------------------------------------


def one_pass(layer: LoneLayer, new: int, batch: int = 1, seed: int = 0, lengths: tuple[int, ...] | None = None):
    """A pass of seeded random states: its output by the layer's own bias."""
    keys, values = random_states(new, batch, seed=seed)
    arrival = None
    if lengths is not None:
        real = torch.arange(new)[None] >= new - torch.tensor(lengths)[:, None]
        arrival = Arrival(new, lengths, None, real, False, min(lengths))
    keys, values = layer.update(keys, values, arrival=arrival)
    queries = random_queries(new, batch, seed=seed)
    bias = layer.attention_bias(new, 2, keys.dtype)
    out = torch.softmax(queries @ keys.repeat_interleave(2, 1).mT + bias, -1) @ values.repeat_interleave(2, 1)
    layer.observe(queries, 0.3)
    return out


FULL = BASE.expected_max_tokens
# name: (settings, batch, passes before, the pass that fails, every how many-th operation fails)
PASSES = {
    "a step": (BASE, 1, [(9, None)], (1, None), 1),
    "the first": (BASE, 1, [], (5, None), 1),
    "a due compaction": (BASE, 1, [(FULL - 1, None)], (2, None), 1),
    "a due compaction with every module": (PLUS, 1, [(PLUS.expected_max_tokens - 1, None)], (2, None), 11),
    "a second with every module": (PLUS, 1, [(PLUS.expected_max_tokens - 1, None)] + [(2, None)] * 4, (4, None), 17),
    "a long prefill": (BASE, 1, [(7, None)], (30, None), 3),
    "a long prefill with every module": (PLUS, 1, [(7, None)], (40, None), 23),
    "padded rows": (BASE, 2, [(9, (9, 4)), (3, (1, 3))], (2, (2, 1)), 1),
    "padded rows of which one is due": (PLUS, 2, [(20, (20, 9)), (4, (4, 4)), (4, (4, 1))], (4, (3, 4)), 23),
    "a long prefill of padded rows": (BASE, 2, [(9, (9, 4))], (24, (24, 3)), 7),
}


def begun(name: str) -> tuple[LoneLayer, tuple]:
    config, batch, before, last, _ = PASSES[name]
    layer = LoneLayer(config, wired=True)
    for number, (new, lengths) in enumerate(before):
        one_pass(layer, new, batch, number, lengths)
    return layer, (last[0], batch, 77, last[1])


def more_passes(layer: LoneLayer, last: tuple) -> list[torch.Tensor]:
    """What some passes after it say."""
    return [one_pass(layer, 2, last[1], 100 + number) for number in range(3)]


@pytest.mark.parametrize("name", PASSES)
def test_a_layers_pass_that_fails_at_any_operation_has_never_been(name):
    layer, last = begun(name)
    twin, before, number = copy.deepcopy(layer), stream_state(layer.stream), 1
    # One and the same layer fails at one operation after the other, until the pass goes through.
    while True:
        try:
            with FaultAt(number):
                outputs = [one_pass(layer, *last)]
            break
        except Fault:
            layer.stream.abort()
        assert_same(stream_state(layer.stream), before, number)
        number += PASSES[name][4]
    assert number > 40
    outputs += more_passes(layer, last)
    expected = [one_pass(twin, *last), *more_passes(twin, last)]
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert_same(stream_state(layer.stream), stream_state(twin.stream), "after")


# -- models: every n-th ---------------------------------------------------------------------------------------------------

MODEL_SIZES = SIZES | {"recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8}
TRADING = ADMSConfig.adm_plus_plus(**MODEL_SIZES, **MODULES)
tiny, deep, windowed = (functools.cache(build) for build in (make_tiny_llama, deep_llama, small_window))
# name: (model, settings, batch, tokens before, new tokens that fail, whether rows are padded)
MODELS = {
    "a step": (tiny, ADMSConfig(**MODEL_SIZES), 1, 33, 1, False),
    "a due compaction": (tiny, ADMSConfig(**MODEL_SIZES), 2, 52, 8, False),
    "a long prefill": (tiny, ADMSConfig(**MODEL_SIZES), 1, 20, 60, False),
    "trading": (deep, TRADING, 1, None, 4, False),
    "a move of the window": (windowed, ADMSConfig(**MODEL_SIZES), 1, None, 4, False),
    "padded rows": (tiny, ADMSConfig(**MODEL_SIZES), 2, 52, 8, True),
    "sliding layers": (functools.cache(lambda: make("gemma2")), ADMSConfig(**MODEL_SIZES), 1, 52, 8, False),
}


def due(name: str, cache) -> bool:
    """Whether the next 4 tokens make the cache trade, or move its window."""
    stacks = cache.stream.stacks
    if not stacks:
        return False
    row = stacks[0].rows[0]
    if name == "trading":
        return bool(row.overfull(cache.config, 4) and row.compactions >= cache.stream.next_trades[0])
    window = cache.window
    return window.following[0] + 4 > window.limit


@torch.no_grad()
def given(model, cache, new: int, batch: int, padded: bool, seed: int) -> torch.Tensor:
    """Last hidden states of seeded random tokens; where rows are padded the first has half of each."""
    inputs = {}
    if padded:
        mask = torch.ones(batch, new, dtype=torch.long)
        mask[0, : new // 2] = 0
        inputs = {"attention_mask": mask}
    # The pass is over before the logits are made.
    return model.get_decoder()(token_ids(new, batch, seed=seed), past_key_values=cache, **inputs).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_a_models_pass_that_fails_at_one_operation_or_another_has_never_been(name):
    build, config, batch, tokens, new, padded = MODELS[name]
    model = build()
    cache = enable_adms_llm(model, config)
    for number in range(200):
        if tokens is None and due(name, cache) or tokens is not None and number * 4 >= tokens:
            break
        given(model, cache, 4, batch, padded, number)
    else:
        raise AssertionError("never due")
    twin, counter, probe = copy.deepcopy(cache), FaultAt(), copy.deepcopy(cache)
    with counter:
        given(model, probe, new, batch, padded, 77)
    if name == "trading":
        assert probe.stream.next_trades != cache.stream.next_trades
    if name == "a move of the window":
        assert probe.window.offsets != cache.window.offsets
    before = cache_state(cache)
    # Twenty places all over the pass, and the last ones each: those are the commit.
    places = sorted({*range(1, counter.calls, max(1, counter.calls // 20)), *range(counter.calls - 12, counter.calls + 1)})
    for number in places:
        with pytest.raises(Fault), FaultAt(number):
            given(model, cache, new, batch, padded, 77)
        assert_same(cache_state(cache), before, (number, counter.calls))
    for part, size in enumerate((new, 4, 4, 8)):
        assert torch.equal(*(given(model, own, size, batch, padded, 77 + part) for own in (cache, twin)))
    assert_same(cache_state(cache), cache_state(twin), "after")


def test_a_stream_that_is_interrupted_at_every_pass_says_what_it_would_have_said():
    model = tiny()
    cache, never = (enable_adms_llm(model, ADMSConfig(**MODEL_SIZES)) for _ in range(2))
    for number in range(30):
        ids = token_ids(4, seed=number)
        with pytest.raises(Fault), FaultAt(20 + 17 * number % 150):
            stream(model, ids, cache, 4)
        assert torch.equal(stream(model, ids, cache, 4), stream(model, ids, never, 4))
