"""The modules and compressors against the plain reference (`plain_modules.py`): logits, tokens, what is remembered."""

from __future__ import annotations

import plain
import pytest
import torch
from conftest import make_tiny_llama
from plain_modules import ModuleCache
from test_plain import assert_same_state, batched, distinct
from test_plain_padded import long_row, padded_stream

from streaming_llm import enable_adms_llm
from streaming_llm.evaluation.soak import tiny_model
from streaming_llm.stream import positions

SIZES = {
    "start_size": 2, "recent_size": 10, "compressed_budget": 10, "compression_interval": 8, "rank": 6,
    "attention_window": 16, "min_importance_tokens": 2, "min_middle_size_for_compress": 0, "num_clusters": 4,
}  # fmt: skip
# All originals of the sketches promoted return: which of too many do depends on where they are stored.
SKETCHES = {"enable_dual_fidelity": True, "sketch_budget": 5, "promotion_budget": 8, "sketch_originals": 16}
REPLAY = {"enable_residual_replay": True, "replay_budget": 4, "energy_replay_threshold": 0.95}
CALIBRATION = {"enable_position_calibration": True, "calibration_window": 40}
CONTROLLER = {"enable_adaptive_controller": True, "controller_gain": 0.5}
MODEL_SCOPE = CONTROLLER | {"controller_scope": "model"}
VQ, MATCHING = {"compressor_type": "vq"}, {"compressor_type": "attention_matching"}
GRID, HYBRID = CALIBRATION | {"anchor_mode": "grid"}, CALIBRATION | {"anchor_mode": "hybrid", "seed": 5}
FOUR = SKETCHES | REPLAY | MODEL_SCOPE
MODEL = make_tiny_llama()
FOUR_HEADS = tiny_model(4096, num_key_value_heads=4)
TOKENS = 80
FIVES, MIXED = 5, [45, 1, 7]
# name: settings, chunks, seed of the tokens (one with which no choice is a matter of rounding).
STREAMS = {
    "sketches": (SKETCHES, FIVES, 1),
    "sketches, sum": (SKETCHES | {"sketch_reduction": "sum"}, MIXED, 1),
    "sketches, first": (SKETCHES | {"sketch_reduction": "first"}, FIVES, 1),
    "replay": (REPLAY, FIVES, 1),
    "sketches and replay": (SKETCHES | REPLAY, MIXED, 1),
    "controller, layer": (CONTROLLER, FIVES, 1),
    "controller, groups of four heads": (CONTROLLER | {"controller_group_size": 2}, MIXED, 1),
    "controller, model": (MODEL_SCOPE, FIVES, 1),
    "variance budgets": ({"use_adaptive_budget": True}, FIVES, 1),
    "variance budgets, sketches, replay": (SKETCHES | REPLAY | {"use_adaptive_budget": True}, MIXED, 1),
    "coverage": ({"coverage_priority": 0.8, "coverage_segments": 2}, MIXED, 1),
    "vq": (VQ, FIVES, 1),
    "vq, layer, sketches": (VQ | CONTROLLER | SKETCHES, MIXED, 1),
    "vq, grid": (VQ | GRID, FIVES, 1),
    "vq, hybrid": (VQ | HYBRID, MIXED, 1),
    "attention matching": (MATCHING, FIVES, 1),
    "attention matching, protected": (MATCHING | {"protect_exact": True}, MIXED, 1),
    "all four": (FOUR | CALIBRATION, FIVES, 3),
    "all four, layer, grid": (SKETCHES | REPLAY | CONTROLLER | GRID, MIXED, 3),
    "all four, vq, hybrid": (FOUR | VQ | HYBRID, MIXED, 4),
    "all four, attention matching": (FOUR | MATCHING | GRID, FIVES, 3),
}  # fmt: skip


def tolerances(chosen: dict) -> tuple[float, float]:
    """How near logits and keys must be: where keys are moved to a mean position, all that its weights' rounding does."""
    return (2e-3, 5e-3) if chosen.get("anchor_mode", "mean") != "mean" else (1e-4, 1e-4)


def assert_same_modules(cache, reference: ModuleCache, row: int = 0) -> None:
    """What the documented views show of every head of row `row` is the reference's."""
    config = cache.config
    view = {
        name: getattr(cache, name).row(row)
        for name in (
            "sketch_bank", "replay_bank", "calibration_anchors", "calibration_offsets",
            "controller_budgets", "controller_energy_ema", "controller_attention_mass",
        )
    }  # fmt: skip
    for number, layer in enumerate(reference.layers):
        for at, head in enumerate(layer.heads):
            place = (number, at)
            sketched = [o["pos"] for o in head.originals if o["parent"]["tier"] == "sketch"]
            shown = view["sketch_bank"][place]["original_positions"].tolist() if place in view["sketch_bank"] else []
            assert sorted(shown) == pytest.approx(sorted(sketched)), place
            if config.replay_budget:
                newest = sorted(head.originals, key=lambda o: o["order"])[-4 * config.replay_budget :]
                shown = view["replay_bank"][place]["positions"].tolist() if place in view["replay_bank"] else []
                assert shown == pytest.approx([o["pos"] for o in newest]), place
            if head.anchors:
                shown = view["calibration_anchors"][place]
                torch.testing.assert_close(shown, torch.tensor(head.anchors), rtol=1e-5, atol=2e-3)
            if place in view["calibration_offsets"]:
                slope, shift = view["calibration_offsets"][place].tolist()
                assert (slope, shift) == pytest.approx(head.offsets, rel=1e-3, abs=5e-3)
            if head.measured:
                assert view["controller_energy_ema"][place] == pytest.approx(head.energy, rel=1e-4)
                assert view["controller_attention_mass"][place] == pytest.approx(head.mass, rel=1e-4)
            if head.decided:
                assert view["controller_budgets"][place] == head.decided


@pytest.mark.parametrize("name", STREAMS)
def test_logits_tokens_and_what_modules_remember_are_the_references(name):
    chosen, chunks, seed = STREAMS[name]
    model = FOUR_HEADS if "four heads" in name else MODEL
    cache, ids = enable_adms_llm(model, **SIZES | chosen), distinct(seed, TOKENS)
    got = batched(model, ids, chunks, cache)
    own = ModuleCache(model, cache.config)
    expected, reference = plain.plain_stream(model, ids, cache.config, chunks, cache=own)
    assert reference.steady == TOKENS, f"a choice too close to compare ({reference.closest:.1e}): take another seed"
    logits, keys = tolerances(chosen)
    torch.testing.assert_close(got, expected, rtol=logits, atol=logits)
    assert_same_state(cache, reference, keys=keys)
    assert_same_modules(cache, reference)
    assert {name: cache.stats[name] for name in own.counters} == own.counters
    # The case is one in which all that it is there for happened.
    assert own.compactions >= 4
    happened = {name: count > 0 for name, count in own.counters.items()}
    assert happened == {
        "total_sketch_promotions": own.config.sketch_budget > 0,
        "total_replay_triggers": own.config.replay_budget > 0,
        "total_replay_tokens": own.config.replay_budget > 0,
        "total_calibrations": own.config.enable_position_calibration,
        "total_budget_adjustments": own.config.enable_adaptive_controller,
    }


PADDED = {"all four": FOUR | CALIBRATION, "vq, layer": VQ | CONTROLLER, "attention matching, grid": FOUR | MATCHING | GRID}


@pytest.mark.parametrize("name", PADDED)
def test_a_row_of_a_padded_batch_is_the_reference_of_the_row_alone(name):
    lengths, new = [3, 20, 50], 24
    rows = [long_row(seed, length + new) for seed, length in enumerate(lengths, start=3)]
    cache = enable_adms_llm(MODEL, **SIZES | PADDED[name])
    together = padded_stream(MODEL, rows, [lengths] + [[1] * len(lengths)] * new, cache)
    logits, keys = tolerances(PADDED[name])
    for number, row in enumerate(rows):
        own = ModuleCache(MODEL, cache.config)
        alone, reference = plain.plain_stream(MODEL, row, cache.config, [lengths[number], 1], cache=own)
        steady = reference.steady
        assert steady >= lengths[number] + 12, f"row {number}: a choice too close to compare, take another seed"
        torch.testing.assert_close(together[number][:, :steady], alone[:, :steady], rtol=logits, atol=logits)
        if steady == row.shape[1]:
            assert_same_state(cache, reference, number, keys)
            assert_same_modules(cache, reference, number)


def test_originals_and_anchors_move_with_the_window_as_the_references_do():
    model, chosen = make_tiny_llama(), SKETCHES | REPLAY | GRID | {"position_policy": "auto"}
    model.config.max_position_embeddings = 60
    cache, ids = enable_adms_llm(model, **SIZES | chosen), distinct(5, 100)
    got = batched(model, ids, [25, 3], cache)
    own = ModuleCache(model, cache.config, window=60, target=int(60 * positions.TARGET))
    expected, reference = plain.plain_stream(model, ids, cache.config, [25, 3], cache=own)
    steady = reference.steady
    assert own.rebases > 0 and steady == 100
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    assert_same_state(cache, reference, keys=5e-3)
    assert_same_modules(cache, reference)
