"""The attention function: equal to the model's own while nothing is compacted, log-mass after."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_llama, random_queries, random_states, stream, token_ids
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from streaming_llm import ADMSConfig, NonFiniteError, disable_adms_llm, enable_adms_llm
from streaming_llm.evaluation.lone_layer import LoneLayer
from streaming_llm.model import attention
from streaming_llm.stream.passes import StackPass

IMPLEMENTATIONS = ("eager", "sdpa")
SMALL = {"start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8}


def model_with(implementation: str):
    model = make_tiny_llama()
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_unfilled_cache_gives_logits_equal_to_the_bit(implementation, chunk, batch):
    model, ids = model_with(implementation), token_ids(200, batch)
    expected = stream(model, ids, DynamicCache(config=model.config), chunk)
    cache = enable_adms_llm(model, recent_size=200)
    assert torch.equal(stream(model, ids, cache, chunk), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prefill_then_decoding_gives_logits_equal_to_the_bit(implementation):
    model, ids = model_with(implementation), token_ids(120)

    def run(cache):
        parts = [stream(model, ids[:, :50], cache, 50), stream(model, ids[:, 50:90], cache, 9)]
        return torch.cat([*parts, stream(model, ids[:, 90:], cache, 1)], dim=1)

    expected = run(DynamicCache(config=model.config))
    assert torch.equal(run(enable_adms_llm(model)), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_logits_equal_to_the_bit(implementation, side):
    model, ids = model_with(implementation), token_ids(40, 2)
    mask = torch.ones_like(ids)
    mask[0, : 11 if side == "left" else None] = 0
    mask[0, 29:] = 0 if side == "right" else mask[0, 29:]
    if side == "right":
        mask[0, :29] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    @torch.no_grad()
    def run(cache):
        first = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        after = (longer.cumsum(-1) - 1)[:, -1:]
        second = model(ids[:, :1], attention_mask=longer, position_ids=after, past_key_values=cache).logits
        real = mask.bool()
        return first[real], second

    expected = run(DynamicCache(config=model.config))
    got = run(enable_adms_llm(model))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 4}])
def test_generate_gives_equal_tokens(implementation, options):
    model, ids = model_with(implementation), token_ids(20, 1)
    ids = torch.cat([ids, ids], dim=1)

    def run(cache):
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, past_key_values=cache, **options)

    expected = run(DynamicCache(config=model.config))
    assert torch.equal(run(enable_adms_llm(model)), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_real_weights_give_logits_and_tokens_equal_to_the_bit(smol, implementation):
    model, tokenizer = smol
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        text = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = [stream(model, ids, DynamicCache(config=model.config), chunk) for chunk in (ids.shape[1], 5)]
        mask = torch.ones_like(ids)
        said = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        for chunk, logits in zip((ids.shape[1], 5), expected, strict=True):
            assert torch.equal(stream(model, ids, enable_adms_llm(model), chunk), logits)
        cache = enable_adms_llm(model)
        again = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, past_key_values=cache)
        assert torch.equal(again, said)
    finally:
        disable_adms_llm(model)
        model.set_attn_implementation(before)


def attended_beta(layer: LoneLayer, key: torch.Tensor) -> torch.Tensor:
    """The log-mass of the keys that the pass under way attends to."""
    return layer.stream.part_of(0).stack.tokens.beta[:, :, : key.shape[2]].clone()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("new", [1, 3])
def test_attention_over_a_compacted_layer_is_softmax_with_log_mass(implementation, new):
    model = model_with(implementation)
    enable_adms_llm(model)
    module = model.model.layers[0].self_attn
    layer = LoneLayer(ADMSConfig(**{**SMALL, "rank": 4}))
    keys, values = random_states(60)
    layer.update(keys, values)
    layer.observe(random_queries(60), 0.5)
    query = random_queries(new, seed=5)
    key, value = layer.update(*random_states(new, seed=6))
    bias, beta = torch.zeros(new, key.shape[2]), attended_beta(layer, key)
    assert (beta > 0.1).any()
    bias[:, -new:] = torch.full((new, new), -torch.inf).triu(1)
    expected = []
    for head in range(4):
        logits = query[0, head] @ key[0, head // 2].T * 0.5 + beta[0, head // 2] + bias
        expected.append(logits.softmax(-1) @ value[0, head // 2])
    function = ALL_ATTENTION_FUNCTIONS[attention.PREFIX + implementation]
    module.num_key_value_groups = 2
    got, _ = function(module, query, key, value, None, scaling=0.5, dropout=0.0)
    torch.testing.assert_close(got[0].transpose(0, 1), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_attended_keys_bring_their_log_mass_into_torchs_own_attention_and_nowhere_else(heads, new):
    layer = LoneLayer(ADMSConfig(**{**SMALL, "rank": 4}))
    layer.update(*random_states(60, heads=heads))
    layer.observe(random_queries(60, heads=heads, groups=4 // heads), 8**-0.5)
    query = random_queries(new, heads=heads, groups=4 // heads, seed=5)
    key, value = layer.update(*random_states(new, heads=heads, seed=6))
    beta, count = attended_beta(layer, key).repeat_interleave(4 // heads, dim=1), layer.row.queries
    assert (beta > 0.1).any()
    logits = query @ key.transpose(-1, -2) * 8**-0.5 + beta[:, :, None]
    logits[..., -new:] += torch.full((new, new), -torch.inf).triu(1)
    attended = attention.AttendedKeys.of(key)
    assert attended.shape == key.shape and attended.size(2) == key.shape[2] and attended.dim() == 4
    with pytest.raises(RuntimeError, match="transpose.*log-mass would be lost"):
        query @ attended.transpose(-1, -2)
    got = torch.nn.functional.scaled_dot_product_attention(query, attended, value, is_causal=new > 1)
    torch.testing.assert_close(got, logits.softmax(-1) @ value, rtol=1e-4, atol=1e-5)
    assert type(got) is torch.Tensor and layer.row.queries == count + new


def test_keys_of_no_enabled_cache_are_left_as_they_are():
    keys, _ = random_states(5)
    assert attention.AttendedKeys.of(keys) is keys


def test_eager_and_sdpa_agree_past_the_bound():
    ids = token_ids(150)
    got = [stream(model, ids, enable_adms_llm(model, **SMALL), 5) for model in map(model_with, IMPLEMENTATIONS)]
    torch.testing.assert_close(got[0], got[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunk", [1, 6, 30])
def test_a_later_token_does_not_change_an_earlier_logit(implementation, chunk):
    model, ids = model_with(implementation), token_ids(120)
    changed = ids.clone()
    changed[:, 100:] = (ids[:, 100:] + 1).clamp(3, 127)
    first = stream(model, ids, enable_adms_llm(model, **SMALL), chunk)
    second = stream(model, changed, enable_adms_llm(model, **SMALL), chunk)
    # Kernels of one shape give equal sums: to the bit, not nearly.
    assert torch.equal(first[:, :100], second[:, :100])
    assert not torch.equal(first[:, 100:], second[:, 100:])


def test_log_mass_is_really_used(monkeypatch):
    model, ids = model_with("sdpa"), token_ids(120)
    seen = stream(model, ids, enable_adms_llm(model, **SMALL), 1)
    monkeypatch.setattr(StackPass, "plain", property(lambda part: True))
    unseen = stream(model, ids, enable_adms_llm(model, **SMALL), 1)
    monkeypatch.undo()
    assert not torch.allclose(seen, unseen, atol=1e-3)


def test_registering_twice_changes_nothing():
    attention.register()
    first = ALL_ATTENTION_FUNCTIONS["adms_sdpa"]
    attention.register()
    assert ALL_ATTENTION_FUNCTIONS["adms_sdpa"] is first


# -- what rounding the log-mass costs ------------------------------------------------------------------------------------


# What a kernel may be off for other reasons: sdpa rounds probabilities and its result, eager attention its logits too.
PRECISION = {("sdpa", torch.bfloat16): 0.003, ("eager", torch.bfloat16): 0.006}
PRECISION |= {("sdpa", torch.float16): 0.0004, ("eager", torch.float16): 0.0008}


@pytest.mark.parametrize("implementation,dtype", PRECISION)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("new", [1, 5])
def test_the_log_mass_is_not_rounded_to_half_precision(implementation, dtype, autocast, new):
    layer = LoneLayer(ADMSConfig(start_size=4, recent_size=200, compressed_budget=312, compression_interval=64))
    wide = torch.float32 if autocast else dtype
    keys, values = random_states(700, heads=3, dim=64)
    for part in (slice(0, 516), slice(516, 580 - new)):
        layer.update(keys[:, :, part].to(wide), values[:, :, part].to(wide))
        layer.observe(random_queries(part.stop - part.start, heads=3, groups=3, dim=64), 1 / 8)
    layer.stream.stacks = [layer.stack.with_row([0], layer.row._replace(compactions=1))]
    layer.buffer.beta[:, :, : 580 - new] = 8 * torch.rand(1, 3, 580 - new, generator=torch.Generator().manual_seed(2))
    key, value = layer.update(keys[:, :, 580 - new : 580].to(wide), values[:, :, 580 - new : 580].to(wide))
    assert key.shape[2] == 580
    beta = attended_beta(layer, key).double().repeat_interleave(3, dim=1)[:, :, None].repeat(1, 1, new, 1)
    beta[..., -new:] += torch.full((new, new), -torch.inf).triu(1)
    query = random_queries(new, heads=3, groups=3, dim=64).to(wide) / 2
    states = [x.to(dtype).double() for x in (query, key, value)]
    exact_k, exact_v = (x.repeat_interleave(3, dim=1) for x in states[1:])
    expected = (states[0] @ exact_k.transpose(-1, -2) / 8 + beta).softmax(-1) @ exact_v
    module = model_with(implementation).model.layers[0].self_attn
    module.num_key_value_groups = 3
    function = ALL_ATTENTION_FUNCTIONS[attention.PREFIX + implementation]
    with torch.autocast("cpu", dtype, enabled=autocast):
        got, _ = function(module, query, key, value, None, scaling=1 / 8, dropout=0.0)
    error = (got.transpose(1, 2).double() - expected).norm() / expected.norm()
    assert got.dtype == dtype and error < PRECISION[implementation, dtype]


@pytest.mark.parametrize("tokens", [60, 64])  # the pass begins with a compaction, or writes behind what is held
def test_a_pass_with_nan_leaves_nothing_that_rows_of_other_lengths_would_attend_to(tokens):
    model, ids = model_with("sdpa"), token_ids(100, 2)
    mask = torch.ones(2, tokens + 5, dtype=torch.long)
    mask[0, -5:-2] = 0

    def run(spoilt: bool) -> torch.Tensor:
        cache = enable_adms_llm(model, **{**SMALL, "compression_interval": 16})
        stream(model, ids[:, :tokens], cache, 4)
        if spoilt:
            states = torch.full((2, 10, model.config.hidden_size), torch.nan)
            with pytest.raises(NonFiniteError):
                model(inputs_embeds=states, past_key_values=cache)
        padded = model(ids[:, tokens : tokens + 5], attention_mask=mask, past_key_values=cache).logits[:, -1:]
        return torch.cat([padded, stream(model, ids[:, tokens + 5 :], cache, 1)], dim=1)

    with torch.no_grad():
        assert torch.equal(run(True), run(False))
