"""Budgets shared between heads: whole tokens, within limits, the total kept."""

from __future__ import annotations

import pytest
import torch
from conftest import random_states
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_llm.maths.budgets import middle_variance, share_budget


@given(
    weight=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=16),
    base=st.integers(0, 500),
    floor=st.floats(0, 1),
    cap=st.floats(1, 4),
)
@settings(deadline=None, max_examples=200)
def test_the_total_is_kept_and_every_head_is_within_its_limits(weight, base, floor, cap):
    low, high = int(base * floor), max(base, int(base * cap))
    budget = share_budget(torch.tensor(weight), base, low, high)
    assert budget.dtype == torch.int64 and budget.shape == (len(weight),)
    assert int(budget.sum()) == base * len(weight)
    assert int(budget.min()) >= low and int(budget.max()) <= high


@given(weight=st.lists(st.floats(0, 1e3, width=32), min_size=2, max_size=10), base=st.integers(1, 200))
@settings(deadline=None, max_examples=100)
def test_a_heavier_head_never_gets_less(weight, base):
    weight = sorted(weight)
    budget = share_budget(torch.tensor(weight), base, base // 2, 3 * base).tolist()
    assert all(later >= earlier - 1 for earlier, later in zip(budget, budget[1:], strict=False))


def test_equal_weights_give_the_base_to_everyone():
    assert share_budget(torch.full((2, 5), 0.3), 37, 10, 90).tolist() == [[37] * 5] * 2
    assert share_budget(torch.zeros(4), 8, 2, 20).tolist() == [8] * 4


def test_shares_are_in_proportion_where_no_limit_is_met():
    assert share_budget(torch.tensor([1.0, 2.0, 3.0]), 20, 0, 60).tolist() == [10, 20, 30]


def test_what_a_limit_takes_from_one_head_goes_to_the_others():
    assert share_budget(torch.tensor([100.0, 1.0, 1.0]), 20, 0, 30).tolist() == [30, 15, 15]
    assert share_budget(torch.tensor([0.0, 1.0, 1.0]), 20, 10, 60).tolist() == [10, 25, 25]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_no_number_breaks_nothing(bad):
    budget = share_budget(torch.tensor([1.0, bad, 1.0]), 20, 10, 50)
    assert int(budget.sum()) == 60 and int(budget.min()) >= 10 and int(budget.max()) <= 50


def test_rows_are_shared_apart():
    weight = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    assert share_budget(weight, 20, 0, 40).tolist() == [[10, 30], [30, 10]]


def test_equal_tokens_have_no_variance_and_opposite_ones_all():
    ones = torch.ones(1, 1, 6, 4)
    valid = torch.ones(1, 1, 6, dtype=torch.bool)
    assert middle_variance(ones, ones, valid).item() == pytest.approx(0.0, abs=1e-6)
    signs = torch.tensor([1.0, -1.0] * 3)[None, None, :, None] * ones
    assert middle_variance(signs, signs, valid).item() == pytest.approx(1.0, abs=1e-6)
    assert middle_variance(signs, ones, valid).item() == pytest.approx(0.5, abs=1e-6)


def test_variance_is_the_textbook_one_over_the_valid_tokens():
    keys, values = random_states(9, batch=2, heads=3)
    valid = torch.ones(2, 3, 9, dtype=torch.bool)
    valid[1, 2, 4:] = False
    got = middle_variance(keys, values, valid)
    for row, head, count in ((0, 0, 9), (1, 2, 4)):
        expected = 0.0
        for states in (keys[row, head, :count], values[row, head, :count]):
            expected += float(states.var(0, unbiased=False).sum() / states.square().mean(0).sum()) / 2
        assert got[row, head].item() == pytest.approx(expected, rel=1e-5)


def test_no_valid_token_has_no_variance():
    keys, values = random_states(3)
    assert middle_variance(keys, values, torch.zeros(1, 2, 3, dtype=torch.bool)).eq(0).all()
