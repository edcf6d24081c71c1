"""A tiny random model of every type that the table of families names, made once and used by all tests of that type."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TRAINED = 80
LLAMA_LIKE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": TRAINED, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
HEAD = {"head_dim": 8}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WHOLE = {"sliding_window": None}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 2, "num_experts_per_tok": 1}
ROUTED = {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1,
          "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
GPT2_LIKE = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": TRAINED, "n_inner": 48}
# model type: what differs from LLAMA_LIKE.
TYPES = {
    "afmoe": {**HEAD, **SLIDING, **EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1}, "apertus": {},
    "apertus1p5_text": {}, "arcee": HEAD, "aria_text": {"moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1},
    "biogpt": {}, "bitnet": {}, "cohere": {}, "cohere2": {**HEAD, **SLIDING}, "cohere2_moe": {**HEAD, **SLIDING, **LOCAL},
    "cwm": {**HEAD, **SLIDING}, "doge": {}, "dots1": {**HEAD, **ROUTED}, "ernie4_5": HEAD,
    "ernie4_5_moe": {**HEAD, "moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 16, "moe_num_shared_experts": 0},
    "exaone4": {**HEAD, **SLIDING}, "exaone_moe": {**HEAD, **SLIDING, **EXPERTS, "num_shared_experts": 1, "n_group": 1,
                                                   "topk_group": 1, "first_k_dense_replace": 1},
    "falcon": {"ffn_hidden_size": 48}, "flex_olmo": {"num_experts": 2, "num_experts_per_tok": 1},
    "flint": {**HEAD, **SLIDING},
    "gemma": HEAD, "gemma2": {**HEAD, **SLIDING}, "gemma3_text": {**HEAD, **SLIDING}, "glm": HEAD, "glm4": HEAD,
    "glm4_moe": {**HEAD, **ROUTED}, "gpt2": GPT2_LIKE, "gpt_bigcode": GPT2_LIKE, "gpt_neox": {},
    "gpt_oss": {**HEAD, **SLIDING, **LOCAL}, "granite": {}, "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 16}, "helium": HEAD, "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": {**HEAD, "num_experts": 2, "moe_topk": 1}, "hy_v3": {**HEAD, **EXPERTS}, "hyperclovax": {},
    "jais2": HEAD, "kolibri1": {**HEAD, **SLIDING, **EXPERTS}, "laguna": {**HEAD, **SLIDING, **EXPERTS}, "llama": {},
    "mellum": {**HEAD, **SLIDING, **EXPERTS}, "mimo_v2_flash": {**HEAD, **SLIDING, **ROUTED},
    "minimax_m2": {**HEAD, **LOCAL}, "ministral": {**HEAD, **SLIDING}, "ministral3": {**HEAD, **WHOLE}, "mistral": WHOLE,
    "mixtral": {**LOCAL, **WHOLE}, "nanochat": {}, "nemotron": HEAD, "olmo": {}, "olmo2": {}, "olmo3": SLIDING,
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {}, "phi": {}, "phi3": WHOLE, "phimoe": {**LOCAL, **WHOLE}, "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16}, "qwen3": HEAD, "qwen3_moe": {**HEAD, **EXPERTS},
    "seed_oss": HEAD, "smollm3": {}, "solar_open": {**HEAD, **ROUTED}, "stablelm": {}, "starcoder2": WHOLE,
    "vaultgemma": {**HEAD, **SLIDING},
}  # fmt: skip


def skip_unless_here(model_type: str) -> None:
    """Skip a test of a type that the installed transformers does not have."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")


def build(model_type: str, **settings):
    """A new model of this type."""
    skip_unless_here(model_type)
    config = AutoConfig.for_model(model_type, **{**LLAMA_LIKE, **TYPES.get(model_type, {}), **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@functools.lru_cache(maxsize=2)
def shared(model_type: str):
    """The model of this type, for tests that leave it as it was and come one after the other."""
    return build(model_type)
