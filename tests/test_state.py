"""What the modules remember of each head: batched, changed in place, seen through read-only views, stacked and copied."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import random_states, stream, token_ids
from test_controller import CONTROLLED, MODEL, SMALL

from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm
from streaming_llm.compaction.controller import ControllerState
from streaming_llm.data.state import HeadState, HeadView
from streaming_llm.store.stack import Stack

ALL_ON = {
    **CONTROLLED, "enable_dual_fidelity": True, "sketch_budget": 3, "sketch_originals": 8, "enable_residual_replay": True,
    "replay_budget": 2, "enable_position_calibration": True, "calibration_window": 16, "controller_scope": "model",
}  # fmt: skip


@dataclass
class Notes(HeadState):
    numbers: torch.Tensor
    marks: torch.Tensor


def notes(rows: int = 2, heads: int = 3) -> Notes:
    return Notes(torch.arange(rows * heads * 4.0).view(rows, heads, 4), torch.zeros(rows, heads, dtype=torch.bool))


# -- HeadState -----------------------------------------------------------------------------------------------------------


def test_what_is_done_to_a_part_is_done_to_the_whole():
    state = notes()
    part = state.part(1, 2)
    assert part.numbers.shape == (1, 1, 4) and part.marks.shape == (1, 1)
    part.numbers.fill_(-1)
    part.marks.fill_(True)
    assert state.numbers[1, 2].eq(-1).all() and state.numbers.eq(-1).sum() == 4
    assert state.marks.sum() == 1 and state.marks[1, 2]


def test_a_state_knows_its_heads_its_bytes_and_its_tensors():
    state = notes()
    assert state.heads == 3 and state.nbytes == 2 * 3 * (4 * 4 + 1)
    assert list(state.tensors()) == ["numbers", "marks"]
    doubled = state.map(lambda tensor: torch.cat([tensor, tensor]))
    assert isinstance(doubled, Notes) and doubled.numbers.shape == (4, 3, 4) and state.numbers.shape == (2, 3, 4)


def test_more_heads_come_after_those_there_are():
    state = notes(1, 2).with_heads(notes(1, 1))
    assert state.heads == 3 and torch.equal(state.numbers[:, :2], notes(1, 2).numbers)
    assert torch.equal(state.numbers[:, 2:], notes(1, 1).numbers)


# -- HeadView ------------------------------------------------------------------------------------------------------------


def view() -> HeadView:
    shown = {(0, 0, 1): "a", (2, 0, 0): "b", (2, 1, 0): "c"}
    return HeadView("letters", lambda: [(0, 2), (2, 1)], lambda *key: shown.get(key))


def test_a_view_shows_the_heads_that_have_something_to_show():
    letters = view()
    assert dict(letters) == {(0, 1): "a", (2, 0): "b"} and len(letters) == 2
    assert (0, 1) in letters and (0, 0) not in letters and letters.get((7, 0)) is None
    assert dict(letters.row(1)) == {(2, 0): "c"}
    assert repr(letters) == "letters[(0, 1), (2, 0)]"


@pytest.mark.parametrize("key", [(0, 0), (0, 2), (0, -1), (1, 0), (3, 0), 0, "ab", (0,), (0, 1, 0), None])
def test_any_other_key_is_a_key_error(key):
    with pytest.raises(KeyError):
        view()[key]


def test_a_view_can_not_be_written_to():
    with pytest.raises(TypeError):
        view()[0, 1] = "z"
    with pytest.raises(TypeError):
        del view()[0, 1]


def test_the_views_of_a_filled_cache_show_its_heads_and_rows():
    cache = enable_adms_llm(MODEL, **ALL_ON)
    ids = token_ids(120, 2)
    stream(MODEL, ids, cache, 4)
    everywhere = [(layer, head) for layer in range(4) for head in range(2)]
    for name in ("controller_energy_ema", "controller_attention_mass", "controller_budgets"):
        shown = getattr(cache, name)
        assert list(shown) == everywhere
        for row in (0, 1):
            field = {"controller_energy_ema": "energy", "controller_attention_mass": "mass", "controller_budgets": "budgets"}
            for (layer, head), value in shown.row(row).items():
                stack = cache.layers[layer].stack
                own = stack.of_layer(layer, getattr(stack.memory.controller, field[name]))
                assert value == own[row, head].item()
        with pytest.raises(ValueError, match="row=2"):
            shown.row(2)[0, 0]
    assert dict(cache.controller_energy_ema) != dict(cache.controller_energy_ema.row(1))
    for name in ("sketch_bank", "sketch_energies", "replay_bank", "calibration_anchors", "calibration_offsets"):
        assert set(getattr(cache, name)) <= set(everywhere) and len(getattr(cache, name)), name


# -- by hand -------------------------------------------------------------------------------------------------------------


def test_a_head_that_was_not_there_is_made_and_those_there_stay():
    cache = ADMSKVCache(ADMSConfig(enable_adaptive_controller=True))
    cache._update_controller_state(0, 1, 0.5, 0.5)
    cache._update_controller_state(0, 4, 0.7, 0.5)
    cache._update_controller_state(0, 0, 0.9, 0.5)
    assert cache._layer_state("controller", 0).heads == 5
    assert {key: round(value, 6) for key, value in cache.controller_energy_ema.items()} == {
        (0, 0): 0.9,
        (0, 1): 0.5,
        (0, 4): 0.7,
    }


def test_the_banks_of_a_filled_layer_are_not_changed_by_hand():
    cache = enable_adms_llm(MODEL, **ALL_ON)
    stream(MODEL, token_ids(60), cache, 4)
    memory = cache.layers[0].stack.memory
    states = [tensor.clone() for state in memory.states().values() for tensor in state.tensors().values()]
    keys, values = (part[0, 0] for part in random_states(5, dim=16))
    for change in (
        lambda: cache._update_sketch_bank(0, 0, keys, values, torch.arange(5)),
        lambda: cache._update_replay_bank(0, 0, keys, values, torch.arange(5)),
        lambda: cache._promote_sketches_to_precision(0, 0, 2),
    ):
        with pytest.raises(RuntimeError, match="layer 0 is filled by a model"):
            change()
    after = [tensor for state in cache.layers[0].stack.memory.states().values() for tensor in state.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    with pytest.raises(ValueError, match="head_idx=2 must be below 2"):
        cache._get_adaptive_budget(0, 2, 5)


def test_a_layer_with_a_sliding_window_keeps_nothing_by_hand():
    from transformers import Gemma3TextConfig

    sliding = Gemma3TextConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, hidden_size=32, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    cache = ADMSKVCache(ADMSConfig(enable_adaptive_controller=True), model_config=sliding)
    with pytest.raises(ValueError, match="layer_idx=0 has a sliding window"):
        cache._update_controller_state(0, 0, 0.5, 0.5)
    cache._update_controller_state(1, 0, 0.5, 0.5)
    assert list(cache.controller_energy_ema) == [(1, 0)]


def test_by_hand_is_over_when_a_model_fills_the_layer():
    cache = enable_adms_llm(MODEL, **ALL_ON)
    keys, values = (part[0, 0] for part in random_states(5, dim=16))
    cache._update_sketch_bank(0, 0, keys, values, torch.arange(5))
    cache._update_replay_bank(0, 0, keys, values, torch.arange(5))
    cache._update_controller_state(0, 0, 0.0, 1.0)
    assert cache.sketch_bank and cache.replay_bank and cache.controller_energy_ema
    ids = token_ids(90, 2)
    expected = stream(MODEL, ids, enable_adms_llm(MODEL, **ALL_ON), 5)
    assert torch.equal(stream(MODEL, ids, cache, 5), expected)


# -- stacks --------------------------------------------------------------------------------------------------------------


def test_layers_put_together_share_one_storage_and_keep_what_they_had():
    cache = enable_adms_llm(MODEL, **{**ALL_ON, "controller_scope": "layer"})
    stream(MODEL, token_ids(61, 2), cache, 3)
    apart = copy.deepcopy(cache)
    (whole,) = apart.stream.stacks
    singles = [whole.single(layer).to(whole.device) for layer in whole.layers]
    stack = Stack.join(singles[1:3], 2)
    assert stack.layers == (1, 2) and stack.rows == whole.rows
    states = {"tokens": stack.tokens, **stack.memory.states()}
    assert set(states) == {"tokens", "originals", "replay", "calibration", "controller"}
    for name, state in states.items():
        for layer, single in zip(stack.layers, singles[1:3], strict=True):
            before = {"tokens": single.tokens, **single.memory.states()}[name].tensors()
            for field, tensor in state.tensors().items():
                part = stack.of_layer(layer, tensor)
                assert torch.equal(part, before[field]), (name, field)
                assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    apart.stream.stacks = [singles[0], stack, singles[3]]
    ids = token_ids(80, 2, seed=5)
    torch.testing.assert_close(stream(MODEL, ids, apart, 3), stream(MODEL, ids, cache, 3), rtol=0, atol=1e-5)
    assert [own.layers for own in apart.stream.stacks] == [(0,), (1, 2), (3,)] and apart.stats == cache.stats


def test_a_state_lives_in_its_layers_part_of_the_stacks():
    cache = enable_adms_llm(MODEL, **ALL_ON)
    stream(MODEL, token_ids(4), cache, 4)
    (whole,) = cache.stream.stacks
    assert whole.memory.controller.energy.shape == (4, 2)
    cache._update_controller_state(2, 1, 0.25, 0.5)
    assert whole.memory.controller.energy[2, 1] == 0.25 and whole.memory.controller.measured.sum() == 1


def test_no_state_is_kept_for_modules_that_are_off():
    cache = enable_adms_llm(MODEL, **SMALL)
    stream(MODEL, token_ids(60), cache, 4)
    assert cache.layers[0].stack.compacted and not any(stack.memory.states() for stack in cache.stream.stacks)
    assert not any(
        len(getattr(cache, name))
        for name in ("sketch_bank", "replay_bank", "calibration_anchors", "controller_energy_ema", "controller_budgets")
    )


def test_an_empty_controller_state_has_measured_nothing():
    state = ControllerState.empty(2, 3, torch.device("cpu"))
    assert state.energy.eq(1).all() and state.measured.eq(0).all() and state.budgets.eq(0).all() and state.heads == 3
    assert state.nbytes == 2 * 3 * (4 + 4 + 8 + 8)
