"""The batched cache against the plain reference of one row (`plain.py`): logits and everything held, head by head."""

from __future__ import annotations

import plain
import pytest
import torch
from conftest import make_tiny_llama, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_families import FAMILIES, make
from transformers import DynamicCache

from streaming_llm import ADMSConfig, ADMSLayer, enable_adms_llm
from streaming_llm.data.tokens import TIER_NAMES
from streaming_llm.model.families import family_of

SMALL = {
    "start_size": 2, "recent_size": 12, "compressed_budget": 10, "compression_interval": 8, "rank": 6,
    "attention_window": 16, "min_importance_tokens": 2, "min_middle_size_for_compress": 0,
}  # fmt: skip
MODEL = make_tiny_llama()
SEED = 1
CHUNKS = {
    "one by one": 1, "fives": 5, "seventeens": 17, "sixties": 60, "mixed": [40, 1, 1, 1, 9, 50, 1, 2, 3, 30, 1],
    "prompt, then one by one": [75, 1],
}  # fmt: skip


def family(name: str):
    # Where transformers lets Gemma 2 have sdpa (5.2), sdpa leaves its soft-capping out.
    return make(name, "eager" if name == "gemma2" else None)


def distinct(seed: int, tokens: int = 120) -> torch.Tensor:
    """Seeded token ids `[1, tokens]`, no two equal: equal tokens have equal values in the first layer, which is a tie."""
    return 3 + torch.randperm(125, generator=torch.Generator().manual_seed(seed))[None, :tokens]


@torch.no_grad()
def batched(model, ids: torch.Tensor, chunks, cache) -> torch.Tensor:
    parts = torch.split(ids, plain.chunk_sizes(ids.shape[1], chunks), dim=1)
    return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], dim=1)


def near(got: torch.Tensor, expected: torch.Tensor, name: str, **tolerance) -> None:
    torch.testing.assert_close(got, expected, **tolerance, msg=lambda message: f"{name}: {message}")


def assert_same_state(cache, reference: plain.PlainCache, row: int = 0, keys: float = 1e-4) -> None:
    """Every field of every slot of every head of row `row` is the reference's; `keys`: how near keys must be."""
    for layer, heads in zip(cache.layers, reference.state(), strict=True):
        assert isinstance(layer, ADMSLayer) == (heads is not None)
        for number, tokens in enumerate(heads or ()):
            held = layer.held.map(lambda tensor, number=number: tensor[row : row + 1, number : number + 1])
            used = held.valid[0, 0].nonzero()[:, 0]
            held = held.map(lambda tensor, used=used: tensor[0, 0, used])
            assert len(used) == len(tokens)
            assert held.count.tolist() == [token["count"] for token in tokens]
            assert [TIER_NAMES[tier] for tier in held.tier.tolist()] == [token["tier"] for token in tokens]
            for mine, pos in zip(held.pos.tolist(), (token["pos"] for token in tokens), strict=True):
                assert mine == pos if isinstance(pos, int) else mine == pytest.approx(pos, rel=1e-5, abs=1e-3)
            for name in ("beta", "mass", "square", "score"):
                expected = torch.tensor([token[name] for token in tokens])
                torch.testing.assert_close(
                    getattr(held, name), expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
                )
            for mine, name, tolerance in ((held.keys, "key", keys), (held.values, "value", 1e-4)):
                expected = torch.stack([token[name] for token in tokens]).float()
                near(mine, expected, name, rtol=tolerance, atol=tolerance)


def compared(model, ids: torch.Tensor, chunks, **chosen) -> plain.PlainCache:
    """Both streams, compared as far as no choice was a matter of rounding; the reference's cache."""
    cache = enable_adms_llm(model, **{**SMALL, **chosen})
    got = batched(model, ids, chunks, cache)
    expected, reference = plain.plain_stream(model, ids, cache.config, chunks)
    steady = reference.steady
    torch.testing.assert_close(got[:, :steady], expected[:, :steady], rtol=1e-4, atol=1e-4)
    if steady == ids.shape[1]:
        assert_same_state(cache, reference)
    return reference


# -- the reference itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILIES if not family_of(name).calls_sdpa])
def test_the_reference_without_compaction_is_the_model(name):
    model, ids = family(name), token_ids(50)
    expected = batched(model, ids, 7, DynamicCache(config=model.config))
    before = model.config._attn_implementation
    logits, cache = plain.plain_stream(model, ids, ADMSConfig(), 7)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.compactions == 0 and len(cache.heads[0].tokens) == 50
    assert model.config._attn_implementation == before
    assert torch.equal(batched(model, ids, 7, DynamicCache(config=model.config)), expected)


def test_the_reference_moved_back_says_and_scores_the_same_while_no_token_comes_before_its_slot():
    ids, positions, config = token_ids(32), torch.arange(32)[None] + 300, ADMSConfig(**SMALL)
    expected, still = plain.plain_stream(MODEL, ids, config, 4, positions)
    logits, moved = plain.plain_stream(MODEL, ids, config, 4, positions, window=312)
    assert (moved.rebases, moved.moved, moved.compactions) == (1, 300, 0)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    for one, other in zip(moved.heads, still.heads, strict=True):
        assert [token["pos"] + 300 for token in one.tokens] == [token["pos"] for token in other.tokens]
        scores = [[token["score"] for token in head.tokens] for head in (one, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-4)
        assert sum(score > 0 for score in scores[0]) >= 24


def test_the_references_window_keeps_positions_in_order_below_it_and_recent_distances_true():
    config = ADMSConfig(**SMALL)
    _, cache = plain.plain_stream(MODEL, token_ids(200), config, 3, window=60, target=40)
    assert cache.rebases >= 3 and cache.given - cache.moved <= 60
    for head in cache.heads:
        positions = [token["pos"] for token in head.tokens]
        assert positions == sorted(set(positions)) and positions[0] == 0
        assert positions[-config.recent_size :] == list(range(positions[-1] - config.recent_size + 1, positions[-1] + 1))
        assert positions[-1] + 1 == cache.given - cache.moved


# -- the package ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_logits_and_all_that_is_held_are_the_references(chunks):
    reference = compared(MODEL, token_ids(150, seed=SEED), chunks)
    assert reference.compactions >= 3
    assert reference.steady == 150, f"a choice too close to compare ({reference.closest:.1e}): take another seed"


@pytest.mark.parametrize("chunks", [[10, 5, 15], [39, 1], [1]])
def test_below_the_bound_scores_and_tokens_are_the_references(chunks):
    ids = token_ids(32)
    reference = compared(MODEL, ids, chunks)
    assert reference.compactions == 0 and reference.steady == 32


SETTINGS = {
    "StreamingLLM": {"compressed_budget": 0, "min_importance_tokens": 0},
    "all pins": {"importance_ratio": 1.0},
    "no pins": {"importance_ratio": 0.0, "min_importance_tokens": 0},
    "a small middle is all pins": {"min_middle_size_for_compress": 19},
    "pins protected": {"protect_exact": True},
    "scores forgotten at once": {"score_decay": 0.0},
    "scores never forgotten": {"score_decay": 1.0},
    "a wide window": {"attention_window": 64},
    "a window of one": {"attention_window": 1},
    "compacting for every token": {"compression_interval": 1},
    "all pins and one token too many": {"compression_interval": 1, "importance_ratio": 1.0},
    "a subspace of few": {"svd_max_tokens": 10, "rank": 3},
    "a recent window shorter than the interval": {"recent_size": 2},
    "no sinks": {"start_size": 0},
    "dynamic sinks": {"enable_dynamic_sink": True, "max_seq_length": 500},
    "score and value norm": {"attention_blend": 0.5},
    "score times value norm": {"importance_metric": "mixed"},
}  # fmt: skip


@pytest.mark.parametrize("number,name", enumerate(SETTINGS), ids=SETTINGS)
def test_every_setting_does_what_the_reference_does(number, name):
    chunks = CHUNKS["mixed" if number % 2 else "fives"]
    reference = compared(MODEL, distinct(1), chunks, **SETTINGS[name])
    assert reference.compactions >= 3 and reference.steady >= 100


@pytest.mark.parametrize(
    "name,chunks",
    [("gemma2", 5), ("gemma2", [60, 1, 20]), ("gpt_neox", 5), ("olmo2", [60, 1, 20]), ("phi3", 5), ("qwen3", [60, 1, 20]),
     ("smollm3", 5)],
)  # fmt: skip
def test_families_are_the_references_too(name, chunks):
    model, ids = family(name), token_ids(120, seed=1)
    reference = compared(model, ids, chunks)
    assert reference.compactions >= 2 and reference.steady >= 90
    assert (reference.heads[0].softcap is not None) == (name == "gemma2")


@given(
    sizes=st.tuples(st.integers(0, 4), st.integers(1, 16), st.integers(0, 12), st.integers(1, 12)),
    chunks=st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 20, 45]), min_size=1, max_size=8),
    window=st.sampled_from([1, 4, 16, 40]),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    decay=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    smallest=st.sampled_from([0, 14]),
    protect=st.booleans(),
    rank=st.integers(1, 6),
    few=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_settings_and_chunks_the_cache_is_the_reference(
    sizes, chunks, window, ratio, decay, smallest, protect, rank, few, seed
):
    start, recent, budget, interval = sizes
    compared(
        MODEL, distinct(seed, 80), chunks, start_size=start, recent_size=recent, compressed_budget=budget,
        compression_interval=interval, attention_window=window, importance_ratio=ratio, score_decay=decay,
        min_middle_size_for_compress=smallest, protect_exact=protect, rank=rank, svd_max_tokens=9 if few else 512,
        min_importance_tokens=0,
    )  # fmt: skip
