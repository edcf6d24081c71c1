"""The methods users know, as policies of the same layer: each keeps what its paper says, and nothing is merged."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_llama, random_queries, random_states, stream, token_ids

from streaming_llm import ADMSConfig, enable_streaming_llm
from streaming_llm.baselines import BASELINES, enable_baseline
from streaming_llm.data.tokens import SINK
from streaming_llm.evaluation.lone_layer import LoneLayer

MODEL = make_tiny_llama()
EQUAL = {"start_size": 2, "recent_size": 12, "compressed_budget": 10, "compression_interval": 6, "attention_window": 8}
SCALE = 8**-0.5


def filled(name: str, tokens: int = 24, heads: int = 2, **chosen) -> tuple[LoneLayer, torch.Tensor, torch.Tensor]:
    """A layer about to compact, its keys and the queries `[batch, heads, groups * tokens, dim]` it was shown."""
    config = ADMSConfig(
        **{"start_size": 2, "recent_size": 6, "compressed_budget": 5, "compression_interval": 11, "compressor_type": name,
           "importance_ratio": 0.0, "min_importance_tokens": 0, "attention_window": 4, "rank": 4, **chosen}
    )  # fmt: skip
    layer = LoneLayer(config)
    keys, values = random_states(tokens, 1, heads)
    queries = random_queries(tokens, 1, heads)
    layer.update(keys, values)
    layer.observe(queries, SCALE)
    return layer, keys, queries


def probabilities(keys, queries) -> torch.Tensor:
    """Causal attention `[heads, groups, queries, tokens]`."""
    heads, tokens = keys.shape[1], keys.shape[2]
    logits = queries.view(heads, -1, tokens, 8) @ keys[0, :, None].transpose(-1, -2) * SCALE
    return (logits + torch.full((tokens, tokens), -torch.inf).triu(1)).softmax(-1)


def middle_kept(layer: LoneLayer) -> list[set[int]]:
    layer.compact()
    return [set(row.long().tolist()) for row in layer.held.pos[0, :, 2:7]]


def test_h2o_keeps_what_received_most_attention_of_all_queries(monkeypatch):
    from streaming_llm.stream import upkeep

    monkeypatch.setattr(upkeep, "_PREFILL_STEP", 1)
    layer, keys, queries = filled("h2o")
    received = probabilities(keys, queries).sum((1, 2))[:, 2:18]
    expected = [set((row.topk(5).indices + 2).tolist()) for row in received]
    assert middle_kept(layer) == expected


def test_snapkv_keeps_what_the_last_window_attends_to_with_its_neighbours():
    layer, keys, queries = filled("snapkv")
    mean = probabilities(keys, queries)[:, :, -4:].mean((1, 2))[:, 2:18]
    pooled = torch.nn.functional.max_pool1d(mean[:, None], 5, stride=1, padding=2)[:, 0]
    for kept, score in zip(middle_kept(layer), pooled, strict=True):
        least = min(score[slot - 2] for slot in kept)
        left_out = [score[slot - 2] for slot in range(2, 18) if slot not in kept]
        assert least >= max(left_out) - 1e-6


def test_tova_keeps_what_the_newest_query_attends_to_the_same_in_every_head():
    layer, keys, queries = filled("tova")
    last = probabilities(keys, queries)[:, :, -1].mean((0, 1))[2:18]
    expected = set((last.topk(5).indices + 2).tolist())
    assert middle_kept(layer) == [expected, expected]


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "streaming"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_baseline_evicts_and_never_merges(name, chunk):
    cache = enable_baseline(MODEL, name, **EQUAL)
    ids = token_ids(150, 2)
    assert stream(MODEL, ids, cache, chunk).isfinite().all()
    for layer in cache.layers:
        held = layer.held
        assert held.beta.eq(0).all() and held.count.eq(1).all()
        assert held.pos[..., 2:].eq(held.pos[..., 2:].round()).all()
        assert all(len(set(row.tolist())) == held.length for row in held.pos.flatten(0, 1))
    assert cache.held_tokens <= cache.config.expected_max_tokens == 30


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "streaming"])
def test_kept_tokens_stay_in_the_order_of_the_stream(name):
    cache = enable_baseline(MODEL, name, **EQUAL)
    stream(MODEL, token_ids(150), cache, 7)
    for layer in cache.layers:
        assert (layer.held.pos.diff(dim=-1) > 0).all()


def test_streaming_holds_sinks_and_the_last_tokens():
    cache = enable_streaming_llm(MODEL, start_size=2, recent_size=12, compression_interval=6)
    stream(MODEL, token_ids(101), cache, 1)
    for layer in cache.layers:
        places = layer.held.pos[0, 0].tolist()
        assert places[:2] == [0, 1] and places[-1] == 100
        assert places[2:] == list(range(101 - len(places) + 2, 101))
        assert layer.held.tier[..., :2].eq(SINK).all() and layer.held.beta.eq(0).all()


def test_streaming_with_a_budget_gets_it_as_recent_window():
    cache = enable_baseline(MODEL, "streaming", **EQUAL)
    assert (cache.recent_size, cache.compressed_budget, cache.start_size) == (22, 0, 2)
    for name in BASELINES:
        other = enable_baseline(MODEL, name, **EQUAL)
        assert other.config.expected_max_tokens == cache.config.expected_max_tokens
        if name != "streaming":
            assert other.config.compressor_type == name and other.config.importance_ratio == 0.0


def test_streaming_equals_a_model_that_attends_to_sinks_and_window_only():
    # One query with positions as they are: the full attention with everything else masked.
    ids = token_ids(60)
    cache = enable_streaming_llm(MODEL, start_size=2, recent_size=40, compression_interval=1)
    with torch.no_grad():
        got = stream(MODEL, ids[:, :44], cache, 1)[:, -1]
        first_layer = cache.layers[0].held.pos[0, 0].tolist()
        mask = torch.full((44, 44), torch.finfo(torch.float32).min).triu(1)
        for query in range(44):
            for key in range(2, 44):
                # After token `query` arrived, the 41 newest and the sinks were held.
                if key < query - 40:
                    mask[query, key] = torch.finfo(torch.float32).min
        expected = MODEL(ids[:, :44], attention_mask=mask[None, None], use_cache=False).logits[:, -1]
    assert first_layer[:3] == [0, 1, 3]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_an_unknown_baseline_is_refused_with_the_list():
    with pytest.raises(ValueError, match="name='kivi' must be one of streaming, h2o, snapkv, tova"):
        enable_baseline(MODEL, "kivi")
    with pytest.raises(ValueError, match="'recent'.*recent_size"):
        enable_baseline(MODEL, "h2o", recent=4)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("setting,wrong", [("recent_size", "12"), ("compressed_budget", None), ("compressed_budget", 1.5)])
def test_a_wrong_size_is_refused_by_name_whatever_the_method(name, setting, wrong):
    with pytest.raises(TypeError, match=f"{setting}={wrong!r} must be of type int"):
        enable_baseline(MODEL, name, **{**EQUAL, setting: wrong})
