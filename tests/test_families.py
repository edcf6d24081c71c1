"""Families that differ in kind, with tiny random weights and in all variants; `test_family_modes.py` has every type."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import stream, token_ids
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from streaming_llm import ADMSConfig, ADMSKVCache, ADMSLayer, disable_adms_llm, enable_adms_llm

SMALL = {"start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8}
LLAMA_LIKE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# model type: (config class, model class, settings)
FAMILIES = {
    "falcon": ("FalconConfig", "FalconForCausalLM",
               {"vocab_size": 128, "hidden_size": 32, "ffn_hidden_size": 48, "num_hidden_layers": 3,
                "num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0, "initializer_range": 0.2}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM",
               {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 16, "layer_types": MIXED, "attn_logit_softcapping": 0.5}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM",
                    {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4,
                                               "n_positions": 512, "initializer_range": 0.2}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM",
                 {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                  "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.2}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA_LIKE),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA_LIKE, "sliding_window": None}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM",
                {**LLAMA_LIKE, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", LLAMA_LIKE),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**LLAMA_LIKE, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA_LIKE, "head_dim": 8}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", LLAMA_LIKE),
}  # fmt: skip


def rope(rope_type: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
# name: (model type, settings): RoPE types, partial and missing RoPE, other ways to lay out the heads, sliding layers.
VARIANTS = {
    "falcon, every head its own keys": ("falcon", {"multi_query": False}),
    "falcon, new architecture": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3, linear in its full layers": ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "gpt_neox, all of the head": ("gpt_neox", {"rotary_pct": 1.0}),
    "llama, default": ("llama", rope("default")),
    "llama, dynamic": ("llama", rope("dynamic", factor=2.0)),
    "llama, linear": ("llama", rope("linear", factor=4.0)),
    "llama, llama3": ("llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                    original_max_position_embeddings=64)),
    "llama, longrope": ("llama", rope("longrope", **LONGROPE, factor=2.0, original_max_position_embeddings=256)),
    "llama, yarn": ("llama", rope("yarn", factor=8.0, original_max_position_embeddings=64)),
    "phi3, half of the head": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "phi3, longrope": ("phi3", {**rope("longrope", **LONGROPE), "original_max_position_embeddings": 256}),
    "qwen2, sliding and full": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": MIXED}),
    "qwen3, yarn": ("qwen3", rope("yarn", factor=8.0, original_max_position_embeddings=64)),
    "smollm3, a layer without RoPE": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
}  # fmt: skip
ALL = (*FAMILIES, *VARIANTS)

# Gemma 2 has eager attention only, for its soft-capping; Falcon's eager attention has no place for log-mass.
BOTH = [
    (name, kind)
    for name in FAMILIES
    for kind in ("eager", "sdpa")
    if (name, kind) not in (("gemma2", "sdpa"), ("falcon", "eager"))
]
EVERYTHING = [*BOTH, *((name, None) for name in VARIANTS)]


def make(name: str, implementation: str | None = None, **chosen):
    name, variant = VARIANTS.get(name, (name, {}))
    config_class, model_class, settings = FAMILIES[name]
    chosen = {**variant, **chosen}
    config = getattr(transformers, config_class)(**{**settings, **chosen})
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    torch.random.set_rng_state(state)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("name,implementation", EVERYTHING)
def test_an_unfilled_cache_gives_logits_equal_to_the_bit(name, implementation):
    model, ids = make(name, implementation), token_ids(46, 2)

    def run(cache):
        first = stream(model, ids[:, :40], cache, 20)
        return torch.cat([first, stream(model, ids[:, 40:], cache, 1)], dim=1)

    expected = run(DynamicCache(config=model.config))
    assert torch.equal(run(enable_adms_llm(model, rank=8)), expected)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    again = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, past_key_values=enable_adms_llm(model, rank=8)
    )
    assert torch.equal(again, said)
    disable_adms_llm(model)
    assert torch.equal(run(DynamicCache(config=model.config)), expected)


@pytest.mark.parametrize(
    "name,implementation,compressor",
    # What a compressor does with keys, values and queries does not depend on where they come from.
    [
        *((*one, "low_rank") for one in EVERYTHING),
        *((*one, "attention_matching") for one in BOTH if one[0] in ("falcon", "gemma2", "gpt2", "llama")),
    ],
)
def test_past_the_bound_logits_are_finite_and_the_cache_bounded(name, implementation, compressor):
    model = make(name, implementation)
    cache, ids = enable_adms_llm(model, **SMALL, compressor_type=compressor), token_ids(95, 2)
    for start, stop, chunk in ((0, 50, 50), (50, 85, 7), (85, 95, 1)):
        logits = stream(model, ids[:, start:stop], cache, chunk)
        assert logits.isfinite().all()
        assert cache.held_tokens <= cache.config.expected_max_tokens
        assert cache.get_seq_length() == stop
    layers = [layer for layer in cache.layers if isinstance(layer, ADMSLayer)]
    assert layers and all(layer.compacted and layer.stack.queries is not None for layer in layers)
    assert any((layer.held.beta > 0).any() for layer in layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_kept_is_near_enough_for_the_model_to_say_nearly_the_same(name):
    model, ids = make(name), token_ids(90)
    full = stream(model, ids, DynamicCache(config=model.config), 6).log_softmax(-1)
    roomy = {**SMALL, "recent_size": 30, "compressed_budget": 45}

    def divergence(**settings) -> float:
        logits = stream(model, ids, enable_adms_llm(model, **settings), 6).log_softmax(-1)
        return torch.nn.functional.kl_div(logits, full, log_target=True, reduction="none").sum(-1)[:, 85:].mean().item()

    assert divergence(**roomy) < divergence(**{**SMALL, "recent_size": 8, "compressed_budget": 0,
                                               "min_importance_tokens": 0})  # fmt: skip


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_sliding_layers_keep_transformers_own_layer(name):
    cache = enable_adms_llm(make(name), **SMALL)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, ADMSLayer, DynamicSlidingWindowLayer]
    assert [layer.sliding_window for layer in cache.layers[::2]] == [16, 16]


def test_a_model_with_sliding_layers_only_is_what_it_was():
    model, ids = make("mistral", sliding_window=16), token_ids(90)
    expected = stream(model, ids, DynamicCache(config=model.config), 5)
    cache = enable_adms_llm(model, **SMALL)
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    assert torch.equal(stream(model, ids, cache, 5), expected)
    assert cache.held_tokens == 0 and cache.nbytes > 0 and cache.get_seq_length() == 90


def test_gemma2s_soft_capping_is_honoured_in_the_scores():
    model = make("gemma2", "eager")
    cache = enable_adms_llm(model, **SMALL)
    stream(model, token_ids(30), cache, 5)
    layer = cache.layers[1]
    assert layer.stack.softcap == 0.5
    queries = layer.stack.single(1).stored_queries([0])
    logits = queries.logits(layer.keys)
    states = queries.states.flatten(2, 3) @ layer.keys.transpose(-1, -2) * queries.scale
    torch.testing.assert_close(logits.flatten(2, 3), 0.5 * torch.tanh(states / 0.5))
    assert logits.abs().max() <= 0.5 < states.abs().max()


def test_unwired_caches_work_on_every_family():
    ids = token_ids(90)
    for name in ALL:
        model = make(name)
        cache = ADMSKVCache(enable_adms_llm(model, **SMALL).config, model_config=model.config)
        disable_adms_llm(model)
        assert stream(model, ids, cache, 10).isfinite().all(), name
        assert cache.held_tokens <= cache.config.expected_max_tokens


@pytest.mark.parametrize("name", ALL)
def test_every_family_streams_with_all_four_modules(name):
    model = make(name)
    config = ADMSConfig.adm_plus_plus(**SMALL, sketch_budget=4, replay_budget=2, energy_replay_threshold=1.0)
    cache = enable_adms_llm(model, config)
    ids = token_ids(60, 2)
    for start in range(0, 60, 5):
        assert stream(model, ids[:, start : start + 5], cache, 5).isfinite().all()
        assert cache.held_tokens <= cache.config.expected_max_tokens
    stats = cache.stats
    assert stats["total_sketch_tokens"] and stats["total_replay_tokens"]
    full = [layer for layer in cache.layers if isinstance(layer, ADMSLayer)]
    assert (stats["total_calibrations"] > 0) == any(layer.rope is not None and layer.rope.rotates for layer in full)


FALCONS = [name for name in ALL if name.startswith("falcon")]


@pytest.mark.parametrize("name", FALCONS)
def test_falcon_keeps_its_implementation_and_its_memory_is_planned(name):
    model = make(name)
    cache = enable_adms_llm(model, **SMALL)
    assert model.config._attn_implementation == "sdpa"
    stream(model, token_ids(150, 2), cache, 7)
    assert cache.nbytes == cache.config.memory_bytes(model.config, batch_size=2)
    assert cache.keys_as is None and type(cache.layers[0].keys) is torch.Tensor
    heads = {"falcon": 1}.get(name, 4)
    assert cache.layers[0].keys.shape[1] == heads
    disable_adms_llm(model)
    with pytest.raises(RuntimeError, match="enable_adms_llm"):
        stream(model, token_ids(8, 2), cache, 4)


def test_falcon_whose_attention_log_mass_cannot_reach_is_refused_by_name():
    with pytest.raises(ValueError, match="'eager'.*'falcon'.*attn_implementation='sdpa'"):
        enable_adms_llm(make("falcon", attn_implementation="eager"), rank=8)
    with pytest.raises(ValueError, match="'falcon' with alibi=True.*RoPE"):
        enable_adms_llm(make("falcon", alibi=True), rank=8)
    model, ids = make("falcon"), token_ids(30)
    cache = enable_adms_llm(model, **SMALL)
    with pytest.raises(RuntimeError, match="output_attentions=False"), torch.no_grad():
        model(ids, past_key_values=cache, output_attentions=True)
    expected = stream(model, ids, enable_adms_llm(model, **SMALL), 5)
    assert torch.equal(stream(model, ids, cache, 5), expected)


def test_phi3_keeps_the_cache_past_the_length_where_it_would_drop_it():
    model = make("phi3", original_max_position_embeddings=40, **rope("default"))
    model.generation_config.eos_token_id = None
    ids = token_ids(30)
    cache = enable_adms_llm(model, rank=8)
    # As a loop by hand: generate itself would go on with a new cache.
    said = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=30)
    assert cache.get_seq_length() == 59
    other = DynamicCache(config=model.config)
    logits = [stream(model, said[:, :30], other, 30)[:, -1:], stream(model, said[:, 30:-1], other, 1)]
    assert torch.equal(torch.cat(logits, dim=1).argmax(-1), said[:, 30:])
    # A prompt longer than that.
    ids, cache = token_ids(60), enable_adms_llm(model, rank=8)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4)
    assert cache.get_seq_length() == 63
    model_of_its_own = copy.deepcopy(model)
    assert model_of_its_own.prepare_inputs_for_generation.args[0] is model_of_its_own
    disable_adms_llm(model)
    assert "prepare_inputs_for_generation" not in model.__dict__


def test_phi3_with_longrope_stays_below_the_length_where_its_frequencies_change():
    model = make(
        "phi3",
        original_max_position_embeddings=60,
        **rope("longrope", **{**LONGROPE, "original_max_position_embeddings": 60}),
    )
    model.generation_config.eos_token_id = None
    ids, cache = token_ids(30), enable_adms_llm(model, **SMALL)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=90)
    assert said.shape[1] == 120 and cache.get_seq_length() == 119 and cache.window.offsets[0] > 0
    assert cache.layers[0].held.pos.max() < cache.window.limit == 60
    # What can't be is refused by name: a pass longer than that, and a cache that would hold more.
    with pytest.raises(ValueError, match="70 new tokens beside .* held do not fit into the 60 positions"):
        model.generate(token_ids(70), past_key_values=enable_adms_llm(model, **SMALL), max_new_tokens=4)
    model.generate(token_ids(70), past_key_values=enable_adms_llm(model, **SMALL), max_new_tokens=4, prefill_chunk_size=8)


UNSUPPORTED = {
    "encoder and decoder": ("T5Config", "T5ForConditionalGeneration",
                            {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}),
    "multi-head latent attention": ("DeepseekV3Config", "DeepseekV3ForCausalLM",
                                    {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                     "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 2,
                                     "moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8,
                                     "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                                     "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}),
    "state space": ("MambaConfig", "MambaForCausalLM", {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_keys_to_compact_is_refused_by_name_before_anything_changes(name):
    config_class, model_class, settings = UNSUPPORTED[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    before = set(model.__dict__)
    with pytest.raises(ValueError, match=f"'{model.config.model_type}' can't be enabled: it"):
        enable_adms_llm(model)
    assert set(model.__dict__) == before
