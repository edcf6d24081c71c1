"""The one table of model types: which are supported, what some need that no attribute of theirs tells, which can't be.

tests/test_families.py and tests/test_family_modes.py hold the table to its word: a type stands here once every mode was
tried on it. A type that stands nowhere here is probed (`probe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What is to be known of a model type.

    Attributes:
        learned_positions: it has a table of positions, and none past its end.
        cache_dropped: it has `generate` go on without the cache given, unseen, once a stream passes the config's
            `original_max_position_embeddings`, whether or not its RoPE changes there.
        calls_sdpa: it calls torch's attention itself, whatever is registered.
        rotates_sliding_only: of its sliding and full layers it rotates keys in the sliding ones only; no config says so.
        varies: some supported releases of transformers compute its attention past every registered function: it is probed
            like a type that is not here.
        refused: why it can't be enabled; empty where it can.
    """

    learned_positions: bool = False
    cache_dropped: bool = False
    calls_sdpa: bool = False
    rotates_sliding_only: bool = False
    varies: bool = False
    refused: str = ""


_PLAIN, _LEARNED, _SLIDING_ROPE = Family(), Family(learned_positions=True), Family(rotates_sliding_only=True)
_ALIBI = Family(
    refused="its ALiBi counts distances by index in the cache, which compaction changes; use a checkpoint with RoPE"
)
_ENCODER_DECODER = Family(refused="it is an encoder-decoder, whose cross attention writes to the cache too")
_STATE_SPACE = Family(refused="it has no keys to compact: its layers keep a state of fixed size")
_LATENT = Family(
    refused="its multi-head latent attention caches latents, which become keys only after the cache, so that neither "
    "log-mass nor queries belong to what is held"
)
_HYBRID = Family(
    refused="its linear-attention, convolution or state-space layers keep states that this cache has no place for; leave "
    "the cache out to have the one transformers makes"
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "apertus", "apertus1p5_text", "arcee", "aria_text", "bitnet", "cohere", "cwm", "doge", "dots1", "ernie4_5",
            "ernie4_5_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_neox", "gpt_oss",
            "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
            "hyperclovax", "jais2", "laguna", "llama", "mellum", "mimo_v2_flash", "minimax_m2", "ministral", "ministral3",
            "mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phimoe",
            "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
            "vaultgemma",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(("biogpt", "gpt2", "gpt_bigcode", "opt"), _LEARNED),
    **dict.fromkeys(("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1"), _SLIDING_ROPE),
    "falcon": Family(calls_sdpa=True),
    "nemotron": Family(varies=True),
    "phi3": Family(cache_dropped=True),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("bart", "mbart", "pegasus", "t5", "umt5", "whisper"), _ENCODER_DECODER),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), _STATE_SPACE),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"), _LATENT
    ),
    **dict.fromkeys(
        (
            "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "minimax", "nemotron_h",
            "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba", "zamba2",
        ),
        _HYBRID,
    ),
}  # fmt: skip

SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(sorted(name for name, family in FAMILIES.items() if not family.refused))


def family_of(model_type: str) -> Family:
    """The entry of a model type; one of a type that needs nothing where there is none."""
    return FAMILIES.get(model_type, _PLAIN)
