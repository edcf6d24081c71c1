"""Tables of model types: which are supported, and in what some differ from the others where no attribute tells."""

from __future__ import annotations

# Model types whose attention was tested with the cache (tests/test_families.py holds the list to its word).
SUPPORTED_MODEL_TYPES: tuple[str, ...] = (
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
# Model types with a table of learned positions: there is none past its end.
LEARNED_POSITIONS = ("gpt2",)
# Model types that have generate go on without the cache given, unseen, once a stream passes the config's
# original_max_position_embeddings, whether or not their RoPE changes there.
CACHE_DROPPED = ("phi3",)
# Model types that call torch's attention themselves, whatever is registered.
SDPA_ITSELF = ("falcon",)
# Families that mix sliding and full attention and rotate keys in the sliding layers only; their configs do not say so.
SLIDING_LAYERS_ONLY = ("afmoe", "cohere2", "exaone4", "exaone_moe")
