"""When rows are compacted: together at first, then each stack at its own step, and never too late."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import padded_passes, stream, token_ids

from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm
from streaming_llm.evaluation.soak import tiny_model
from streaming_llm.stream.turns import rows_due

SIZES = {"recent_size": 16, "compressed_budget": 16, "compression_interval": 16, "rank": 4}
LAYERS = 6


def model_and_cache(layers_at_once: int, **settings):
    model = tiny_model(4096, num_hidden_layers=LAYERS)
    cache = enable_adms_llm(model, **SIZES | settings)
    cache.stream.layers_at_once = layers_at_once
    return model, cache


def compacted_at(model, cache, ids) -> list[list[int]]:
    """Which layers were compacted before each of the tokens, given one by one."""
    found = []
    for token in ids.split(1, dim=1):
        before = [
            None if cache.stream.stack_of(n) is None else cache.stream.stack_of(n).rows[0].compactions for n in range(LAYERS)
        ]
        model(input_ids=token, past_key_values=cache)
        after = [cache.stream.stack_of(n).rows[0].compactions for n in range(LAYERS)]
        found.append([n for n in range(LAYERS) if before[n] is not None and after[n] > before[n]])
    return found


@torch.no_grad()
def test_after_the_first_compaction_a_step_compacts_one_stack():
    model, cache = model_and_cache(2)
    bound = cache.config.expected_max_tokens
    found = compacted_at(model, cache, token_ids(bound + 65))
    steps = {step - bound: layers for step, layers in enumerate(found) if layers}
    # Together once the bound is reached, then one after another, the last of them when it must be.
    groups = [[0, 1], [2, 3], [4, 5]]
    expected = {0: list(range(LAYERS))}
    expected |= {
        14 + 16 * n + place: group for n in range(4) for place, group in enumerate(groups) if 14 + 16 * n + place <= 64
    }
    assert steps == expected


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"enable_adaptive_controller": True, "controller_scope": "model"}])
def test_no_head_ever_holds_more_than_the_bound(settings):
    model, cache = model_and_cache(1, **settings)
    ids, most = token_ids(400), 0
    for start, stop in [(0, 30), (30, 100), *((at, at + 1) for at in range(100, 400))]:
        model(input_ids=ids[:, start:stop], past_key_values=cache)
        assert all(row.length <= row.capacity(cache.config) for own in cache.stream.stacks for row in own.rows)
        most = max(most, cache.held_tokens)
    assert 0.9 * cache.config.expected_max_tokens < most <= cache.config.expected_max_tokens


@torch.no_grad()
def test_more_stacks_than_steps_are_compacted_in_time_too():
    model, cache = model_and_cache(1, compression_interval=4)
    found = compacted_at(model, cache, token_ids(cache.config.expected_max_tokens + 40))
    later = found[cache.config.expected_max_tokens + 8 :]
    assert max(map(len, later)) == 2
    assert [sum(number in layers for layers in later) for number in range(LAYERS)] == [8] * LAYERS


@torch.no_grad()
def test_passes_of_several_tokens_are_compacted_as_before(monkeypatch):
    ids, found = token_ids(300), []
    for early in (True, False):
        model, cache = model_and_cache(2)
        if not early:
            monkeypatch.setattr("streaming_llm.stream.turns._early", lambda rows, config: [])
        found.append(stream(model, ids, cache, 7))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_row_s_turns_depend_on_no_other_row():
    model, cache = model_and_cache(2)
    rows = [token_ids(150, seed=1), token_ids(150, seed=2)]
    passes = [[40, 23], *([1, 1] for _ in range(90))]
    together = [logits for logits, _ in padded_passes(model, rows, passes, cache)]
    for number, first in ((0, 40), (1, 23)):
        _, alone = model_and_cache(2)
        sizes = [[first], *([1] for _ in range(90))]
        for own, (logits, _) in zip(together, padded_passes(model, [rows[number]], sizes, alone), strict=True):
            torch.testing.assert_close(own[number, -1], logits[0, -1], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_pass_that_fails_at_a_turn_has_never_been():
    model, cache = model_and_cache(2)
    stream(model, token_ids(cache.config.expected_max_tokens + 14), cache, 1)
    due = rows_due(cache.stream.stacks, (1,), cache.config)
    assert due == [{0}, set(), set()]
    other = copy.deepcopy(cache)
    hook = model.model.layers[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stopped")))
    with pytest.raises(KeyError):
        model(input_ids=token_ids(1), past_key_values=cache)
    hook.remove()
    ids = token_ids(40, seed=5)
    assert torch.equal(stream(model, ids, cache, 1), stream(model, ids, other, 1))


@torch.no_grad()
def test_the_newest_tokens_can_be_taken_back_between_two_turns():
    model, cache = model_and_cache(2)
    stream(model, token_ids(cache.config.expected_max_tokens + 16), cache, 1)
    assert len({stack.rows[0].length for stack in cache.stream.stacks}) > 1
    reach = cache.held_one_by_one
    cache.crop(-reach)
    assert cache.get_seq_length() == cache.config.expected_max_tokens + 16 - reach
    assert stream(model, token_ids(60, seed=3), cache, 1).isfinite().all()


@torch.no_grad()
def test_a_cache_that_recalls_is_compacted_at_once():
    model, cache = model_and_cache(2, enable_recall=True, recall_budget=4)
    found = compacted_at(model, cache, token_ids(cache.config.expected_max_tokens + 40))
    assert {len(layers) for layers in found} == {0, LAYERS}


def test_the_length_told_before_a_pass_is_that_of_its_turn():
    model, cache = model_and_cache(2)
    with torch.no_grad():
        stream(model, token_ids(cache.config.expected_max_tokens + 14), cache, 1)
    lengths = [layer.get_mask_sizes(1)[0] for layer in cache.layers]
    assert lengths[0] == lengths[1] == cache.config.expected_max_tokens - SIZES["compression_interval"] + 1
    assert min(lengths[2:]) > lengths[0]


@torch.no_grad()
def test_layers_of_a_model_that_is_not_enabled_are_compacted_by_themselves():
    model = tiny_model(4096, num_hidden_layers=LAYERS)
    cache = ADMSKVCache(ADMSConfig(**SIZES), model_config=model.config)
    for size in (45, 1, 7, 1, 1, 1, 20, 1, 1, *[1] * 40):
        assert model(input_ids=token_ids(size), past_key_values=cache).logits.isfinite().all()
    assert len({stack.rows[0].length for stack in cache.stream.stacks}) == 1
