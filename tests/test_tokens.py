"""`WeightedTokens` and the picking of slots."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import random_states
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_llm.data.select import add_tokens, gather_tokens, put_tokens, top_slots
from streaming_llm.data.tokens import CHANGED, RECENT, TIER_NAMES, UNUSED, WeightedTokens, concatenate, lightened


def make(tokens: int, batch: int = 2, heads: int = 3, dim: int = 4, seed: int = 0) -> WeightedTokens:
    keys, values = random_states(tokens, batch, heads, dim, seed)
    return WeightedTokens.new(keys, values, torch.arange(tokens)[None, None])


def same(left: WeightedTokens, right: WeightedTokens) -> bool:
    return all(torch.equal(tensor, right.tensors()[name]) for name, tensor in left.tensors().items())


def test_new_tokens_are_untouched_and_recent():
    tokens = make(5)
    assert tokens.valid.all() and tokens.length == 5
    assert tokens.beta.eq(0).all() and tokens.count.eq(1).all() and tokens.tier.eq(RECENT).all()
    assert tokens.pos[1, 2].tolist() == [0, 1, 2, 3, 4]
    assert tokens.beta.dtype == tokens.pos.dtype == tokens.score.dtype == torch.float32


def test_empty_slots_hold_nothing():
    tokens = make(5)
    empty = WeightedTokens.empty(tokens.keys.half(), tokens.values.half(), 7)
    assert empty.length == 7 and not empty.valid.any()
    assert empty.tier.eq(UNUSED).all() and empty.count.eq(0).all()
    assert empty.keys.shape == (2, 3, 7, 4) and empty.keys.dtype == torch.float16


def test_keys_and_values_may_differ_in_dimension():
    keys, values = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 6)
    tokens = WeightedTokens.new(keys, values, torch.arange(5)[None, None])
    index = torch.tensor([[[4, 0], [1, 1]]])
    picked = tokens.gather(index)
    assert torch.equal(picked.keys[0, 0, 0], keys[0, 0, 4]) and torch.equal(picked.values[0, 1, 1], values[0, 1, 1])
    assert WeightedTokens.empty(keys, values, 3).values.shape == (1, 2, 3, 6)


def test_a_slice_is_a_view_and_a_gather_is_a_copy():
    tokens = make(6)
    part = tokens.slice(2, 4)
    assert part.keys.data_ptr() == tokens.keys[:, :, 2:].data_ptr()
    picked = tokens.gather(torch.full((2, 3, 1), 2))
    picked.keys.zero_()
    picked.beta.fill_(9)
    assert same(tokens, make(6))


def test_writing_changes_only_those_slots():
    tokens, others = make(8).map(torch.clone), make(3, seed=1)
    others.beta.fill_(0.5)
    tokens.write(2, others)
    assert same(tokens.slice(2, 5), others)
    assert same(tokens.slice(0, 2), make(8).slice(0, 2)) and same(tokens.slice(5, 8), make(8).slice(5, 8))


def test_where_valid_leaves_the_original_as_it_was():
    tokens = make(4)
    keep = torch.tensor([True, False, True, True]).expand(2, 3, 4)
    masked = tokens.where_valid(keep)
    assert torch.equal(masked.valid, keep) and masked.count.sum(-1).eq(3).all()
    assert same(tokens, make(4))


def test_concatenated_parts_come_one_after_the_other():
    both = concatenate([make(3), make(2, seed=1)])
    assert same(both.slice(0, 3), make(3)) and same(both.slice(3, 5), make(2, seed=1))


def test_slots_behind_concatenated_parts_are_as_those_of_untouched_tokens():
    parts = [make(3), make(2, seed=1)]
    assert same(concatenate(parts, 7), concatenate(parts).widened(7))


def test_nbytes_counts_every_tensor():
    tokens = make(5)
    per_token = 2 * 4 * 4 + 6 * 4 + 1
    assert tokens.nbytes == 2 * 3 * 5 * per_token


def test_lighter_tokens_never_weigh_less_than_themselves_and_lose_mass_alike():
    tokens = make(6, batch=1, heads=1)
    tokens.beta.copy_(torch.tensor([-torch.inf, -1.0, 0.0, CHANGED, 0.5, 4.0]))
    tokens.mass.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    tokens.square.copy_(tokens.mass)
    before = tokens.map(torch.clone)
    lighter = lightened(tokens, lambda beta: beta - 2)
    assert same(tokens, before)
    tokens = lighter
    assert tokens.beta[0, 0].tolist() == pytest.approx([-math.inf, -1.0, 0.0, CHANGED, CHANGED, 2.0])
    assert tokens.mass[0, 0].tolist() == pytest.approx([0, 1, 1, 1, math.exp(-0.5), math.exp(-2)], rel=1e-5)
    assert tokens.square[0, 0].tolist() == pytest.approx([0, 1, 1, 1, math.exp(-1), math.exp(-4)], rel=1e-5)


def test_gather_tokens_picks_per_head():
    tensor = torch.arange(2 * 3 * 4).view(2, 3, 4)
    index = torch.tensor([3, 0]).expand(2, 3, 2)
    assert torch.equal(gather_tokens(tensor, index), tensor[:, :, [3, 0]])


LAYOUTS = {
    "whole": lambda states: states,
    "a part of a buffer": lambda states: states[:, :, 2:9],
    "one row": lambda states: states[1:2, :, 1:8],
    "one head": lambda states: states[:, 1:2, 1:8],
    "every second head": lambda states: states[:, ::2],
    "every second row and a head for all": lambda states: states[::2, :1].expand(-1, 3, -1, -1),
    "heads last": lambda states: states.transpose(1, 2).contiguous().transpose(1, 2),
    "a part of each state": lambda states: states[..., 1:4],
}


@pytest.mark.parametrize("part", LAYOUTS.values(), ids=LAYOUTS)
def test_tokens_are_picked_and_put_wherever_they_lie(part):
    states = part(torch.randn(3, 4, 10, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32))
    index = torch.rand(states.shape[:3], generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    index = index.argsort(-1)[..., :4]
    at = index[..., None].expand(*index.shape, states.shape[-1])
    assert torch.equal(gather_tokens(states, index), states.gather(2, at))
    if 0 not in states.stride():
        expected = states.scatter(2, at, 2.0)
        put_tokens(states, index, torch.full(at.shape, 2.0, dtype=torch.float32))
        assert torch.equal(states, expected)


def test_tokens_added_to_one_slot_all_count():
    index = torch.tensor([[[0, 0, 2], [1, 1, 1]]])
    sums = torch.zeros(1, 2, 3, 2)
    add_tokens(sums, index, torch.ones(1, 2, 3, 2))
    assert sums[..., 0].tolist() == [[[2, 0, 1], [0, 3, 0]]] and torch.equal(sums[..., 0], sums[..., 1])


def test_every_tier_has_a_name():
    assert sorted(TIER_NAMES.values()) == ["exact", "precision", "recent", "replay", "sink", "sketch"]


@given(data=st.data(), tokens=st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_top_slots_picks_the_best_valid_slots_within_the_budget(data, tokens):
    width = data.draw(st.integers(1, tokens))
    number = st.one_of(st.floats(-5, 5), st.just(math.inf), st.just(math.nan), st.just(-math.inf))
    priority = torch.tensor(data.draw(st.lists(number, min_size=tokens, max_size=tokens)))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    budget = data.draw(st.one_of(st.none(), st.integers(0, width)))
    limit = None if budget is None else torch.tensor([[budget]])
    index, picked = top_slots(priority[None, None], valid[None, None], width, limit)
    assert index.shape == picked.shape == (1, 1, width)
    assert index.unique().numel() == width
    chosen = index[0, 0][picked[0, 0]].tolist()
    most = width if budget is None else budget
    assert len(chosen) == min(most, int(valid.sum()))
    assert all(valid[slot] for slot in chosen)

    def rank(slot: int) -> float:
        value = float(priority[slot])
        return 0.0 if math.isnan(value) else max(-3e38, min(3e38, value))

    left_out = [slot for slot in range(tokens) if valid[slot] and slot not in chosen]
    assert not (chosen and left_out) or min(map(rank, chosen)) >= max(map(rank, left_out))
    assert [rank(slot) for slot in chosen] == sorted((rank(slot) for slot in chosen), reverse=True)


def test_top_slots_gives_each_head_its_own_budget():
    priority = torch.arange(6.0).expand(1, 3, 6)
    index, picked = top_slots(priority, torch.ones(1, 3, 6, dtype=torch.bool), 4, torch.tensor([[0, 2, 4]]))
    assert picked.sum(-1).tolist() == [[0, 2, 4]]
    assert index[0, 1][picked[0, 1]].tolist() == [5, 4]


def test_a_map_reaches_every_tensor():
    names = []
    make(3).map(lambda tensor: names.append(tensor.dtype) or tensor)
    assert len(names) == len(WeightedTokens.field_names()) == 9


@pytest.mark.parametrize("index", range(2))
def test_rows_do_not_share_memory_after_expand_in_new(index):
    tokens = make(4)
    tokens.score[index] += 1
    assert tokens.score[1 - index].eq(0).all()
