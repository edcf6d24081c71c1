"""One layer: its buffer, its bound, what a compaction keeps, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import random_queries, random_states
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_llm import ADMSConfig, NonFiniteError, WeightedTokens
from streaming_llm.compressors import attention_matching
from streaming_llm.data.tokens import EXACT, PRECISION, RECENT, SINK
from streaming_llm.evaluation.lone_layer import LoneLayer
from streaming_llm.stream import upkeep

ALL = ("low_rank", "vq", "attention_matching")
DIM, HEADS, GROUPS = 8, 2, 2
SCALE = DIM**-0.5


def make(wired: bool = True, **chosen) -> LoneLayer:
    shape = {
        "start_size": 2, "recent_size": 10, "compressed_budget": 8, "compression_interval": 6, "rank": 4,
        "attention_window": 8, "min_importance_tokens": 0, "num_clusters": 3, "min_middle_size_for_compress": 0,
    }  # fmt: skip
    return LoneLayer(ADMSConfig(**{**shape, **chosen}), wired)


def feed(layer: LoneLayer, keys, values, seed: int = 1):
    """One forward pass of the layer: update, then attention, which shows the queries where the layer is wired."""
    got = layer.update(keys, values)
    if layer.wired:
        batch, heads, tokens, dim = keys.shape
        layer.observe(random_queries(tokens, batch, heads, GROUPS, dim, seed=seed).to(keys.dtype), SCALE)
    return got


def run(layer: LoneLayer, tokens: int, chunk: int, batch: int = 1, dtype=torch.float32, seed: int = 0):
    """Feed seeded random states in chunks; the states fed."""
    keys, values = random_states(tokens, batch, HEADS, DIM, seed, dtype)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        feed(layer, keys[:, :, part], values[:, :, part], seed=1000 + start)
    return keys, values


def state_of(layer: LoneLayer) -> dict:
    state = {"rows": () if layer.stack is None else layer.stack.rows}
    if layer.stack is not None:
        state.update({name: tensor.clone() for name, tensor in layer.held.tensors().items()})
        if layer.stack.queries is not None:
            state["queries"] = layer.stack.queries[:, :, :, : layer.row.queries].clone()
    return state


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        equal = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert equal, name


# -- the bound -----------------------------------------------------------------------------------------------------------


@given(
    compressor=st.sampled_from(ALL),
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 20), st.integers(0, 16), st.integers(1, 20)),
    chunks=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    batch=st.integers(1, 2),
    wired=st.booleans(),
    smallest=st.sampled_from([0, 64]),
    protect=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_no_head_ever_holds_more_than_expected_max_tokens(compressor, sizes, chunks, ratio, batch, wired, smallest, protect):
    start, recent, budget, interval = sizes
    layer = make(
        wired, compressor_type=compressor, start_size=start, recent_size=recent, compressed_budget=budget,
        compression_interval=interval, importance_ratio=ratio, min_middle_size_for_compress=smallest,
        protect_exact=protect,
    )  # fmt: skip
    seen, everything = 0, []
    for number, chunk in enumerate(chunks):
        keys, values = random_states(chunk, batch, HEADS, DIM, seed=number)
        everything.append(keys)
        got, _ = feed(layer, keys, values, seed=number)
        seen += chunk
        assert layer.length <= layer.config.expected_max_tokens
        assert got.shape[2] >= chunk and torch.equal(got[:, :, -chunk:], keys)
        assert layer.held.valid.sum(-1).max() <= layer.config.expected_max_tokens
        assert layer.get_seq_length() == seen
        for tensor in (layer.keys, layer.values, layer.held.mass, layer.held.score):
            assert tensor.isfinite().all()
        if layer.config.compressed_budget and budget:
            assert layer.held.count.sum(-1).eq(seen).all()
        # Sinks and recent window are the tokens that came first and last, to the bit.
        stream = torch.cat(everything, dim=2)
        held = min(start, seen)
        assert torch.equal(layer.keys[:, :, :held], stream[:, :, :held])
        newest = min(recent, seen)
        assert torch.equal(layer.keys[:, :, layer.length - newest :], stream[:, :, seen - newest :])


@given(
    compressor=st.sampled_from(ALL),
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    budget=st.integers(1, 16),
    floor=st.sampled_from([0.0, 0.5, 1.0]),
    cap=st.sampled_from([1.0, 1.7, 2.5]),
    batch=st.integers(1, 2),
)
@settings(deadline=None, max_examples=40)
def test_ragged_budgets_keep_the_bound_on_average_over_the_heads(compressor, chunks, budget, floor, cap, batch):
    layer = make(
        compressor_type=compressor, compressed_budget=budget, use_adaptive_budget=True, adaptive_budget_floor=floor,
        adaptive_budget_cap=cap,
    )  # fmt: skip
    for number, chunk in enumerate(chunks):
        keys, values = random_states(chunk, batch, 4, DIM, seed=number)
        # Heads that differ much in how much their tokens differ.
        spread = torch.tensor([0.01, 0.3, 1.0, 5.0])[None, :, None, None]
        feed(layer, 1 + spread * keys, 1 + spread * values, seed=number)
        assert layer.held_tokens().max() <= layer.config.expected_max_tokens
        if int(floor * budget):  # a head whose budget may be 0 has no token that others could join
            assert layer.held.count.sum(-1).eq(layer.seen).all()
        assert layer.keys.isfinite().all() and layer.values.isfinite().all()
    if layer.compacted:
        assert layer.variance.budgets.sum(-1).eq(4 * budget).all()
        assert layer.variance.budgets.min() >= int(floor * budget) and layer.variance.budgets.max() <= math.ceil(
            cap * budget
        )


@pytest.mark.parametrize(
    "zero",
    [
        {"start_size": 0},
        {"compressed_budget": 0},
        {"importance_ratio": 0.0},
        {"importance_ratio": 1.0},
        {"start_size": 0, "compressed_budget": 0, "recent_size": 1, "compression_interval": 1},
    ],
)
@pytest.mark.parametrize("wired", [True, False])
def test_a_budget_of_0_in_each_tier_works(zero, wired):
    layer = make(wired, **zero)
    for chunk in (1, 7, 60):
        layer.reset()
        run(layer, 120, chunk)
        assert layer.length <= layer.config.expected_max_tokens and layer.keys.isfinite().all()


# -- the buffer ----------------------------------------------------------------------------------------------------------


def test_decoding_copies_no_cache():
    layer = make()
    keys, values = random_states(80, 1, HEADS, DIM)
    addresses, compactions = {}, 0
    for place in range(80):
        got_keys, got_values = feed(layer, keys[:, :, place : place + 1], values[:, :, place : place + 1])
        compactions = layer.row.compactions
        own = (got_keys.data_ptr(), got_values.data_ptr())
        assert own == (layer.buffer.keys.data_ptr(), layer.buffer.values.data_ptr())
        assert addresses.setdefault(compactions, own) == own
    assert compactions >= 8


def test_a_compaction_happens_once_an_interval():
    layer = make()
    run(layer, 26, 1)
    assert layer.head_compactions == 0
    run(layer, 30, 1)
    assert layer.head_compactions == 5 * HEADS


def test_an_unfilled_layer_returns_what_was_put_in():
    layer = make()
    keys, values = random_states(20, 2, HEADS, DIM)
    feed(layer, keys[:, :, :13], values[:, :, :13])
    got = feed(layer, keys[:, :, 13:], values[:, :, 13:])
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)
    assert not layer.stack.compacted and layer.held.beta.eq(0).all()


def test_a_long_prefill_is_attended_to_as_a_whole_and_compacted_after():
    layer = make()
    keys, values = random_states(100, 1, HEADS, DIM)
    got = layer.update(keys, values)
    assert torch.equal(got[0], keys) and layer.stream.part_of(0).overflows and layer.stack is None
    layer.observe(random_queries(100), SCALE)
    assert layer.stream.open is None and layer.length == layer.row.resting(layer.config) == 20


@given(chunks=st.lists(st.integers(1, 60), min_size=1, max_size=8))
@settings(deadline=None, max_examples=30)
def test_the_mask_sizes_are_those_of_the_keys_that_come_back(chunks):
    layer = make()
    for number, chunk in enumerate(chunks):
        length, offset = layer.get_mask_sizes(chunk)
        assert layer.get_mask_sizes(torch.arange(chunk)) == (length, offset)
        keys, values = random_states(chunk, 1, HEADS, DIM, seed=number)
        seen = layer.get_seq_length()
        got, _ = feed(layer, keys, values)
        assert got.shape[2] == length and offset + length == seen + chunk


# -- what a compaction keeps ---------------------------------------------------------------------------------------------


@pytest.fixture
def every_query(monkeypatch):
    """Scores are taken from every query, whatever stride the layer uses to save time."""
    for module in (upkeep, attention_matching):
        for name in [name for name in vars(module) if name.endswith("_STEP")]:
            monkeypatch.setattr(module, name, 1)


@pytest.mark.parametrize("compressor", ALL)
@pytest.mark.parametrize("prefill", [False, True])
def test_a_compaction_conserves_the_masses_of_the_reference_queries(every_query, compressor, prefill):
    tokens, stored = (60, 10) if prefill else (26, 8)
    # Scores are those of the last `attention_window` queries; a fit is to all that are stored.
    window = 4 if compressor == "low_rank" else stored
    layer = make(compressor_type=compressor, attention_window=4)
    keys, values = random_states(tokens, 2, HEADS, DIM)
    queries = random_queries(tokens, 2)
    for part in [slice(0, 60)] if prefill else [slice(0, 22), slice(22, 26)]:
        layer.update(keys[:, :, part], values[:, :, part])
        layer.observe(queries[:, :, part], SCALE)
    if not prefill:
        layer.compact()
    assert layer.stack.compacted and layer.length == 20
    queries = queries[:, :, -window:]
    grouped = queries.reshape(2, HEADS, GROUPS * window, DIM)
    logits = grouped @ keys.transpose(-1, -2) * SCALE
    for group in range(GROUPS):
        for place in range(window):
            logits[:, :, group * window + place, tokens - (window - 1 - place) :] = -torch.inf
    normaliser = logits.logsumexp(-1, keepdim=True)
    before = (logits - normaliser)[..., 2 : tokens - 10].exp().sum((2, 3))
    middle = layer.held.slice(2, 10)
    after = (grouped @ middle.keys.transpose(-1, -2) * SCALE + middle.beta[:, :, None] - normaliser).exp().sum((2, 3))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0)


@pytest.mark.parametrize("compressor", ALL)
def test_exact_tokens_equal_their_originals_to_the_bit_after_many_compactions(compressor):
    layer = make(compressor_type=compressor)
    keys, values = run(layer, 120, 4, batch=2)
    held = layer.held
    slot = held.pos.round().long()
    single = held.valid & (held.count == 1)
    # A cluster of one token is still a made token: its key went through a weighted mean.
    kept = held.valid if compressor != "vq" else held.tier != PRECISION
    single = single & kept
    original = keys.gather(2, slot[..., None].expand(*slot.shape, DIM))
    assert torch.equal(held.keys[kept], original[kept])
    if compressor != "attention_matching":
        original = values.gather(2, slot[..., None].expand(*slot.shape, DIM))
        assert torch.equal(held.values[single], original[single])
        assert held.beta[single].eq(0).all()
    assert held.count.sum(-1).eq(120).all()
    assert (held.pos.diff(dim=-1) > 0).all()
    assert held.tier[..., :2].eq(SINK).all() and held.tier[..., 10:].eq(RECENT).all()


def test_the_most_important_tokens_are_the_exact_tier():
    layer = make(compressed_budget=4, importance_ratio=0.5)
    keys, values = random_states(26, 1, 1, DIM)
    keys = 0.1 * keys
    # Slots 5 and 9 of the middle get the attention of every query.
    keys[0, 0, 5] = keys[0, 0, 9] = torch.full((DIM,), 5.0)
    layer.update(keys, values)
    layer.observe(torch.ones(1, 2, 26, DIM), SCALE)
    layer.compact()
    exact = layer.held.pos[0, 0][layer.held.tier[0, 0] == EXACT].tolist()
    assert {5.0, 9.0} <= set(layer.held.pos[0, 0].tolist())
    assert set(exact) <= {5.0, 9.0}


def test_importance_by_value_norm_keeps_the_longest_values():
    layer = make(importance_metric="value_norm", importance_ratio=1.0, compressed_budget=3)
    keys, values = random_states(26, 1, 1, DIM)
    for place in (4, 8, 13):
        values[0, 0, place] *= 100
    feed(layer, keys, values)
    layer.compact()
    assert layer.held.pos[0, 0, 2:5].tolist() == [4.0, 8.0, 13.0]


def test_a_small_middle_is_not_given_to_the_compressor():
    layer = make(min_middle_size_for_compress=64, importance_ratio=0.0, importance_metric="value_norm")
    keys, values = random_states(26, 1, 1, DIM)
    largest = values[0, 0, 2:16].norm(dim=-1).topk(8).indices + 2
    feed(layer, keys, values)
    layer.compact()
    assert layer.held.pos[0, 0, 2:10].tolist() == sorted(largest.tolist())


def test_coverage_keeps_a_token_of_every_segment():
    layer = make(
        importance_metric="value_norm", importance_ratio=1.0, compressed_budget=4, coverage_priority=1.0,
        coverage_segments=4, recent_size=4,
    )  # fmt: skip
    keys, values = random_states(16, 1, 1, DIM)
    values = values * torch.linspace(10, 1, 16)[:, None] ** 3
    feed(layer, keys, values)
    layer.compact()
    kept = layer.held.pos[0, 0, 2:6]
    segments = ((kept - 2) / 9 * 4).long().clamp(0, 3).tolist()
    assert segments == [0, 1, 2, 3]


def test_a_permutation_of_heads_permutes_the_layer():
    order = torch.tensor([2, 0, 1])
    keys, values = random_states(90, 1, 3, DIM)
    queries = random_queries(90, 1, 3)
    layers = make(), make()
    for layer, heads in zip(layers, (torch.arange(3), order), strict=True):
        shown = queries.view(1, 3, GROUPS, 90, DIM)[:, heads].flatten(1, 2)
        for start in range(0, 90, 5):
            part = slice(start, start + 5)
            layer.update(keys[:, heads, part], values[:, heads, part])
            layer.observe(shown[:, :, part], SCALE)
    for name, tensor in layers[0].held.tensors().items():
        torch.testing.assert_close(getattr(layers[1].held, name), tensor[:, order], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("compressor", ALL)
def test_a_row_alone_holds_what_it_holds_in_a_batch(compressor):
    keys, values = random_states(60, 3, HEADS, DIM)
    queries = random_queries(60, 3)
    together, alone = make(compressor_type=compressor), make(compressor_type=compressor)
    for start in range(0, 60, 5):
        part = slice(start, start + 5)
        for layer, rows in ((together, slice(0, 3)), (alone, slice(1, 2))):
            layer.update(keys[rows, :, part], values[rows, :, part])
            layer.observe(queries[rows, :, part], SCALE)
    for name, tensor in together.held.tensors().items():
        torch.testing.assert_close(getattr(alone.held, name), tensor[1:2], rtol=1e-3, atol=1e-4, msg=name)


# -- what attention is told ----------------------------------------------------------------------------------------------


def test_the_bias_is_log_mass_with_causality_among_the_new_tokens():
    layer = make()
    run(layer, 60, 5)
    keys, values = random_states(3, 1, HEADS, DIM, seed=5)
    layer.update(keys, values)
    bias = layer.attention_bias(3, GROUPS, torch.float32)
    beta = layer.stream.part_of(0).stack.tokens.beta[:, :, : bias.shape[-1]]
    assert bias.shape == (1, HEADS * GROUPS, 3, beta.shape[-1])
    lowest = torch.finfo(torch.float32).min / 2
    for head in range(HEADS * GROUPS):
        for query in range(3):
            hidden = 2 - query
            seen = beta.shape[-1] - hidden
            assert torch.equal(bias[0, head, query, :seen], beta[0, head // GROUPS, :seen])
            assert bias[0, head, query, seen:].eq(lowest).all()


def test_unused_slots_get_the_smallest_number():
    layer = make(use_adaptive_budget=True)
    keys, values = random_states(60, 1, HEADS, DIM)
    keys[:, 0], values[:, 0] = 1 + 0.01 * keys[:, 0], 1 + 0.01 * values[:, 0]
    feed(layer, keys, values)
    valid = torch.nn.functional.pad(layer.held.valid, (0, 1), value=True)
    assert (~valid).any()
    layer.update(*random_states(1, 1, HEADS, DIM, seed=3))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = layer.attention_bias(1, GROUPS, dtype)
        unused = ~valid.repeat_interleave(GROUPS, dim=1)
        assert bias.dtype == dtype and bias.isfinite().all()
        assert bias[:, :, 0][unused].eq(torch.finfo(dtype).min / 2).all()


# -- half precision, little things ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_finite(compressor, dtype):
    layer = make(compressor_type=compressor)
    run(layer, 120, 7, batch=2, dtype=dtype)
    held = layer.held
    assert held.keys.dtype == held.values.dtype == dtype
    assert held.beta.dtype == held.score.dtype == torch.float32
    for tensor in held.tensors().values():
        assert tensor.isfinite().all()


def test_one_token_is_enough():
    layer = make()
    keys, values = run(layer, 1, 1)
    assert layer.length == layer.seen == 1 and torch.equal(layer.keys, keys)
    layer.compact()
    assert layer.length == 1 and not layer.compacted


def test_a_fresh_layer_answers_every_question():
    layer = make()
    assert layer.keys is None and layer.values is None and layer.nbytes == 0
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(5) == (5, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
    assert layer.held_tokens().tolist() == [0]
    layer.crop(-3)
    layer.reset()


def test_compaction_time_is_counted_only_when_asked_for():
    layer = make()
    run(layer, 60, 5)
    assert layer.stream.clock.seconds == 0
    layer.stream.clock.running = True
    run(layer, 60, 5)
    assert layer.stream.clock.seconds > 0


def test_what_is_counted_adds_up():
    layer = make()
    run(layer, 26, 1)
    assert int(layer.kept_exact) == int(layer.dropped) == 0
    run(layer, 1, 1)
    # 26 tokens were held: 2 sinks and 10 recent left 14 for a middle of 8.
    assert layer.head_compactions == HEADS
    assert int(layer.kept_exact) + int(layer.kept_compressed) == 8 * HEADS
    assert int(layer.dropped) == 6 * HEADS


# -- what is refused, and ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["key_states", "value_states"])
@pytest.mark.parametrize("tokens,new", [(0, 1), (10, 3), (26, 1), (60, 50)])
def test_nan_or_inf_is_refused_by_name_and_changes_nothing(bad, which, tokens, new):
    layer = make()
    if tokens:
        run(layer, tokens, 5)
    before = state_of(layer)
    keys, values = random_states(new, 1, HEADS, DIM, seed=9)
    (keys if which == "key_states" else values)[0, 1, new // 2, 3] = bad
    with pytest.raises(NonFiniteError, match=which):
        feed(layer, keys, values)
    assert_same(state_of(layer), before)


@pytest.mark.parametrize("shape", [{"batch": 2}, {"heads": 3}, {"dim": 4}], ids=["batch", "heads", "dim"])
def test_states_that_do_not_fit_are_refused_and_change_nothing(shape):
    layer = make()
    run(layer, 26, 5)
    before = state_of(layer)
    keys, values = random_states(2, **{"batch": 1, "heads": HEADS, "dim": DIM, **shape})
    with pytest.raises(ValueError, match="(do|does) not fit the cache"):
        layer.update(keys, values)
    assert_same(state_of(layer), before)


def test_a_rank_above_head_dim_is_refused_at_the_first_token():
    layer = make(rank=9)
    with pytest.raises(ValueError, match="rank=9.*head_dim=8"):
        layer.update(*random_states(1, 1, HEADS, DIM))
    assert layer.buffer is None and layer.seen == 0


@pytest.mark.parametrize("compressor", ["low_rank", "attention_matching"])
@pytest.mark.parametrize("tokens,new", [(3, 1), (20, 6), (26, 9), (57, 1), (60, 6)])
def test_an_update_taken_back_leaves_no_trace(compressor, tokens, new):
    taken_back, never = make(compressor_type=compressor), make(compressor_type=compressor)
    for layer in (taken_back, never):
        run(layer, tokens, 5)
    keys, values = random_states(new, 1, HEADS, DIM, seed=9)
    taken_back.update(1e3 * keys, -values)
    taken_back.stream.abort()
    assert taken_back.seen == tokens
    for layer in (taken_back, never):
        feed(layer, keys, values)
        run(layer, 30, 3, seed=4)
    assert_same(state_of(taken_back), state_of(never))


@pytest.mark.parametrize("compressor", ["low_rank", "attention_matching"])
@pytest.mark.parametrize("tokens,new", [(3, 1), (3, 4), (14, 1), (14, 6), (20, 4), (26, 60)])
def test_an_update_whose_queries_were_seen_is_taken_back_without_a_trace(compressor, tokens, new):
    taken_back, never = make(compressor_type=compressor), make(compressor_type=compressor)
    for layer in (taken_back, never):
        run(layer, tokens, 4)
    keys, values = random_states(new, 1, HEADS, DIM, seed=9)
    taken_back.ends_passes = False
    taken_back.update(keys, values)
    taken_back.observe(random_queries(new, seed=77), SCALE)
    taken_back.stream.abort()
    taken_back.ends_passes = True
    for layer in (taken_back, never):
        feed(layer, keys, values)
        run(layer, 30, 3, seed=4)
    assert_same(state_of(taken_back), state_of(never))


def test_crop_removes_the_newest_tokens():
    cropped, never = make(), make()
    keys, values = random_states(20, 1, HEADS, DIM)
    feed(cropped, keys, values)
    cropped.crop(-7)
    feed(never, keys[:, :, :13], values[:, :, :13])
    assert cropped.seen == 13 and torch.equal(cropped.keys, never.keys)
    got, _ = feed(cropped, keys[:, :, 13:15], values[:, :, 13:15])
    assert torch.equal(got, keys[:, :, :15])
    cropped.crop(4)
    assert cropped.seen == 4 and torch.equal(cropped.keys, keys[:, :, :4])
    cropped.crop(0)
    cropped.crop(50)
    assert cropped.seen == 4


def test_crop_of_a_compacted_layer_stops_at_the_middle():
    layer = make()
    keys, _ = run(layer, 63, 1)
    before = state_of(layer)
    exact = layer.length - 10
    with pytest.raises(ValueError, match=rf"crop\(-{exact + 1}\).*last {exact} tokens"):
        layer.crop(-exact - 1)
    assert_same(state_of(layer), before)
    layer.crop(-5)
    assert layer.seen == 58 and torch.equal(layer.keys[:, :, -1], keys[:, :, 57])
    run(layer, 40, 1, seed=3)
    assert layer.held.count.sum(-1).eq(98).all()


def test_reset_makes_a_new_layer():
    layer, fresh = make(), make()
    run(layer, 100, 7, batch=2)
    layer.reset()
    assert layer.nbytes == 0 and layer.keys is None and layer.stack is None
    for each in (layer, fresh):
        run(each, 70, 7)
    assert_same(state_of(layer), state_of(fresh))


@pytest.mark.parametrize("tokens", [10, 70])
def test_a_deep_copy_goes_its_own_way(tokens):
    layer = make()
    run(layer, tokens, 5)
    twin = copy.deepcopy(layer)
    before = state_of(layer)
    assert_same(state_of(twin), before)
    run(twin, 40, 5, seed=8)
    assert_same(state_of(layer), before)
    run(layer, 40, 5, seed=8)
    assert_same(state_of(layer), state_of(twin))


@pytest.mark.parametrize("tokens", [10, 70])
@pytest.mark.parametrize(
    "rows",
    [
        [2, 0, 0],
        [0, 0, 1, 1, 2, 2],
        [1],
    ],
)
def test_rows_move_with_everything_that_belongs_to_them(tokens, rows):
    layer = make(use_adaptive_budget=True)
    run(layer, tokens, 5, batch=3)
    before = state_of(layer)
    layer.stream.pick(rows)
    after = state_of(layer)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[name], value[rows]), name
    keys, values = random_states(40, 3, HEADS, DIM, seed=8)
    feed(layer, keys[rows], values[rows])
    assert layer.held.count.sum(-1).eq(tokens + 40).all()


def test_offloading_is_refused():
    with pytest.raises(NotImplementedError, match="from_memory"):
        make().offload()


def test_a_wired_layer_that_is_shown_no_queries_says_so_before_it_forgets_anything():
    layer = make()
    keys, values = random_states(26, 1, HEADS, DIM)
    before = state_of(layer)
    layer.update(keys, values)
    with pytest.raises(RuntimeError, match="not \\(or no longer\\) enabled"):
        layer.stream.commit()
    assert_same(state_of(layer), before)


def test_a_forward_outside_no_grad_works_too():
    layer = make()
    for number in range(12):
        keys, values = random_states(5, 1, HEADS, DIM, seed=number)
        feed(layer, keys.requires_grad_(), values.requires_grad_())
    assert layer.compacted
    assert not layer.held.mass.requires_grad and not layer.held.score.requires_grad


def test_values_may_be_wider_than_keys():
    layer = make()
    keys, _ = random_states(90, 1, HEADS, DIM)
    values, _ = random_states(90, 1, HEADS, 12, seed=3)
    for start in range(0, 90, 5):
        feed(layer, keys[:, :, start : start + 5], values[:, :, start : start + 5])
    assert layer.values.shape[-1] == 12 and layer.values.isfinite().all()
    assert isinstance(layer.held, WeightedTokens)
