"""Scores of tokens: attention of the queries, memory of it, norms, segments."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import random_queries, random_states
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_llm.data.queries import Queries
from streaming_llm.data.tokens import WeightedTokens
from streaming_llm.maths import importance as module
from streaming_llm.maths.importance import (
    attention_logits,
    attention_statistics,
    importance,
    less_drawn,
    remember,
    spread_over_segments,
)


def make(tokens: int, batch: int = 1, heads: int = 2, dim: int = 8, seed: int = 0) -> WeightedTokens:
    keys, values = random_states(tokens, batch, heads, dim, seed)
    return WeightedTokens.new(keys, values, torch.arange(tokens)[None, None])


def grouped(window: int, batch: int = 1, heads: int = 2, groups: int = 2, dim: int = 8, **kwargs) -> Queries:
    states = random_queries(window, batch, heads, groups, dim).view(batch, heads, groups, window, dim)
    return Queries(states, dim**-0.5, **kwargs)


def plain_statistics(queries: Queries, keys, beta):
    """Mean and mean square of the attention probabilities, one query at a time."""
    batch, heads, groups, window, _ = queries.states.shape
    tokens = keys.shape[2]
    mass, square = torch.zeros(batch, heads, tokens), torch.zeros(batch, heads, tokens)
    for row in range(batch):
        for head in range(heads):
            for group in range(groups):
                for place in range(window):
                    seen = tokens - (window - 1 - place) * queries.step
                    logits = keys[row, head, :seen] @ queries.states[row, head, group, place] * queries.scale
                    if queries.softcap:
                        logits = queries.softcap * torch.tanh(logits / queries.softcap)
                    p = (logits + beta[row, head, :seen]).softmax(-1)
                    mass[row, head, :seen] += p / (groups * window)
                    square[row, head, :seen] += p**2 / (groups * window)
    return mass, square


@given(
    tokens=st.integers(4, 30),
    window=st.integers(1, 4),
    batch=st.integers(1, 2),
    step=st.integers(1, 1),
    softcap=st.sampled_from([None, 0.7]),
    blocked=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_statistics_are_those_of_attention_taken_query_by_query(tokens, window, batch, step, softcap, blocked):
    states = make(tokens, batch)
    beta = torch.randn(batch, 2, tokens, generator=torch.Generator().manual_seed(3))
    beta[:, :, 1] = -math.inf
    queries = grouped(window, batch, softcap=softcap, step=step)
    with pytest.MonkeyPatch.context() as patch:
        if blocked:
            patch.setattr(module, "_BLOCK_ELEMENTS", 1)
        mass, square = attention_statistics(queries, states.keys, beta)
    expected_mass, expected_square = plain_statistics(queries, states.keys, beta)
    torch.testing.assert_close(mass, expected_mass, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(square, expected_square, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("blocked", [False, True])
def test_every_nth_query_sees_what_it_saw_among_all(step, blocked, monkeypatch):
    if blocked:
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1)
    states = make(20)
    queries = grouped(10)
    sparse = queries.every(step)
    assert torch.equal(sparse.states[:, :, :, -1], queries.states[:, :, :, -1])
    got = attention_statistics(sparse, states.keys, states.beta)
    for mine, expected in zip(got, plain_statistics(sparse, states.keys, states.beta), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-4)


def test_the_masses_of_all_tokens_sum_to_one():
    states = make(20)
    mass, square = attention_statistics(grouped(5), states.keys, states.beta)
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2))
    assert (square <= mass + 1e-7).all() and (square >= mass**2 - 1e-7).all()


def test_a_query_does_not_see_tokens_newer_than_its_own():
    states = make(10)
    logits = attention_logits(grouped(3), states.keys, states.beta)
    hidden = logits[0, 0, 0].isinf()
    assert hidden[0].tolist() == [False] * 8 + [True] * 2
    assert hidden[1].tolist() == [False] * 9 + [True]
    assert not hidden[2].any()


def test_the_newest_queries_are_taken():
    queries = grouped(6)
    assert torch.equal(queries.last(2).states, queries.states[:, :, :, 4:])
    assert queries.last(9) is queries


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.sampled_from([None, 5.0]), st.integers(0, 999))
def test_a_log_mass_less_by_what_is_told_draws_no_more_than_before(tokens, window, softcap, seed):
    queries, there = grouped(window, softcap=softcap), make(tokens, seed=seed)
    there.beta[..., : tokens // 3] = -torch.inf
    moved = there.keys + random_states(tokens, 1, 2, 8, seed + 1)[0]
    before = attention_logits(queries, there.keys, there.beta)
    after = attention_logits(queries, moved, there.beta)
    less = less_drawn(before, after)
    sums = before.exp().sum(-1, keepdim=True)
    drawn = [(logits.exp() / sums).sum((2, 3)) for logits in (before, after)]
    expected = torch.where(drawn[1] > drawn[0], (drawn[1] / drawn[0]).log(), 0.0)
    torch.testing.assert_close(less, torch.nan_to_num(expected), rtol=1e-3, atol=1e-4)
    assert (less_drawn(before, before) == 0).all()


def test_remember_keeps_a_decayed_score_and_takes_a_higher_one():
    tokens = make(2, heads=1)
    tokens.score[:] = torch.tensor([0.8, 0.1])
    square = torch.tensor([[[0.01, 0.25]]])
    remember(tokens, square.sqrt(), square, queries=128, window=128, decay=0.9)
    assert tokens.score[0, 0].tolist() == pytest.approx([0.8 * 0.9**2, 0.5])


def test_remember_decays_by_tokens_not_by_calls():
    once, often = make(3), make(3)
    nothing = torch.zeros(1, 2, 3)
    for tokens in (once, often):
        tokens.score[:] = 0.7
    remember(once, nothing, nothing, queries=64, window=10**6, decay=0.8)
    for _ in range(8):
        remember(often, nothing, nothing, queries=8, window=10**6, decay=0.8)
    torch.testing.assert_close(once.score, often.score)
    assert once.score[0, 0, 0].item() == pytest.approx(0.56)


def test_remember_averages_exponentially_over_about_the_window():
    tokens = make(1, heads=1)
    one = torch.ones(1, 1, 1)
    remember(tokens, one, one, queries=64, window=256, decay=0.9)
    assert tokens.mass.item() == pytest.approx(0.25)
    remember(tokens, one, one, queries=64, window=256, decay=0.9)
    assert tokens.mass.item() == pytest.approx(0.25 + 0.75 * 0.25)
    assert tokens.square.item() == pytest.approx(tokens.mass.item())
    remember(tokens, 0 * one, 0 * one, queries=300, window=256, decay=0.9)
    assert tokens.mass.item() == 0.0


def test_a_decay_of_zero_forgets_and_of_one_never_does():
    for decay, left in ((0.0, 0.0), (1.0, 0.5)):
        tokens = make(1, heads=1)
        tokens.score[:] = 0.5
        remember(tokens, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), queries=64, window=64, decay=decay)
        assert tokens.score.item() == pytest.approx(left)


def test_attention_importance_is_the_remembered_score():
    tokens = make(4)
    tokens.score[:] = torch.tensor([0.1, 0.9, 0.0, 0.3])
    assert torch.equal(importance(tokens, "attention", 1.0, True), tokens.score)


def test_value_norm_importance_is_the_length_of_the_value():
    tokens = make(2, heads=1, dim=2)
    tokens.values[0, 0] = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    for seen in (True, False):
        assert importance(tokens, "value_norm", 1.0, seen)[0, 0].tolist() == pytest.approx([5.0, 1.0])


def test_key_norm_importance_prefers_short_keys():
    tokens = make(2, heads=1, dim=2)
    tokens.keys[0, 0] = torch.tensor([[0.0, 0.5], [3.0, 4.0]])
    for seen in (True, False):
        assert importance(tokens, "key_norm", 1.0, seen)[0, 0].tolist() == pytest.approx([2.0, 0.2])


def test_mixed_importance_is_score_times_value_norm():
    tokens = make(3, heads=1, dim=2)
    tokens.values[0, 0] = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    tokens.score[:] = torch.tensor([0.1, 0.9, 0.9])
    assert importance(tokens, "mixed", 1.0, True)[0, 0].tolist() == pytest.approx([0.5, 0.9, 0.0])


def test_the_blend_mixes_the_shares_of_score_and_value_norm_of_valid_tokens():
    tokens = make(3, heads=1, dim=2)
    tokens.values[0, 0] = torch.tensor([[3.0, 0.0], [1.0, 0.0], [50.0, 0.0]])
    tokens.score[:] = torch.tensor([0.2, 0.6, 5.0])
    tokens = tokens.where_valid(torch.tensor([[[True, True, False]]]))
    got = importance(tokens, "attention", 0.25, True)[0, 0, :2].tolist()
    assert got == pytest.approx([0.25 * 0.25 + 0.75 * 0.75, 0.25 * 0.75 + 0.75 * 0.25])


@pytest.mark.parametrize("metric", ["attention", "mixed"])
def test_without_queries_the_key_that_differs_most_matters_most(metric):
    tokens = make(5, heads=1, dim=2)
    tokens.keys[0, 0] = torch.tensor([[1.0, 0.0], [2.0, 0.1], [1.0, 0.1], [-1.0, 0.0], [1.0, 1.0]])
    got = importance(tokens, metric, 1.0, False)[0, 0]
    assert got.argmax().item() == 3
    assert got[3].item() == pytest.approx(2.0, abs=0.1) and got.min() >= 0


def test_coverage_takes_the_best_of_every_segment():
    score = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 0.5])[None, None]
    valid = torch.ones(1, 1, 8, dtype=torch.bool)
    pos = torch.arange(8.0)[None, None]
    spread = spread_over_segments(score, valid, pos, wanted=4, segments=4, share=1.0)
    assert sorted(spread[0, 0].topk(4).indices.tolist()) == [0, 2, 5, 6]


def test_coverage_leaves_the_rest_to_the_score():
    score = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 0.5])[None, None]
    valid = torch.ones(1, 1, 8, dtype=torch.bool)
    pos = torch.arange(8.0)[None, None]
    spread = spread_over_segments(score, valid, pos, wanted=4, segments=2, share=0.5)
    assert sorted(spread[0, 0].topk(4).indices.tolist()) == [0, 1, 2, 6]


def test_no_coverage_leaves_the_scores_as_they_are():
    score = torch.rand(1, 2, 8)
    valid, pos = torch.ones(1, 2, 8, dtype=torch.bool), torch.arange(8.0).expand(1, 2, 8)
    assert spread_over_segments(score, valid, pos, 4, 4, 0.0) is score


def test_segments_are_stretches_of_position_and_ignore_unused_slots():
    score = torch.tensor([5.0, 4.0, 3.0, 99.0, 1.0])[None, None]
    valid = torch.tensor([True, True, True, False, True])[None, None]
    pos = torch.tensor([0.0, 1.0, 2.0, 1000.0, 100.0])[None, None]
    spread = spread_over_segments(score, valid, pos, wanted=2, segments=2, share=1.0)
    best = spread.masked_fill(~valid, -math.inf)[0, 0].topk(2).indices.tolist()
    assert sorted(best) == [0, 4]


@given(wanted=st.integers(0, 20), segments=st.integers(1, 6), share=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_no_more_is_reserved_than_wanted(wanted, segments, share):
    score = torch.rand(1, 2, 15, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 2, 15, dtype=torch.bool)
    spread = spread_over_segments(score, valid, torch.arange(15.0).expand(1, 2, 15), wanted, segments, share)
    lifted = (spread > score).sum(-1)
    assert (lifted <= max(0, round(share * wanted))).all()
