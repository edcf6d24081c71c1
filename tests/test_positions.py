"""Streams past the trained length: positions stay inside it, and what is held moves with them."""

from __future__ import annotations

import pytest
import torch
from conftest import random_queries, stream, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import make
from test_rows import SMALL, left_padded, run_padded
from transformers import DynamicCache

from streaming_llm import ADMSConfig, enable_adms_llm, enable_streaming_llm
from streaming_llm.data.tokens import CHANGED
from streaming_llm.evaluation.lone_layer import LoneLayer
from streaming_llm.maths.importance import attention_logits
from streaming_llm.stream.arrival import Arrival
from streaming_llm.stream.passes import StackPass
from streaming_llm.stream.positions import PositionWindow

WINDOW = 96


def small_window(name: str = "llama", **chosen):
    return make(name, **{"max_position_embeddings": WINDOW, **chosen})


MODEL = small_window()
CONFIGS = {
    "base": ADMSConfig(**SMALL),
    "cache": ADMSConfig(**SMALL, position_policy="cache"),
    "vq": ADMSConfig(**SMALL, compressor_type="vq"),
    "modules": ADMSConfig.adm_plus_plus(**SMALL, sketch_budget=4, replay_budget=2, energy_replay_threshold=1.0),
    "grid": ADMSConfig.adm_plus_plus(**SMALL, sketch_budget=4, replay_budget=2, anchor_mode="grid"),
}


@pytest.fixture
def given_positions():
    """Every tensor of positions that MODEL's rotary module is given."""
    seen = []

    def note(module, args, kwargs):
        seen.append((kwargs["position_ids"] if "position_ids" in kwargs else args[1]).clone())

    handle = MODEL.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    "name,chunk", [*((name, chunk) for name in CONFIGS for chunk in (5, 40)), ("base", 1), ("modules", 1)]
)
def test_positions_never_leave_the_window_and_keep_their_order(name, chunk, given_positions):
    # More than twice the window.
    config, tokens = CONFIGS[name], 200
    cache, ids = enable_adms_llm(MODEL, config), token_ids(tokens, 2)
    for start in range(0, tokens, chunk):
        assert stream(MODEL, ids[:, start : start + chunk], cache, chunk).isfinite().all()
        assert cache.held_tokens <= config.expected_max_tokens and cache.get_seq_length() == min(tokens, start + chunk)
        for layer in cache.layers:
            held = layer.held
            assert (held.pos[held.valid] >= 0).all() and (held.pos[held.valid] < WINDOW).all()
            both = held.valid[..., 1:] & held.valid[..., :-1]
            assert (held.pos.diff(dim=-1)[both] >= 0).all()
            recent = held.pos[:, :, -min(layer.stack.columns, config.recent_size) :]
            assert (recent.diff(dim=-1) == 1).all()
    assert 0 <= min(int(p.min()) for p in given_positions) and max(int(p.max()) for p in given_positions) < WINDOW


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_stream_at_token_5_000_000_gives_the_logits_of_one_near_0(config):
    ids, start = token_ids(150), 5_000_000
    expected = stream(MODEL, ids, enable_adms_llm(MODEL, config), 5)
    cache, parts = enable_adms_llm(MODEL, config), []
    with torch.no_grad():
        for at in range(0, 150, 5):
            positions = torch.arange(start + at, start + at + 5)[None]
            parts.append(MODEL(ids[:, at : at + 5], position_ids=positions, past_key_values=cache).logits)
    assert torch.equal(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("policy", ["auto", "cache"])
def test_every_held_key_is_the_models_own_at_its_position(policy):
    # One layer: its keys before RoPE depend on the token alone.
    model = small_window(num_hidden_layers=1)
    cache = enable_adms_llm(model, **SMALL, position_policy=policy)
    ids = token_ids(400)
    stream(model, ids, cache, 4)
    layer = cache.layers[0]
    every = DynamicCache(config=model.config)
    stream(model, torch.arange(128)[None], every, 128)
    own = layer.rope.unrotate(every.layers[0].keys, torch.arange(128.0))
    held = layer.held
    bare = layer.rope.unrotate(held.keys, held.pos)
    # Each is one token of the vocabulary, turned to where the cache says it stands.
    nearest = torch.cdist(bare[0], own[0], compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
    assert nearest.max() < 1e-4 * own.norm(dim=-1).max()
    recent = own[:, :, ids[0, -16:]]
    torch.testing.assert_close(bare[:, :, -16:], recent, rtol=1e-4, atol=1e-4)
    assert cache.window.offsets[0] > 200


def test_the_true_positions_hold_while_they_fit_and_absolute_ones_always(given_positions):
    ids = token_ids(WINDOW + 60)
    logits = {}
    for name, chosen in (("auto", {}), ("absolute", {"position_policy": "absolute"}), ("off", {"enable_pos_shift": False})):
        given_positions.clear()
        logits[name] = stream(MODEL, ids, enable_adms_llm(MODEL, **SMALL, **chosen), 4)
        most = max(int(p.max()) for p in given_positions)
        assert most < WINDOW if name == "auto" else most == WINDOW + 59
    assert torch.equal(logits["auto"][:, :WINDOW], logits["absolute"][:, :WINDOW])
    assert torch.equal(logits["absolute"], logits["off"])
    assert not torch.equal(logits["auto"][:, WINDOW:], logits["absolute"][:, WINDOW:])


def test_a_move_changes_no_distance_within_a_stream_that_was_never_compacted():
    """A window that starts late is moved as a whole: attention depends on differences only."""
    roomy = {**SMALL, "recent_size": 48}
    cache, ids = enable_adms_llm(MODEL, **roomy), token_ids(50)
    near = stream(MODEL, ids, enable_adms_llm(MODEL, **roomy), 5)
    parts = []
    with torch.no_grad():
        for at in range(0, 50, 5):
            positions = torch.arange(70 + at, 75 + at)[None]
            parts.append(MODEL(ids[:, at : at + 5], position_ids=positions, past_key_values=cache).logits)
    assert cache.window.offsets[0] > 0
    torch.testing.assert_close(torch.cat(parts, 1), near, rtol=0, atol=2e-3)


def test_the_index_in_the_cache_is_what_streaming_llm_counts(given_positions):
    cache = enable_streaming_llm(MODEL, 2, 16, compression_interval=1, rank=8, position_policy="cache")
    for token in token_ids(60).T:
        given_positions.clear()
        held = cache.held_tokens
        stream(MODEL, token[None], cache, 1)
        assert given_positions[0].tolist() == [[min(held, 18)]]
        assert cache.layers[0].held.pos[0, 0].tolist() == list(range(cache.held_tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_shifts_of_a_half_precision_key_are_one_rounding(dtype, count):
    config = ADMSConfig(**{**SMALL, "start_size": 0})
    model = small_window().to(dtype)
    rope = enable_adms_llm(model, config).layers[0].rope
    layer = LoneLayer(config)
    layer.stream.ropes[0] = rope
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 10, 8, generator=generator).to(dtype)
    at = 1000
    layer.update(keys, values, arrival=Arrival(10, (10,), torch.arange(at, at + 10)[None]))
    layer.observe(random_queries(10).to(dtype), 8**-0.5)
    first = layer.held.pos
    steps = torch.randint(-40, 41, (count,), generator=generator)
    for step in steps.tolist():
        # The cache asks for moves back only; forward is the same rotation.
        at -= step
        layer.stream.stacks = [layer.stream.upkeep.moved(layer.stack, [step])]
    held = layer.held
    assert torch.equal(held.pos, first + (at - 1000))
    once = rope.move(keys.double(), first, held.pos)
    rounding = torch.finfo(dtype).eps / 2 * once.abs().clamp_min(once.abs().amax(-1, keepdim=True) * 2**-6)
    assert ((held.keys.double() - once).abs() <= 1.01 * rounding + 1e-5).all()
    if dtype == torch.bfloat16:  # what it would be without the exact keys
        drifted = keys.clone()
        for step in steps.tolist():
            drifted = rope.shift(drifted, -step)
        assert (drifted.double() - once).abs().max() > 20 * (held.keys.double() - once).abs().max()


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_float32_keys_drift_by_far_less_than_a_rounding_of_half_precision(count):
    rope = enable_adms_llm(MODEL, **SMALL).layers[0].rope
    keys = torch.randn(1, 2, 10, 8, generator=torch.Generator().manual_seed(0))
    moved, at = keys.clone(), torch.full((1, 2, 10), 1000.0)
    steps = torch.randint(-40, 41, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    for step in steps:
        moved, at = rope.move(moved, at, at - step), at - step
    once = rope.move(keys.double(), torch.full((1, 2, 10), 1000.0), at)
    assert (moved - once).norm() / once.norm() < 1e-4 < torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("name,config", [(n, c) for n, c in CONFIGS.items() if n in ("base", "modules")])
def test_half_precision_streams_hold_exact_keys_once_they_moved(name, config):
    model = small_window().to(torch.bfloat16)
    cache = enable_adms_llm(model, config)
    stream(model, token_ids(80, 2), cache, 8)
    assert not cache.layers[0].held.exact
    stream(model, token_ids(300, 2), cache, 8)
    for layer in cache.layers:
        held = layer.held
        assert held.exact
        expected = layer.rope.move(held.exact_keys, held.exact_pos, held.pos)
        same = torch.where((held.pos == held.exact_pos)[..., None], held.exact_keys, expected)
        assert torch.equal(torch.where(held.valid[..., None], held.keys, 0), torch.where(held.valid[..., None], same, 0))
    said = config.memory_bytes(model.config, torch.bfloat16, 2, moved=True)
    assert cache.nbytes == said if name == "base" else abs(cache.nbytes - said) < 0.1 * said


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shift", [7, 40])
def test_no_token_that_weighs_more_than_itself_draws_more_after_a_move(config, shift):
    """`shift`: less than the distance to the cache's beginning, and more."""
    cache = enable_adms_llm(MODEL, config)
    stream(MODEL, token_ids(93, 2), cache, 3)
    lighter = 0
    for stack in cache.stream.stacks:
        row, rows = stack.rows[0], [0, 1]
        middle = slice(config.dynamic_start_size, config.dynamic_start_size + row.width)
        number = min(config.recent_size, config.kept_queries)
        assert row.queries >= number > 0
        moved = cache.stream.upkeep.moved(stack, [shift] * 2)
        logits, betas = [], []
        for own in (stack, moved):
            held = own.held(rows)
            logits.append(attention_logits(own.stored_queries(rows).last(number), held.keys, held.beta))
            betas.append(held.beta[:, :, middle])
        sums = logits[0].exp().sum(-1, keepdim=True)
        before, after = ((own.exp() / sums).sum((2, 3))[..., middle] for own in logits)
        beta, less = betas
        assert ((less <= beta) & ((less == beta) | (less > 0))).all()
        heavy = less > 2 * CHANGED
        assert (after <= before * 1.001 + 1e-6)[heavy].all()
        lighter += int((less < beta).sum())
    assert lighter


@pytest.mark.parametrize(("chunk", "tokens"), [(1, 66), (3, 63)])
def test_the_stored_queries_are_those_of_the_newest_tokens(chunk, tokens, monkeypatch):
    cache, shown = enable_adms_llm(MODEL, **SMALL), []
    layer, observe = cache.layers[0], StackPass.observe

    def observed(part, number, query, *args):
        if number == 0:
            shown.append(query)
        observe(part, number, query, *args)

    monkeypatch.setattr(StackPass, "observe", observed)

    def stored():
        states = layer.stack.stored_queries([0]).states
        return layer.stack.of_layer(0, states).flatten(1, 2)

    for _ in range(tokens // chunk):
        stream(MODEL, token_ids(chunk, 1), cache, chunk)
        told = torch.cat(shown, dim=2)
        window = stored().shape[2]
        assert stored().equal(told[:, :, -window:])
        assert window >= min(told.shape[2], cache.config.kept_queries)
    row = layer.stack.rows[0]
    assert row.compactions and 0 < row.kept < row.queries, "some are from before the last compaction, some from after it"
    cache.crop(-1)
    assert stored().equal(told[:, :, -window:-1]), "the query of a token that is taken back goes with it"


def queries_at_moves(cache):
    """How many queries every move of the cache's positions has to look at, from now on."""
    seen, moved = [], cache.stream.upkeep.moved

    def note(stack, shifts):
        seen.extend(row.queries for row, shift in zip(stack.rows, shifts, strict=True) if shift)
        return moved(stack, shifts)

    cache.stream.upkeep.moved = note
    return seen


@pytest.mark.parametrize("name", ["base", "cache", "vq"])
@pytest.mark.parametrize("chunk", [8, 20, 30])
def test_a_move_has_its_queries_however_long_the_pass_that_wants_it(name, chunk):
    """A long pass needs the room of the stored queries: they go, but not before the move."""
    cache = enable_adms_llm(MODEL, CONFIGS[name])
    stream(MODEL, token_ids(60), cache, 5)
    seen = queries_at_moves(cache)
    stream(MODEL, token_ids(120), cache, chunk)
    assert seen and min(seen) >= cache.config.kept_queries


def stretch(tokens, mass_decay, limit=WINDOW):
    """Log-masses of the first layer after so many tokens at the given decay."""
    cache = enable_adms_llm(MODEL, **SMALL, mass_decay=mass_decay)
    cache.stream.upkeep.limit = limit
    stream(MODEL, token_ids(tokens, 2), cache, 4)
    return cache.layers[0].held.beta.clone()


def test_masses_fade_past_the_trained_length_only():
    assert torch.equal(stretch(WINDOW, 0.5), stretch(WINDOW, 1.0))
    assert torch.equal(stretch(300, 0.5, limit=None), stretch(300, 1.0))
    heavy = [float(stretch(300, decay).clamp_min(0).mean()) for decay in (1.0, 0.9, 0.1)]
    assert heavy[0] > heavy[1] > heavy[2]


def test_what_a_token_weighs_for_others_fades_by_the_decay():
    cache = enable_adms_llm(MODEL, **SMALL, mass_decay=0.25)
    stream(MODEL, token_ids(90, 2), cache, 1)
    stack, config, rows, seen = cache.stream.stacks[0], cache.config, [0, 1], []
    row, compress = stack.rows[0], cache.stream.compressor.compress
    cache.stream.compressor.compress = lambda tokens, *args: (seen.append(tokens.beta), compress(tokens, *args))[1]
    before = stack.held(rows).beta[:, :, config.dynamic_start_size : row.length - config.recent_size]
    assert (before > 0.1).any()
    cache.stream.upkeep.limit = row.seen - 1
    cache.stream.upkeep.compacted(stack, [rows])
    share = 0.25 ** ((row.length - row.resting(config)) / 64)
    assert share < 1
    expected = torch.where(before > CHANGED, (1 + (before.exp() - 1) * share).log(), before)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-6)


def test_rows_move_each_by_its_own_count():
    rows = [token_ids(300, seed=1)[0], token_ids(230, seed=2)[0]]
    ids, mask, positions = left_padded(rows)
    cache = enable_adms_llm(MODEL, **SMALL)
    run_padded(MODEL, cache, ids[:, :290], mask[:, :290], positions[:, :290], [80, *[5] * 42])
    assert len(cache.window.offsets) == 2
    before = list(cache.window.offsets)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.window.offsets == before[::-1]


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "smollm3", "gpt_neox", "qwen3"])
def test_families_stream_past_their_trained_length(name):
    model = small_window(name)
    cache, ids = enable_adms_llm(model, **SMALL), token_ids(200, 2)
    logits = stream(model, ids, cache, 8)
    assert logits.isfinite().all()
    assert cache.window.offsets[0] > 0
    far = enable_adms_llm(model, **SMALL)
    parts = []
    with torch.no_grad():
        for at in range(0, 200, 8):
            place = torch.arange(9_000 + at, 9_008 + at)[None]
            parts.append(model(ids[:, at : at + 8], position_ids=place, past_key_values=far).logits)
    assert torch.equal(torch.cat(parts, 1), logits)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
                 "original_max_position_embeddings": 64, "rope_theta": 10000.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_that_change_with_length_are_kept_from_changing(kind):
    model = small_window(rope_parameters=dict(ROPES[kind]))
    cache = enable_adms_llm(model, **SMALL)
    assert cache.window.limit == (64 if kind == "longrope" else WINDOW - 1)
    before = model.model.rotary_emb.inv_freq.clone()
    ids = token_ids(200)
    logits = stream(model, ids, cache, 5)
    assert logits.isfinite().all() and torch.equal(model.model.rotary_emb.inv_freq, before)
    # Another cache that went far stretches them; ours puts them back.
    stream(model, token_ids(200), DynamicCache(config=model.config), 50)
    assert torch.equal(stream(model, ids, enable_adms_llm(model, **SMALL), 5), logits)
    with pytest.raises(ValueError, match=f"rope_type '{kind}'.*position_policy='auto'"):
        stream(model, ids, enable_adms_llm(model, **SMALL, position_policy="absolute"), 5)


def test_a_table_of_learned_positions_ends_with_a_clear_error():
    model = make("gpt2", n_positions=64)
    cache = enable_adms_llm(model, **SMALL)
    stream(model, token_ids(64), cache, 4)
    with pytest.raises(ValueError, match="position 64 is past the 64 positions .* 'gpt2' has no RoPE"):
        stream(model, token_ids(1), cache, 1)
    assert cache.get_seq_length() == 64
    with pytest.raises(ValueError, match="position_policy='cache'"):
        enable_adms_llm(model, **SMALL, position_policy="cache")


@pytest.mark.parametrize("policy", ["auto", "cache"])
def test_what_can_not_fit_into_the_window_is_refused_and_nothing_changed(policy):
    cache = enable_adms_llm(MODEL, **SMALL, position_policy=policy)
    stream(MODEL, token_ids(60), cache, 5)
    for tokens in (WINDOW, WINDOW + 40):
        with pytest.raises(ValueError, match=f"{tokens} new tokens beside .*prefill_chunk_size"):
            stream(MODEL, token_ids(tokens), cache, tokens)
        assert cache.get_seq_length() == 60
    assert stream(MODEL, token_ids(40), cache, 40).isfinite().all()
    with pytest.raises(ValueError, match="position_ids start at 0"):
        cache.window.offsets = [50]
        MODEL(token_ids(1), position_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache)


def test_a_failed_pass_leaves_positions_as_they_were():
    caches = [enable_adms_llm(MODEL, **SMALL) for _ in range(2)]
    ids = token_ids(200)
    for start in range(0, 200, 4):

        def fail(module, args, kwargs):
            raise RuntimeError("on purpose")

        if start % 12 == 0:
            handle = MODEL.model.layers[1].mlp.register_forward_pre_hook(fail, with_kwargs=True)
            with pytest.raises(RuntimeError, match="on purpose"):
                stream(MODEL, ids[:, start : start + 4], caches[0], 4)
            handle.remove()
        first, second = (stream(MODEL, ids[:, start : start + 4], cache, 4) for cache in caches)
        assert torch.equal(first, second)


def test_generate_goes_on_past_the_trained_length(given_positions):
    cache, ids = enable_adms_llm(MODEL, **SMALL), token_ids(20, 2)
    said = MODEL.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, min_new_tokens=100, past_key_values=cache
    )
    assert said.shape[1] == 120 and max(int(p.max()) for p in given_positions) < WINDOW
    cache.reset()
    again = MODEL.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, min_new_tokens=100, past_key_values=cache
    )
    assert torch.equal(again, said)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="position_policy='cache'.*enable_pos_shift=False"):
        ADMSConfig(position_policy="cache", enable_pos_shift=False)
    with pytest.raises(ValueError, match="position_policy='true' must be one of auto, absolute, cache"):
        ADMSConfig(position_policy="true")


@given(
    limit=st.integers(40, 200),
    passes=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    start=st.integers(0, 10**7),
    policy=st.sampled_from(["auto", "cache"]),
)
@settings(deadline=None)
def test_the_plan_keeps_every_pass_inside_and_no_token_before_its_slot(limit, passes, start, policy):
    window, held, at = PositionWindow(policy, limit), 0, start
    for count in passes:
        held = min(held, 20)
        first, last = window.span(torch.arange(at, at + count)[None], None, None, count)
        shifts = window.plan(first, last, [held])
        window.move(shifts)
        place = window.place(torch.arange(at, at + count)[None], None, first, count, False, "cpu")
        assert held <= int(place.min()) or not any(shifts) or held == 0
        assert 0 <= int(place.min()) and int(place.max()) < limit
        window.follow(last)
        at, held = at + count, held + count
