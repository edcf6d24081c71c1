"""A type that nobody tested is tried itself: it works with one warning, or is refused with the check that failed."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import stream, token_ids
from family_models import build
from test_enable import hooks_of
from transformers import DynamicCache, LlamaForCausalLM

from streaming_llm import ADMSKVCache, disable_adms_llm, enable_adms_llm
from streaming_llm.model import families
from streaming_llm.model.enable import is_enabled

SMALL = {"start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8}
# Types outside the list: those of other houses, which differ from these in name only.
PASSING = ("llama", "qwen3_moe", "gemma2", "cohere", "opt")
# model type: (settings, what the error must say). transformers has them, and attention of theirs is not what is needed.
REFUSED = {
    # transformers 5.2 computes its attention itself, later releases go through the keys twice.
    "diffllama": ({}, "the check '(queries' failed, its attention is not|below the bound' failed, the logits are)"),
    "gpt_neo": ({"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
                "the check 'queries' failed, its attention is not reached"),
    "gpt_neox_japanese": ({"intermediate_multiple_size": 2}, "the check 'queries' failed, its attention is not reached"),
    "jetmoe": ({"kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
               "the check 'queries' failed, its attention is not reached"),
    "gptj": ({"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 80, "rotary_dim": 4},
             "the check 'RoPE' failed, its positions can't be read.*no rotary module"),
    "openai-gpt": ({"n_embd": 32, "n_head": 4, "n_layer": 3},
                   "the check 'RoPE' failed, .*stored no keys"),
}  # fmt: skip
KNOWN = {
    "bloom": ({"n_head": 4, "n_layer": 3}, "its ALiBi counts distances"),
    "mamba": ({}, "it has no keys to compact"),
    "deepseek_v3": ({"n_routed_experts": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
                     "num_experts_per_tok": 1, "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
                     "qk_nope_head_dim": 8, "v_head_dim": 8}, "latent attention"),
    "jamba": ({"use_mamba_kernels": False, "num_experts": 2}, "state-space layers keep states"),
}  # fmt: skip


def stranger(kind: str):
    """A model of a type that stands nowhere in the table."""
    model = build(kind)
    model.config.model_type = f"house_{kind}"
    return model


def state_of(model) -> list:
    modes = [part.training for part in model.modules()]
    configs = [(part.config, part.config._attn_implementation) for part in model.modules() if hasattr(part, "config")]
    buffers = [buffer.clone() for buffer in model.buffers()]
    return [modes, [(id(config), name) for config, name in configs], hooks_of(model), torch.get_rng_state(), buffers,
            [parameter.grad for parameter in model.parameters()]]  # fmt: skip


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("kind", PASSING)
def test_a_type_outside_the_list_that_passes_works_with_one_warning(kind, caplog):
    model, ids = stranger(kind), token_ids(60, 2)
    before = state_of(model)
    expected = stream(model, ids[:, :30], DynamicCache(config=model.config), 10)
    with caplog.at_level(logging.WARNING, "streaming_llm"):
        cache = enable_adms_llm(model, **SMALL | {"recent_size": 40})
        assert torch.equal(stream(model, ids[:, :30], cache, 10), expected)
        cache = enable_adms_llm(model, **SMALL)
    told = [record.getMessage() for record in caplog.records if "probe" in record.getMessage()]
    assert told == [f"model type 'house_{kind}' was probed, not tested: it passed every check of the probe"]
    assert stream(model, ids, cache, 7).isfinite().all() and cache.stats["total_compressions"] > 0
    disable_adms_llm(model)
    assert same(state_of(model), before)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_outside_the_list_that_fails_is_refused_with_the_check_and_what_it_means(kind):
    settings, said = REFUSED[kind]
    assert kind not in families.FAMILIES
    model = build(kind, **settings)
    model.train()
    before = state_of(model)
    with pytest.raises(ValueError, match=f"model type '{kind}' can't be enabled: of its probe {said}"):
        enable_adms_llm(model, **SMALL)
    assert not is_enabled(model) and same(state_of(model), before)


@pytest.mark.parametrize("kind", KNOWN)
def test_a_type_known_not_to_work_is_refused_with_the_reason_whatever_is_asked(kind):
    settings, said = KNOWN[kind]
    model = build(kind, **settings)
    for probe in (None, "always", False):
        with pytest.raises(ValueError, match=f"model type '{kind}' can't be enabled: .*{said}"):
            enable_adms_llm(model, probe=probe)
    assert not is_enabled(model)


class Forgetful(LlamaForCausalLM):
    """Its logits have a little of the position in them that the cache tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        cache = kwargs.get("past_key_values") or kwargs.get("cache")
        output.logits = output.logits + isinstance(cache, ADMSKVCache)
        return output


def test_the_probe_can_be_left_out_or_always_made(caplog):
    model = build("llama")
    model.__class__ = Forgetful
    said = "the check 'below the bound' failed, the logits are not those that DynamicCache gives"
    enable_adms_llm(model, **SMALL)  # a type of the list is taken at its word
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            enable_adms_llm(model, **SMALL, probe="always")
    assert is_enabled(model)
    disable_adms_llm(model)
    model.config.model_type = "house_llama"
    for probe in (None, "auto"):
        with pytest.raises(ValueError, match=said):
            enable_adms_llm(model, **SMALL, probe=probe)
    with caplog.at_level(logging.WARNING, "streaming_llm"):
        enable_adms_llm(model, **SMALL, probe=False)
    assert "'house_llama' was neither tested nor probed" in caplog.text
    for wrong in (True, 0, "never"):
        with pytest.raises(ValueError, match=f"probe={wrong!r} must be one of"):
            enable_adms_llm(model, probe=wrong)


def test_a_model_that_breaks_past_the_bound_is_found_out(monkeypatch):
    model = stranger("llama")
    held = property(lambda cache: 10_000)
    monkeypatch.setattr(ADMSKVCache, "held_tokens", held)
    with pytest.raises(ValueError, match="the check 'past the bound' failed.*holds 10000 tokens"):
        enable_adms_llm(model, **SMALL)
    assert not is_enabled(model)


def test_a_conversation_with_a_probed_model_is_saved_and_loaded(tmp_path):
    model, ids = stranger("qwen3_moe"), token_ids(70)
    cache = enable_adms_llm(model, **SMALL)
    stream(model, ids[:, :50], cache, 5)
    cache.save(tmp_path / "talk")
    expected = stream(model, ids[:, 50:], cache, 5)
    disable_adms_llm(model)
    assert torch.equal(stream(model, ids[:, 50:], ADMSKVCache.load(tmp_path / "talk", model), 5), expected)
