"""RoPE alignment calibration: anchors, fit, calibrated positions, positions of made tokens, and the methods by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_llm import ADMSConfig
from streaming_llm.compaction.calibration import (
    CalibrationMixin,
    CalibrationState,
    anchor_positions,
    calibrate,
    fit_positions,
    update_anchors,
)
from streaming_llm.data.state import HeadState, HeadView


class HandCache(CalibrationMixin):
    """What the mixin needs of a cache, and nothing more: 2 layers of 3 heads."""

    start_size, recent_size = 4, 64

    def __init__(self, current_length: int = 1000, **settings):
        self.config = ADMSConfig(**settings)
        self.current_length = current_length
        self.states = [CalibrationState.empty(2, 3, self.config.calibration_window) for _ in range(2)]
        self.counted = 0

    def _head_state(self, name: str, layer: int, head: int) -> HeadState:
        if not (0 <= layer < 2 and 0 <= head < 3):
            raise ValueError(f"layer_idx={layer}, head_idx={head} must be below 2 and 3")
        return self.states[layer].part(0, head)

    def _peek_state(self, name: str, layer: int, row: int, head: int) -> HeadState | None:
        return self.states[layer].part(row, head)

    def _state_heads(self, name: str):
        return lambda: [(0, 3), (1, 3)]

    def _count_by_hand(self, name: str, number: int) -> None:
        assert name == "calibrations"
        self.counted += number


def jump(count: torch.Tensor) -> torch.Tensor:
    return count + 300.0 * (count >= 700)


DRIFTS = {
    "a drift of a tenth": lambda count: 1.1 * count + 7,
    "a stride of two": lambda count: 2.0 * count,
    "padding": lambda count: count + 150.0,
    "a jump": jump,
}
drifting = pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS.keys())


def state_of(synthetic: torch.Tensor, true: torch.Tensor, window: int = 512, batch: int = 1, heads: int = 1):
    state = CalibrationState.empty(batch, heads, window)
    update_anchors(state, torch.as_tensor(synthetic).expand(1, 1, -1), torch.as_tensor(true).expand(1, 1, -1))
    return state


def random_state(batch: int = 2, heads: int = 3, count: int = 40, seed: int = 0) -> CalibrationState:
    """Anchors with another drift for every head and row."""
    generator = torch.Generator().manual_seed(seed)
    state = CalibrationState.empty(batch, heads, 64)
    synthetic = torch.arange(500.0, 500 + count).expand(batch, heads, count)
    slope = 0.5 + torch.rand(batch, heads, 1, generator=generator)
    noise = torch.randn(batch, heads, count, generator=generator)
    update_anchors(state, synthetic, slope * synthetic + 30 * slope + noise)
    return state


# Anchors


def test_the_window_slides_and_keeps_the_newest_pairs_in_order():
    state = CalibrationState.empty(2, 3, 5)
    for start in range(0, 9, 3):
        count = torch.arange(start, start + 3.0).expand(1, 1, 3)
        update_anchors(state, count, count + 100)
    assert state.synthetic.tolist() == [[[4, 5, 6, 7, 8]] * 3] * 2
    assert state.true.tolist() == [[[104, 105, 106, 107, 108]] * 3] * 2
    assert state.filled.tolist() == [[5] * 3] * 2


@given(
    window=st.integers(1, 7),
    passes=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), max_size=5),
)
@settings(deadline=None, max_examples=150)
def test_the_anchors_are_the_last_real_finite_pairs_of_each_row(window, passes):
    state = CalibrationState.empty(2, 2, window)
    expected: list[list[float]] = [[], []]
    at = 0
    for real in passes:
        count = torch.arange(at, at + len(real), dtype=torch.int64)
        at += len(real)
        flags = torch.tensor(real, dtype=torch.bool).reshape(-1, 2).T[:, None]
        update_anchors(state, count[None, None], count[None, None] * 2, flags)
        for row in range(2):
            expected[row] = (expected[row] + [float(c) for c, f in zip(count, flags[row, 0], strict=True) if f])[-window:]
    for row in range(2):
        for head in range(2):
            assert int(state.filled[row, head]) == len(expected[row])
            held = state.synthetic[row, head, window - len(expected[row]) :]
            assert held.tolist() == expected[row]
            assert torch.equal(state.true[row, head], 2 * state.synthetic[row, head])


def test_pairs_with_nan_or_infinity_never_become_anchors():
    state = CalibrationState.empty(1, 2, 4)
    synthetic = torch.tensor([[[1.0, math.nan, 3.0, 4.0, 5.0]]])
    true = torch.tensor([[[1.0, 2.0, math.inf, 4.0, 5.0]], [[1.0, 2.0, 3.0, 4.0, 5.0]]]).transpose(0, 1)
    update_anchors(state, synthetic, true)
    assert state.filled.tolist() == [[3, 4]]
    assert state.synthetic.tolist() == [[[0, 1, 4, 5], [1, 3, 4, 5]]]
    assert state.true.isfinite().all()


def test_anchors_of_one_head_are_written_through_its_part():
    state = CalibrationState.empty(2, 3, 16)
    count = torch.arange(12.0)[None, None]
    update_anchors(state.part(0, 1), count, count)
    assert state.filled.tolist() == [[0, 12, 0], [0, 0, 0]]
    assert state.synthetic[0, 1, -1] == 11


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("synthetic", {"synthetic": torch.zeros(2, 2, 4)}),
        ("synthetic", {"synthetic": torch.zeros(4)}),
        ("true", {"true": torch.zeros(1, 1, 5)}),
        ("real", {"real": torch.ones(3, 1, 4, dtype=torch.bool)}),
    ],
)
def test_pairs_that_do_not_fit_are_refused_by_name_and_change_nothing(name, change):
    state = random_state()
    before = state.map(torch.clone).tensors()
    with pytest.raises(ValueError, match=f"^{name} of shape"):
        update_anchors(state, **({"synthetic": torch.zeros(1, 1, 4), "true": torch.zeros(1, 1, 4)} | change))
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())


# The fit


@pytest.mark.parametrize("regularization", [0.0, 0.1, 3.0])
def test_the_fit_is_the_ridge_regression_pulled_towards_the_identity(regularization):
    state = random_state()
    got = fit_positions(state, regularization).numpy()
    for row in range(2):
        for head in range(3):
            x, y = (t[row, head, -40:].double().numpy() for t in (state.synthetic, state.true))
            variance, covariance = x.var(), np.cov(x, y, bias=True)[0, 1]
            a = (covariance + regularization * variance) / (variance + regularization * variance)
            np.testing.assert_allclose(got[row, head], [a, y.mean() - a * x.mean()], rtol=1e-9)
    if regularization == 0:
        np.testing.assert_allclose(got[1, 2], np.polyfit(x, y, 1), rtol=1e-6)


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e6, 1e6))
@settings(deadline=None, max_examples=50)
def test_the_ridge_has_no_unit(scale, shift):
    count = torch.arange(60.0, dtype=torch.float64)
    plain = fit_positions(state_of(count, 1.5 * count), 0.1)[0, 0, 0]
    other = (count * scale + shift).float().double()
    if other.unique().numel() == 60 and scale > 1e-6 * abs(shift):
        got = fit_positions(state_of(other, other + 0.5 * (other - other[0])), 0.1)[0, 0, 0]
        assert float(got) == pytest.approx(float(plain), abs=2e-2 if abs(shift) > 1e3 * scale else 1e-4)


@pytest.mark.parametrize("position", [0.0, 0.1, 5_000_000.0])
def test_equal_synthetic_positions_give_the_mean_difference_alone(position):
    synthetic = torch.full((11,), position)
    state = state_of(synthetic, synthetic + torch.arange(11.0))
    a, b = fit_positions(state, 0.0)[0, 0].tolist()
    assert a == 1.0
    assert b == pytest.approx(5.0, abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_fewer_than_ten_anchors_give_no_fit_and_leave_the_positions_as_they_are(count):
    positions = torch.tensor([[[9.0, 3.0, 7000.0]]])
    synthetic = torch.arange(float(count))
    state = state_of(synthetic, 2 * synthetic + 5)
    assert fit_positions(state, 0.1).tolist() == [[[1, 0]]]
    assert torch.equal(calibrate(state, positions, 4, 100, 0.1), positions)
    assert not state.fitted.any()
    ten = state_of(torch.arange(10.0), 2 * torch.arange(10.0) + 5)
    assert not torch.equal(calibrate(ten, positions, 4, 100, 0.1), positions)
    assert ten.fitted.all()


@pytest.mark.parametrize("regularization", [-0.1, math.nan, math.inf])
def test_a_regularization_out_of_range_is_refused_and_changes_nothing(regularization):
    state = random_state()
    before = state.offsets.clone()
    with pytest.raises(ValueError, match="^regularization="):
        calibrate(state, torch.zeros(2, 3, 4), 0, 10, regularization)
    with pytest.raises(ValueError, match="^regularization="):
        fit_positions(state, regularization)
    assert torch.equal(state.offsets, before) and not state.fitted.any()


# Calibrated positions


@drifting
def test_the_position_error_of_made_tokens_falls_on_a_drifted_stream(drift):
    count = torch.arange(600.0, 1000.0)
    state = state_of(count, drift(count), batch=2, heads=3)
    positions = torch.linspace(500, 930, 40).expand(2, 3, 40)
    got = calibrate(state, positions, 0, 4000, 0.1)
    before, after = ((p - drift(positions)).abs().mean() for p in (positions, got))
    assert after < 0.75 * before
    assert torch.equal(got[0, 0], got[1, 2])


def test_a_constant_shift_is_corrected_by_the_blend_exactly():
    count = torch.arange(100.0)
    got = calibrate(state_of(count, count + 50), torch.tensor([[[10.0, 20.0]]]), 0, 1000, 0.1)
    assert got.tolist() == [[[45.0, 55.0]]]


@pytest.mark.parametrize("start", [0.0, 5_000_000.0])
def test_an_undrifted_stream_is_left_alone_to_the_bit(start):
    count = start + torch.arange(512.0)
    draw = torch.rand(1, 2, 50, generator=torch.Generator().manual_seed(1)).sort().values
    positions = start + 400 * draw - (300 if start else 0)
    got = calibrate(state_of(count, count, heads=2), positions, 0, start + 600, 0.1)
    assert torch.equal(got, positions)


def test_positions_of_five_millions_are_as_precise_as_float32_can_hold_them():
    start = 5_000_000
    count = torch.arange(start, start + 512)
    # A slope of 3 / 2, exact in float32.
    true = count + torch.div(count - start, 2, rounding_mode="floor") + 40
    positions = torch.tensor([[[start - 1000.0, start - 11.0, start + 100.0]]])
    got = calibrate(state_of(count, true), positions, 0, 2 * start, 0.0)
    x, y, p = count.double().numpy() - start, true.double().numpy() - start, positions[0, 0].double().numpy() - start
    a, b = np.polyfit(x, y, 1)
    expected = 0.7 * (a * p + b) + 0.3 * p
    np.testing.assert_allclose(got[0, 0].double().numpy() - start, expected, atol=0.26)
    assert fit_positions(state_of(count, true), 0.0)[0, 0, 0].item() == pytest.approx(a, abs=1e-9)


numbers = st.floats(-1e4, 1e7, width=32)


@given(
    positions=st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=20),
    anchors=st.lists(st.tuples(numbers, numbers), min_size=10, max_size=20),
    limits=st.tuples(st.integers(0, 1_000_000), st.integers(0, 1_000_000)),
)
@settings(deadline=None, max_examples=200)
def test_calibrated_positions_are_in_order_within_the_limits_and_touch_valid_slots_only(positions, anchors, limits):
    synthetic, true = torch.tensor(anchors).T
    state = state_of(synthetic, true)
    given_, valid = (torch.tensor([[column]]) for column in zip(*positions, strict=True))
    low, high = limits
    got = calibrate(state, given_, low, high, 0.1, valid)
    moved = got[valid]
    assert torch.equal(got[~valid], given_[~valid])
    assert (moved.diff() >= 0).all()
    assert (moved >= low).all() and (moved <= max(low, high)).all()
    # What is not valid has no say in where the others go.
    alone = calibrate(state, given_[valid][None, None], low, high, 0.1)
    assert torch.equal(alone.flatten(), moved)


def test_limits_may_differ_by_row_and_head():
    state = random_state()
    low = torch.tensor([[[0.0]], [[900.0]]])
    high = torch.tensor([[[100.0], [200.0], [300.0]]])
    got = calibrate(state, torch.full((2, 3, 4), 1e6), low, high, 0.1)
    assert got[0, :, 0].tolist() == [100, 200, 300]
    assert got[1].unique().tolist() == [900]


def test_heads_and_rows_have_no_influence_on_each_other():
    state = random_state()
    positions = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(2)) * 900
    expected = calibrate(state, positions, 4, 800, 0.1)
    assert expected.flatten(0, 1).unique(dim=0).shape[0] == 6
    swapped = state.map(lambda tensor: tensor[[1, 0]][:, [2, 0, 1]].clone())
    got = calibrate(swapped, positions[[1, 0]][:, [2, 0, 1]], 4, 800, 0.1)
    assert torch.equal(got, expected[[1, 0]][:, [2, 0, 1]])
    assert torch.equal(swapped.offsets, state.offsets[[1, 0]][:, [2, 0, 1]])
    alone = calibrate(state.part(1, 2), positions[1:, 2:], 4, 800, 0.1)
    assert torch.equal(alone, expected[1:, 2:])


def test_a_position_that_is_not_finite_stays_and_spoils_no_other():
    count = torch.arange(100.0)
    state = state_of(count, count + 50)
    positions = torch.tensor([[[10.0, math.nan, 20.0, math.inf]]])
    got = calibrate(state, positions, 0, 1000, 0.1)
    torch.testing.assert_close(got, torch.tensor([[[45.0, math.nan, 55.0, math.inf]]]), equal_nan=True)


def test_the_fit_is_kept_in_the_state_in_place():
    state = random_state()
    offsets = state.offsets
    calibrate(state, torch.zeros(2, 3, 0), 0, 10, 0.1)
    assert state.offsets is offsets and state.fitted.all()
    torch.testing.assert_close(offsets, fit_positions(state, 0.1).float())


def test_positions_of_other_heads_than_the_state_s_are_refused():
    with pytest.raises(ValueError, match="^positions of shape"):
        calibrate(random_state(), torch.zeros(2, 2, 4), 0, 10, 0.1)


# Positions of made tokens

MEANS = torch.tensor([[[10.0, 11.0, 12.0, 50.0], [3.0, 8.0, 9.0, 30.0]]])


def test_mean_anchors_are_the_mean_positions():
    assert torch.equal(anchor_positions(MEANS, "mean", 0), MEANS)


def test_grid_anchors_are_even_from_the_smallest_to_the_largest_mean():
    expected = torch.tensor([[[10.0, 70 / 3, 110 / 3, 50.0], [3.0, 12.0, 21.0, 30.0]]])
    torch.testing.assert_close(anchor_positions(MEANS, "grid", 0), expected)


@pytest.mark.parametrize("mode", ["grid", "hybrid"])
def test_a_made_token_that_is_alone_stays_at_its_mean(mode):
    assert anchor_positions(torch.tensor([[[7.5]]]), mode, 3).item() == 7.5
    valid = torch.tensor([[[False, True, False]]])
    assert anchor_positions(torch.tensor([[[1.0, 7.5, 99.0]]]), mode, 3, valid).tolist() == [[[1.0, 7.5, 99.0]]]


def test_hybrid_anchors_lie_within_an_eighth_of_a_step_of_the_average_of_mean_and_grid():
    grid = anchor_positions(MEANS, "grid", 0)
    step = (grid[..., -1:] - grid[..., :1]) / 3
    moves = []
    for seed in range(30):
        got = anchor_positions(MEANS, "hybrid", seed)
        away = (got - (grid + MEANS) / 2) / step
        assert (away.abs() <= 1 / 8 + 1e-6).all()
        moves.append(away[0, :, 1:3])
    spread = torch.stack(moves)
    assert spread.max() > 0.1 and spread.min() < -0.1


def test_hybrid_anchors_are_the_same_under_a_seed_and_differ_between_seeds():
    first = anchor_positions(MEANS, "hybrid", 5)
    torch.rand(3)
    assert torch.equal(first, anchor_positions(MEANS, "hybrid", 5))
    assert not torch.equal(first, anchor_positions(MEANS, "hybrid", 6))


def test_made_tokens_are_drawn_without_touching_the_global_generator():
    before = torch.get_rng_state()
    anchor_positions(MEANS, "hybrid", 5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["mean", "grid", "hybrid"])
def test_permuted_heads_get_permuted_anchors(mode):
    means = (torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(4)) * 100).sort().values
    order = [2, 0, 1]
    expected = anchor_positions(means, mode, 7)
    assert torch.equal(anchor_positions(means[[1, 0]][:, order], mode, 7), expected[[1, 0]][:, order])


@given(
    means=st.lists(st.tuples(st.floats(0, 1e7, width=32), st.booleans()), min_size=1, max_size=12),
    mode=st.sampled_from(["grid", "hybrid"]),
    seed=st.integers(0, 2**40),
)
@settings(deadline=None, max_examples=200)
def test_made_anchors_are_in_order_and_within_the_means_of_the_valid_tokens(means, mode, seed):
    given_, valid = (torch.tensor([[column]]) for column in zip(*means, strict=True))
    got = anchor_positions(given_, mode, seed, valid)
    placed = got[valid]
    assert got.dtype == torch.float32 and got.shape == given_.shape
    assert torch.equal(got[~valid], given_[~valid])
    if placed.numel():
        assert (placed.diff() >= 0).all()
        assert placed.min() >= given_[valid].min() and placed.max() <= given_[valid].max()


def test_a_mean_that_is_not_finite_stays_and_spoils_no_other():
    got = anchor_positions(torch.tensor([[[0.0, math.nan, 1.0, 8.0]]]), "grid", 0)
    torch.testing.assert_close(got, torch.tensor([[[0.0, math.nan, 4.0, 8.0]]]), equal_nan=True)


def test_no_made_tokens_and_whole_numbers_are_fine_and_an_unknown_mode_is_refused():
    assert anchor_positions(torch.zeros(2, 3, 0), "hybrid", 0).shape == (2, 3, 0)
    whole = anchor_positions(torch.tensor([[[0, 1, 5]]]), "grid", 0)
    assert whole.dtype == torch.float32 and whole.tolist() == [[[0, 2.5, 5]]]
    with pytest.raises(ValueError, match="^mode='even' must be one of mean, grid, hybrid"):
        anchor_positions(MEANS, "even", 0)


# By hand


@drifting
def test_by_hand_the_position_error_falls_on_a_drifted_stream(drift):
    cache = HandCache(1000)
    count = torch.arange(1000.0)
    cache._update_calibration_anchors(0, 1, drift(count[600:]))
    positions = torch.linspace(500, 900, 30)
    got = cache._calibrate_synthetic_positions(0, 1, positions, torch.zeros(30, 16))
    before, after = ((p - drift(positions)).abs().mean() for p in (positions, got))
    assert after < before
    assert got.min() >= 4 and got.max() <= 936 and (got.diff() >= 0).all()
    assert cache.counted == 1


def test_by_hand_an_undrifted_stream_is_left_alone():
    cache = HandCache(1000)
    cache._update_calibration_anchors(0, 0, list(range(900, 1000)))
    positions = torch.linspace(4, 936, 50)
    assert torch.equal(cache._calibrate_synthetic_positions(0, 0, positions, torch.zeros(50, 8)), positions)
    assert cache.calibration_offsets[(0, 0)].tolist() == [1, 0]


def test_by_hand_the_recent_positions_pair_with_the_last_of_the_count():
    cache = HandCache(50)
    cache._update_calibration_anchors(1, 2, [70.0, 71.0, math.nan, 75.0])
    assert list(cache.calibration_anchors) == [(1, 2)]
    anchors = cache.calibration_anchors[(1, 2)]
    assert anchors.dtype == torch.float32 and anchors.tolist() == [[46, 70], [47, 71], [49, 75]]
    assert isinstance(cache.calibration_anchors, HeadView)
    for missing in ((0, 0), (5, 0), (1, 3)):
        with pytest.raises(KeyError):
            cache.calibration_anchors[missing]


def test_by_hand_the_last_calibration_window_positions_are_kept():
    cache = HandCache(1000, calibration_window=16)
    cache._update_calibration_anchors(0, 0, torch.arange(980, 1000))
    cache.current_length = 1003
    cache._update_calibration_anchors(0, 0, torch.tensor([2000, 2001, 2002]))
    anchors = cache.calibration_anchors[(0, 0)]
    assert anchors[:, 0].tolist() == list(range(987, 1003))
    assert anchors[:, 1].tolist() == [*range(987, 1000), 2000, 2001, 2002]


def test_by_hand_fewer_than_ten_anchors_return_the_positions_and_count_nothing():
    cache = HandCache(1000)
    positions = torch.tensor([9, 3, 7000])
    assert torch.equal(cache._calibrate_synthetic_positions(0, 0, positions, torch.zeros(3, 8)), positions)
    cache._update_calibration_anchors(0, 0, torch.arange(9) + 2000)
    assert torch.equal(cache._calibrate_synthetic_positions(0, 0, positions, torch.zeros(3, 8)), positions)
    assert cache.counted == 0 and len(cache.calibration_offsets) == 0


def test_by_hand_offsets_are_shown_once_there_was_a_fit():
    cache = HandCache(1000)
    cache._update_calibration_anchors(0, 0, 2 * torch.arange(900, 1000))
    assert (0, 0) not in cache.calibration_offsets
    cache._calibrate_synthetic_positions(0, 0, torch.tensor([500.0]), torch.zeros(1, 8))
    a, b = cache.calibration_offsets[(0, 0)].tolist()
    assert a == pytest.approx(2.1 / 1.1, rel=1e-5)
    assert a * 949.5 + b == pytest.approx(1899, rel=1e-5)
    cache.calibration_offsets[(0, 0)].zero_()
    assert cache.calibration_offsets[(0, 0)][0] == pytest.approx(a)
    assert list(cache.calibration_offsets) == [(0, 0)] and list(cache.calibration_offsets.row(1)) == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_by_hand_the_result_has_the_dtype_given_or_float32_for_whole_numbers(dtype):
    cache = HandCache(1000)
    cache._update_calibration_anchors(0, 0, torch.arange(900, 1000) + 64)
    positions = torch.tensor([32, 64, 128], dtype=dtype)
    got = cache._calibrate_synthetic_positions(0, 0, positions, torch.zeros(3, 8))
    assert got.dtype == (torch.float32 if dtype == torch.int64 else dtype) and got.shape == (3,)
    torch.testing.assert_close(got.double(), torch.tensor([76.8, 108.8, 172.8]).double(), rtol=1e-2, atol=0)


def test_by_hand_a_stream_shorter_than_sinks_and_recent_window_puts_all_at_the_sinks():
    cache = HandCache(40)
    cache._update_calibration_anchors(0, 0, torch.arange(20, 40))
    got = cache._calibrate_synthetic_positions(0, 0, torch.tensor([10.0, 30.0]), torch.zeros(2, 8))
    assert got.tolist() == [4, 4]


def test_by_hand_nothing_in_gives_nothing_out():
    cache = HandCache(1000)
    cache._update_calibration_anchors(0, 0, [])
    assert (0, 0) not in cache.calibration_anchors
    cache._update_calibration_anchors(0, 0, torch.arange(100))
    assert cache._calibrate_synthetic_positions(0, 0, torch.zeros(0), torch.zeros(0, 8)).shape == (0,)
    assert cache.counted == 0


@pytest.mark.parametrize(
    ("error", "value"),
    [
        (TypeError, "12"),
        (TypeError, None),
        (TypeError, ["a"]),
        (TypeError, torch.tensor([True])),
        (TypeError, torch.ones(3, dtype=torch.complex64)),
        (ValueError, torch.zeros(2, 3)),
        (ValueError, 5),
    ],
)
def test_by_hand_positions_that_are_no_list_of_numbers_are_refused_by_name(error, value):
    cache = HandCache(1000)
    with pytest.raises(error, match="^recent_positions"):
        cache._update_calibration_anchors(0, 0, value)
    with pytest.raises(error, match="^synthetic_positions"):
        cache._calibrate_synthetic_positions(0, 0, value, torch.zeros(1, 8))
    assert not cache.states[0].filled.any()


def test_by_hand_keys_of_another_number_and_unknown_heads_are_refused():
    cache = HandCache(1000)
    cache._update_calibration_anchors(0, 0, torch.arange(100))
    with pytest.raises(ValueError, match="^compressed_keys of shape .* synthetic_positions: 3$"):
        cache._calibrate_synthetic_positions(0, 0, torch.zeros(3), torch.zeros(4, 8))
    with pytest.raises(TypeError, match="^compressed_keys must be a tensor"):
        cache._calibrate_synthetic_positions(0, 0, torch.zeros(3), [1, 2, 3])
    for layer, head in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="layer_idx"):
            cache._update_calibration_anchors(layer, head, torch.arange(3))
        with pytest.raises(ValueError, match="layer_idx"):
            cache._calibrate_synthetic_positions(layer, head, torch.zeros(3), torch.zeros(3, 8))
    assert cache.counted == 0 and not cache.states[0].fitted.any()
