"""Every counter counts what its name says, and the log lines say it every 512 tokens."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import make_tiny_llama, random_states, stream, token_ids

from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm
from streaming_llm.data.tokens import EXACT, PRECISION, REPLAY, SKETCH
from streaming_llm.evaluation.lone_layer import LoneLayer

SMALL = {"start_size": 2, "recent_size": 16, "compression_interval": 8, "min_middle_size_for_compress": 0, "rank": 4}
MODULES = {
    "enable_dual_fidelity": True,
    "sketch_budget": 4,
    "enable_residual_replay": True,
    "replay_budget": 2,
    "energy_replay_threshold": 1.0,
    "enable_position_calibration": True,
    "enable_adaptive_controller": True,
}


def by_hand(**settings) -> ADMSKVCache:
    return ADMSKVCache(ADMSConfig(**settings))


def risen(cache, before: dict) -> dict[str, int]:
    return {name: count - before[name] for name, count in cache.stats.items() if count != before[name]}


def test_nothing_done_is_nothing_counted():
    assert set(by_hand().stats.values()) == {0}


def test_a_compaction_counts_heads_and_what_became_of_their_tokens():
    layer = LoneLayer(ADMSConfig(**SMALL, compressed_budget=6, min_importance_tokens=1), wired=False)
    cache = by_hand()
    cache.stream = layer.stream
    keys, values = random_states(2 + 10 + 16, batch=3, heads=2)
    layer.update(keys, values)
    before = cache.stats
    layer.compact()
    middle = layer.buffer.slice(2, 8)
    exact, precision = (int((middle.tier == tier).sum()) for tier in (EXACT, PRECISION))
    wanted = {"total_exact_kept": exact, "total_compressed_kept": precision}
    assert risen(cache, before) == {
        "total_compressions": 3 * 2,
        "total_middle_dropped": 3 * 2 * (10 - 6),
        **{name: count for name, count in wanted.items() if count},
    }


def test_promotions_are_counted_in_sketches():
    cache = by_hand(enable_dual_fidelity=True, sketch_budget=4)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 12, 8, generator=generator)
    cache._update_sketch_bank(0, 0, keys, values, torch.arange(12))
    before = cache.stats
    cache._promote_sketches_to_precision(0, 0, 3)
    assert risen(cache, before) == {"total_sketch_promotions": 3}


def test_a_replay_counts_one_trigger_and_its_tokens():
    cache = by_hand(enable_residual_replay=True, replay_budget=8)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 20, 8, generator=generator)
    cache._update_replay_bank(0, 0, keys, values, torch.arange(20))
    before = cache.stats
    cache._trigger_replay(0, 0, 0.95)
    assert risen(cache, before) == {}
    cache._trigger_replay(0, 0, 0.45)
    assert risen(cache, before) == {"total_replay_triggers": 1, "total_replay_tokens": 4}


def test_a_calibration_is_counted_where_it_was_fitted():
    cache = by_hand(enable_position_calibration=True, recent_size=16)
    cache.current_length = 200
    before = cache.stats
    cache._update_calibration_anchors(0, 0, torch.arange(9) + 191)
    cache._calibrate_synthetic_positions(0, 0, torch.tensor([10.0, 20.0]), torch.zeros(2, 8))
    assert risen(cache, before) == {}
    cache._update_calibration_anchors(0, 0, torch.arange(20) + 180)
    cache._calibrate_synthetic_positions(0, 0, torch.tensor([10.0, 20.0]), torch.zeros(2, 8))
    assert risen(cache, before) == {"total_calibrations": 1}


def test_a_budget_that_changes_is_an_adjustment_and_one_that_stays_is_none():
    cache = by_hand(enable_adaptive_controller=True)
    before = cache.stats
    cache._update_controller_state(0, 0, 0.1, 1.0)
    cache._get_adaptive_budget(0, 0, 100)
    assert risen(cache, before) == {"total_budget_adjustments": 1}
    cache._get_adaptive_budget(0, 0, 100)
    assert risen(cache, before) == {"total_budget_adjustments": 1}


def test_in_a_stream_the_tiers_after_each_compaction_add_up_to_the_counters():
    model = make_tiny_llama()
    cache = enable_adms_llm(model, **SMALL, **MODULES, compressed_budget=12)
    sums = {"total_sketch_tokens": 0, "total_replay_tokens": 0}
    for start in range(0, 240, 8):
        before = cache.stats["total_compressions"]
        stream(model, token_ids(8, seed=start), cache, 8)
        if cache.stats["total_compressions"] != before:
            for layer in cache.layers:
                middle = layer.held.slice(2, 2 + layer.stack.rows[0].width)
                for name, tier in (("total_sketch_tokens", SKETCH), ("total_replay_tokens", REPLAY)):
                    sums[name] += int((middle.tier == tier).sum())
    assert all(sums.values())
    # Replayed tokens that a later compaction keeps stay in their tier's count no longer: they are candidates again.
    assert cache.stats["total_sketch_tokens"] == sums["total_sketch_tokens"]
    assert 0 < cache.stats["total_replay_tokens"] <= sums["total_replay_tokens"]


LINES = {
    "enable_dual_fidelity": r"\[ADMS Dual-Fidelity @ 512\] Sketches: \d+, Promotions: \d+",
    "enable_residual_replay": r"\[ADMS Replay @ 512\] Triggers: \d+, Tokens: \d+",
    "enable_position_calibration": r"\[ADMS Calibration @ 512\] Total calibrations: \d+",
    "enable_adaptive_controller": r"\[ADMS Controller @ 512\] Budget adjustments: \d+",
}


@pytest.mark.parametrize("on", [(), *[(name,) for name in LINES], tuple(LINES)], ids=str)
def test_every_512_tokens_each_module_that_is_on_has_its_line(on, caplog):
    import re

    needed = {"enable_dual_fidelity": ("sketch_budget",), "enable_residual_replay": ("replay_budget",)}
    chosen = {name: MODULES[name] for switch in on for name in (switch, *needed.get(switch, ()))}
    model = make_tiny_llama()
    cache = enable_adms_llm(model, **SMALL, **chosen, compressed_budget=12)
    with caplog.at_level(logging.INFO, logger="streaming_llm"):
        stream(model, token_ids(500), cache, 50)
        assert not caplog.records
        stream(model, token_ids(50), cache, 50)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 + len(on)
    for switch, line in LINES.items():
        assert any(re.fullmatch(line, text) for text in said) == (switch in on), switch
    assert said[0].startswith("[ADMS Stats @ 512] Avg per head: exact=")
    assert re.fullmatch(r"\[ADMS Cache @ 512\] Actual size: \d+, Expected max: \d+, Ratio: [\d.]+%", said[-1])
