"""The four modules together on a model: their bounds, rows, copies, failures, and what generation does with them."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict

import pytest
import torch
from conftest import memory_of, stream, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_controller import MODEL, deep_llama
from transformers import GPT2Config, GPT2LMHeadModel

from streaming_llm import ADMSConfig, NonFiniteError, enable_adms_llm
from streaming_llm.data.tokens import EXACT, RECENT, REPLAY, SINK

SIZES = {
    "start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8,
    "attention_window": 16, "num_clusters": 4, "min_middle_size_for_compress": 0, "sketch_budget": 4, "replay_budget": 4,
    "sketch_originals": 16, "calibration_window": 32,
}  # fmt: skip
MODULES = {
    "sketches": {"enable_dual_fidelity": True, "sketch_budget": 4, "sketch_originals": 16},
    "replay": {"enable_residual_replay": True, "replay_budget": 4},
    "calibration": {"enable_position_calibration": True, "calibration_window": 32},
    "controller": {"enable_adaptive_controller": True, "controller_scope": "layer"},
    "controller of the model": {"enable_adaptive_controller": True, "controller_scope": "model"},
}
PLAIN = {name: value for name, value in SIZES.items() if name not in {n for m in MODULES.values() for n in m}}
SCOPES = ("model", "layer")


def all_on(**chosen) -> ADMSConfig:
    return ADMSConfig.adm_plus_plus(**{**SIZES, **chosen})


def tensors_of(cache) -> list[torch.Tensor]:
    """Every tensor that decides what the cache does next."""
    found = []
    for layer in cache.layers:
        found += [tensor.clone() for tensor in layer.held.tensors().values()]
        for state in memory_of(layer).states().values():
            found += [tensor.clone() for tensor in state.tensors().values()]
        stored = max(row.queries for row in layer.stack.rows)
        found.append(layer.stack.of_layer(layer.number, layer.stack.queries)[:, :, :, :stored].clone())
    return found


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# -- memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,dtype", [*((name, torch.float32) for name in [*MODULES, "all"]), ("all", torch.bfloat16)])
def test_the_cache_takes_the_memory_it_said_to_the_byte(name, dtype):
    config = all_on() if name == "all" else ADMSConfig(**PLAIN, **MODULES[name])
    model = MODEL if dtype == torch.float32 else deep_llama().to(dtype)
    cache = enable_adms_llm(model, config)
    stream(model, token_ids(200), cache, 8)
    assert cache.nbytes == config.memory_bytes(model.config, dtype)
    assert sum(cache.memory_report().values()) == cache.nbytes


# -- rows, ends and copies -----------------------------------------------------------------------------------------------

# Tokens seen: before any compaction, before and after the first plan, after several.
POINTS = (20, 50, 70, 161)
WHERE = pytest.mark.parametrize("scope,tokens", [("model", 20), ("layer", 50), ("model", 70), ("layer", 161)])


@WHERE
def test_a_deep_copy_goes_on_as_the_cache_does_and_by_itself(scope, tokens):
    cache = enable_adms_llm(MODEL, all_on(controller_scope=scope))
    stream(MODEL, token_ids(tokens, 2), cache, 4)
    twin = copy.deepcopy(cache)
    before = tensors_of(cache)
    assert same(tensors_of(twin), before)
    more = token_ids(48, 2, seed=1)
    logits = stream(MODEL, more, twin, 3)
    assert same(tensors_of(cache), before)
    assert torch.equal(stream(MODEL, more, cache, 3), logits)
    assert same(tensors_of(cache), tensors_of(twin)) and cache.stats == twin.stats


@WHERE
def test_a_reset_cache_is_as_new(scope, tokens):
    ids = token_ids(tokens + 30, 2)
    cache = enable_adms_llm(MODEL, all_on(controller_scope=scope))
    expected = stream(MODEL, ids, cache, 4)
    stats = cache.stats
    stream(MODEL, token_ids(tokens, 2, seed=8), cache, 7)
    cache.reset()
    assert cache.nbytes == 0 and set(cache.stats.values()) == {0} and not len(cache.controller_budgets)
    assert torch.equal(stream(MODEL, ids, cache, 4), expected) and cache.stats == stats


@pytest.mark.parametrize("scope,tokens", [("model", 50), ("layer", 161)])
@pytest.mark.parametrize(
    "change,rows",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2])), [2]),
    ],
    ids=["reorder_cache", "batch_repeat_interleave", "batch_select_indices"],
)
def test_rows_take_all_that_is_theirs_along(scope, tokens, change, rows):
    cache = enable_adms_llm(MODEL, all_on(controller_scope=scope))
    stream(MODEL, token_ids(tokens, 3), cache, 4)
    before = tensors_of(cache)
    change(cache)
    assert same(tensors_of(cache), [tensor[rows] for tensor in before])
    more = token_ids(48, 3, seed=1)[rows]
    logits = stream(MODEL, more, cache, 3)
    assert logits.isfinite().all() and cache.held_tokens <= cache.config.expected_max_tokens
    for row, origin in enumerate(rows):
        twin = rows.index(origin)
        torch.testing.assert_close(logits[row], logits[twin], rtol=1e-4, atol=1e-4)
        for layer in cache.layers:
            torch.testing.assert_close(layer.keys[row], layer.keys[twin], rtol=1e-3, atol=1e-3)


@WHERE
def test_cropped_tokens_are_forgotten_and_the_stream_goes_on(scope, tokens):
    cache = enable_adms_llm(MODEL, all_on(controller_scope=scope))
    stream(MODEL, token_ids(tokens), cache, 4)
    cache.crop(-6)
    assert cache.get_seq_length() == tokens - 6
    assert all(layer.keys.shape[2] == layer.stack.rows[0].length for layer in cache.layers)
    logits = stream(MODEL, token_ids(75, seed=1), cache, 3)
    assert logits.isfinite().all() and cache.held_tokens <= cache.config.expected_max_tokens
    assert all(layer.held.count.sum(-1).eq(tokens + 69).all() for layer in cache.layers)


def test_drafts_that_are_cropped_between_two_compactions_leave_no_trace():
    ids = token_ids(42)
    cache, never = (enable_adms_llm(MODEL, all_on()) for _ in range(2))
    for each in (cache, never):
        stream(MODEL, ids, each, 3)
    row = cache.layers[0].stack.rows[0]
    room = row.capacity(cache.config) - row.length
    assert room >= 2
    stream(MODEL, token_ids(2, seed=7), cache, 1)
    cache.crop(-2)
    more = token_ids(40, seed=1)
    torch.testing.assert_close(stream(MODEL, more, cache, 1), stream(MODEL, more, never, 1), rtol=0, atol=1e-5)


# -- failures ------------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


def failing(model, layer: int):
    """Lets the next forward pass fail before layer number `layer`; call the result to undo."""

    def stop(*_):
        raise _Stop

    return model.model.layers[layer].register_forward_pre_hook(stop)


@pytest.mark.parametrize("scope,at", [("model", 0), ("layer", 1), ("model", 3), ("layer", 3)])
def test_a_forward_that_fails_leaves_no_trace_wherever_the_stream_is(scope, at):
    cache, never = (enable_adms_llm(MODEL, all_on(controller_scope=scope)) for _ in range(2))
    for number in range(42):
        part = token_ids(3, 2, seed=number)
        hook = failing(MODEL, at)
        with pytest.raises(_Stop):
            stream(MODEL, token_ids(3, 2, seed=999), cache, 3)
        hook.remove()
        assert torch.equal(stream(MODEL, part, cache, 3), stream(MODEL, part, never, 3)), number
    assert same(tensors_of(cache), tensors_of(never)) and cache.stats == never.stats
    assert cache.layers[0].stack.rows[0].compactions > 8


@pytest.mark.parametrize("tokens", POINTS)
def test_a_long_prefill_that_fails_after_layers_were_compacted_has_never_been(tokens):
    cache, never = (enable_adms_llm(MODEL, all_on()) for _ in range(2))
    for each in (cache, never):
        stream(MODEL, token_ids(tokens), each, 4)
    hook = failing(MODEL, 2)
    with pytest.raises(_Stop):
        stream(MODEL, token_ids(80, seed=3), cache, 80)
    hook.remove()
    assert same(tensors_of(cache), tensors_of(never)) and cache.stats == never.stats
    for number, chunk in ((4, 3), (3, 80), (5, 3)):
        ids = token_ids(80, seed=number)
        assert torch.equal(stream(MODEL, ids, cache, chunk), stream(MODEL, ids, never, chunk))
    assert same(tensors_of(cache), tensors_of(never)) and cache.stats == never.stats


@pytest.mark.parametrize("scope", SCOPES)
def test_nan_is_refused_and_leaves_the_modules_as_they_were(scope):
    cache, never = (enable_adms_llm(MODEL, all_on(controller_scope=scope)) for _ in range(2))
    embed = MODEL.get_input_embeddings()
    for number in range(30):
        part = token_ids(4, seed=number)
        with pytest.raises(NonFiniteError):
            MODEL(inputs_embeds=embed(part) * torch.nan, past_key_values=cache)
        assert torch.equal(stream(MODEL, part, cache, 4), stream(MODEL, part, never, 4))
    assert same(tensors_of(cache), tensors_of(never))


# -- generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope,compressor,options",
    [
        ("model", "low_rank", {}),
        ("layer", "attention_matching", {"do_sample": True, "num_return_sequences": 2}),
        ("model", "low_rank", {"num_beams": 3}),
        ("layer", "attention_matching", {"num_beams": 2, "do_sample": True}),
    ],
    ids=["greedy", "sampling", "beams", "beam sampling"],
)
def test_generate_stays_bounded_on_a_padded_batch(scope, compressor, options):
    cache, ids = enable_adms_llm(MODEL, all_on(controller_scope=scope, compressor_type=compressor)), token_ids(40, 2)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    ids[1, :13] = 2
    torch.manual_seed(0)
    said = MODEL.generate(ids, attention_mask=mask, max_new_tokens=70, min_new_tokens=70, past_key_values=cache, **options)
    assert said.shape[1] == 110 and torch.equal(said[:: said.shape[0] // 2, :40], ids)
    assert cache.get_seq_length() == 109 and cache.held_tokens <= cache.config.expected_max_tokens
    assert cache.layers[0].stack.rows[0].compactions > 5
    for layer in cache.layers:
        assert layer.keys.isfinite().all() and layer.values.isfinite().all()


# -- any settings --------------------------------------------------------------------------------------------------------


@st.composite
def drawn_settings(draw) -> dict:
    budget = draw(st.sampled_from([0, 1, 2, 7, 12]))
    on = {name: draw(st.booleans()) for name in ("dual", "replay", "calibration", "controller")}
    return {
        "start_size": draw(st.integers(0, 3)),
        "recent_size": draw(st.sampled_from([1, 5, 16])),
        "compressed_budget": budget,
        "compression_interval": draw(st.sampled_from([1, 4, 9])),
        "rank": 8,
        "attention_window": draw(st.sampled_from([4, 16])),
        "num_clusters": draw(st.sampled_from([1, 4])),
        "min_middle_size_for_compress": draw(st.sampled_from([0, 64])),
        "min_importance_tokens": draw(st.integers(0, min(budget, 3))),
        "importance_ratio": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "importance_metric": draw(st.sampled_from(["attention", "mixed"])),
        "compressor_type": draw(st.sampled_from(["low_rank", "vq", "attention_matching"])),
        "protect_exact": draw(st.booleans()),
        "anchor_mode": draw(st.sampled_from(["mean", "grid", "hybrid"])),
        "enable_dual_fidelity": on["dual"],
        "sketch_budget": draw(st.sampled_from([0, 1, 5])) if on["dual"] else 0,
        "sketch_reduction": draw(st.sampled_from(["mean", "sum", "first"])),
        "sketch_originals": draw(st.sampled_from([0, 1, 16])),
        "promotion_budget": draw(st.sampled_from([0, 1, 3])),
        "enable_residual_replay": on["replay"],
        "replay_budget": draw(st.sampled_from([0, 1, 4])) if on["replay"] else 0,
        "energy_replay_threshold": draw(st.sampled_from([0.5, 1.0])),
        "enable_position_calibration": on["calibration"],
        "calibration_window": draw(st.sampled_from([1, 32])),
        "enable_adaptive_controller": on["controller"],
        "controller_scope": draw(st.sampled_from(SCOPES)),
        "controller_group_size": draw(st.integers(1, 3)),
    }


@given(
    chosen=drawn_settings(),
    chunks=st.lists(st.sampled_from([1, 2, 5, 8, 13, 40, 90]), min_size=1, max_size=14),
    batch=st.integers(1, 2),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_on_the_promises_hold(chosen, chunks, batch):
    cache = enable_adms_llm(MODEL, ADMSConfig(**chosen))
    config = cache.config
    given_states = defaultdict(list)
    update = type(cache.layers[0]).update

    def watched(self, keys, values, *args, **kwargs):
        given_states[id(self)].append((keys, values))
        return update(self, keys, values, *args, **kwargs)

    seen = 0
    for number, chunk in enumerate(chunks):
        type(cache.layers[0]).update = watched
        try:
            logits = stream(MODEL, token_ids(chunk, batch, seed=number), cache, chunk)
        finally:
            type(cache.layers[0]).update = update
        seen += chunk
        assert logits.isfinite().all()
        assert cache.held_tokens <= config.expected_max_tokens and cache.get_seq_length() == seen
    for layer in cache.layers:
        held = layer.held
        for tensor in (held.keys, held.values, held.pos, held.score, held.mass):
            assert tensor.isfinite().all()
        assert (held.beta < torch.inf).all() and not held.beta.isnan().any()
        if config.compressed_budget > 1:
            assert held.count.sum(-1).eq(seen).all()
        position = held.pos.masked_fill(~held.valid, -1)
        assert position.max() <= seen - 1 and held.pos[held.valid].min() >= 0
        ordered = held.pos.masked_fill(~held.valid, 0).cummax(-1).values
        assert (held.pos - ordered)[held.valid].ge(0).all()
        if config.enable_adaptive_controller and layer.compacted and config.compressed_budget:
            budgets = memory_of(layer).controller.budgets
            if budgets.any():
                assert budgets.min() >= 1 and budgets.max() <= 2 * config.compressed_budget
        own_keys = torch.cat([keys for keys, _ in given_states[id(layer)]], dim=2)
        own_values = torch.cat([values for _, values in given_states[id(layer)]], dim=2)
        original = torch.isin(held.tier, torch.tensor([EXACT, REPLAY, SINK, RECENT], dtype=torch.int8))
        original = original & (held.count == 1) & (held.beta == 0)
        at = held.pos.round().long().clamp(0, seen - 1)[..., None].expand(held.keys.shape)
        assert torch.equal(held.keys[original], own_keys.gather(2, at)[original])
        assert torch.equal(held.values[original], own_values.gather(2, at)[original])


# -- a model without RoPE ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=512, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_calibration_asked_for_by_name_is_refused_where_keys_do_not_turn(gpt2):
    with pytest.raises(ValueError, match="enable_position_calibration=True.*gpt2.*no RoPE"):
        enable_adms_llm(gpt2, enable_position_calibration=True)
    assert gpt2.config._attn_implementation in ("sdpa", "eager")


def test_a_preset_runs_without_calibration_where_keys_do_not_turn(gpt2, caplog):
    config = all_on(controller_scope="model")
    with caplog.at_level(logging.WARNING):
        cache = enable_adms_llm(gpt2, config)
    assert [record.getMessage() for record in caplog.records] == [
        "position calibration is off: model type 'gpt2' has no RoPE"
    ]
    assert config.enable_position_calibration and not cache.config.enable_position_calibration
    assert stream(gpt2, token_ids(200, 2), cache, 5).isfinite().all()
    assert cache.held_tokens <= cache.config.expected_max_tokens
    stats = cache.stats
    assert stats["total_calibrations"] == 0 and stats["total_sketch_tokens"] > 0 and stats["total_budget_adjustments"] > 0
