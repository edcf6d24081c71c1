"""RoPE alignment calibration (ADM++): where the tokens that stand for others are put, so that they fit the true positions.

Anchors pair the position the cache's own count assumes for a recent token with its true position. A ridge regression per KV
head, `true ~ a * synthetic + b`, tells how far the two have drifted apart; made tokens are moved by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import ANCHOR_MODES
from ..data.autograd import unrecorded
from ..data.state import HeadState, HeadView

MIN_ANCHORS = 10
# How much of the fitted position goes into the calibrated one; the rest is the position as it was.
BLEND = 0.7


@dataclass
class CalibrationState(HeadState):
    """The anchors of each KV head and its last fit, changed in place.

    Attributes:
        synthetic: positions by the cache's count, float32 `[batch, kv_heads, window]`, the newest last.
        true: the positions they really had, as `synthetic`.
        filled: how many anchors are there, int64 `[batch, kv_heads]`; they are the last ones.
        offsets: `[a, b]` of the last fit, float32 `[batch, kv_heads, 2]`; `[1, 0]` until then.
        fitted: whether that fit was made from at least 10 anchors, bool `[batch, kv_heads]`.
    """

    synthetic: torch.Tensor
    true: torch.Tensor
    filled: torch.Tensor
    offsets: torch.Tensor
    fitted: torch.Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, window: int, device: torch.device | str | None = None) -> CalibrationState:
        """Room for `window` anchors a head, none there yet."""
        offsets = torch.zeros(batch, heads, 2, dtype=torch.float32, device=device)
        offsets[..., 0] = 1
        return cls(
            synthetic=torch.zeros(batch, heads, window, dtype=torch.float32, device=device),
            true=torch.zeros(batch, heads, window, dtype=torch.float32, device=device),
            filled=torch.zeros(batch, heads, dtype=torch.int64, device=device),
            offsets=offsets,
            fitted=torch.zeros(batch, heads, dtype=torch.bool, device=device),
        )

    @property
    def valid(self) -> torch.Tensor:
        """Which slots hold an anchor, bool `[batch, kv_heads, window]`."""
        window = self.synthetic.shape[-1]
        return torch.arange(window, device=self.filled.device) >= window - self.filled[..., None]


@unrecorded()
def update_anchors(
    state: CalibrationState, synthetic: torch.Tensor, true: torch.Tensor, real: torch.Tensor | None = None
) -> None:
    """Add pairs of positions to the anchors of each head, in place; the newest `window` of them stay.

    Args:
        state: anchors `[batch, kv_heads, window]`.
        synthetic: positions by the cache's count, `[batch or 1, kv_heads or 1, n]`, oldest first; n may exceed the window.
        true: the positions they really have, as `synthetic`.
        real: which are no padding, bool, as `synthetic`; None when all are. Pads and pairs with NaN or infinity are skipped.

    Raises:
        ValueError: shapes that do not fit the state or each other; nothing has changed.
    """
    batch, heads, window = state.synthetic.shape
    given = {"synthetic": synthetic, "true": true} | ({} if real is None else {"real": real})
    for name, tensor in given.items():
        fits = tensor.dim() == 3 and tensor.shape[0] in (1, batch) and tensor.shape[1] in (1, heads)
        if not fits or tensor.shape[2] != synthetic.shape[2]:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} must be [{batch} or 1, {heads} or 1, n], with the same n for all; "
                f"synthetic is {tuple(synthetic.shape)}"
            )
    synthetic, true = (tensor.to(state.synthetic) for tensor in (synthetic, true))
    valid = synthetic.isfinite() & true.isfinite()
    if real is not None:
        valid = valid & real.to(device=valid.device, dtype=torch.bool)
    valid, synthetic, true = torch.broadcast_tensors(valid, synthetic, true)
    if valid.shape[-1] > window:
        # A long prefill is cut down to the window before it is repeated for every head.
        valid, synthetic, true = _newest(window, valid, synthetic, true)
    shape = (batch, heads, valid.shape[-1])
    valid, synthetic, true = _newest(
        window,
        torch.cat([state.valid, valid.expand(shape)], dim=-1),
        torch.cat([state.synthetic, synthetic.expand(shape)], dim=-1),
        torch.cat([state.true, true.expand(shape)], dim=-1),
    )
    state.synthetic.copy_(synthetic)
    state.true.copy_(true)
    state.filled.copy_(valid.sum(-1))


def _newest(count: int, valid: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The last `count` valid entries of each head in their order, at the end, zeros before them; `valid` first."""
    # Not every device sorts bools.
    index = valid.to(torch.uint8).argsort(dim=-1, stable=True)[..., -count:]
    valid = valid.gather(-1, index)
    return valid, *(tensor.gather(-1, index).masked_fill(~valid, 0) for tensor in tensors)


@dataclass
class _Fit:
    """`true = synthetic + shift + slope * (synthetic - centre)`, each float64 `[batch, kv_heads, 1]`.

    Centred, because `a * p + b` of positions in the millions is the small difference of two large numbers.
    """

    centre: torch.Tensor
    shift: torch.Tensor
    slope: torch.Tensor

    def drift(self, positions: torch.Tensor) -> torch.Tensor:
        """How far from the truth float64 `positions [batch, kv_heads, tokens]` are by this fit."""
        return self.shift + self.slope * (positions - self.centre)

    @property
    def offsets(self) -> torch.Tensor:
        """`[a, b]` of `true = a * synthetic + b`, float64 `[batch, kv_heads, 2]`."""
        return torch.cat([1 + self.slope, self.shift - self.slope * self.centre], dim=-1)


def _fit(state: CalibrationState, regularization: float) -> _Fit:
    if not (math.isfinite(regularization) and regularization >= 0):
        raise ValueError(f"regularization={regularization!r} must be a finite number, at least 0")
    valid = state.valid
    synthetic = state.synthetic.double() * valid
    drift = (state.true.double() - synthetic) * valid
    count = state.filled[..., None].clamp_min(1)
    centre = synthetic.sum(-1, keepdim=True) / count
    shift = drift.sum(-1, keepdim=True) / count
    spread = (synthetic - centre) * valid
    variance = spread.square().sum(-1, keepdim=True)
    # (cov + r * var) / (var + r * var) is 1 + cov(synthetic, drift) / (var + r * var): exactly 1 where nothing drifted.
    covariance = (spread * (drift - shift)).sum(-1, keepdim=True)
    slope = covariance / torch.where(variance > 0, variance * (1 + regularization), 1.0)
    enough = state.filled[..., None] >= MIN_ANCHORS
    return _Fit(centre, torch.where(enough, shift, 0.0), torch.where(enough, slope, 0.0))


@unrecorded()
def fit_positions(state: CalibrationState, regularization: float) -> torch.Tensor:
    """Ridge regression `true ~ a * synthetic + b` of each head's anchors, pulled towards the identity (`a` = 1).

    `a = (cov + r * var) / (var + r * var)` with `r = regularization`, which so has no unit; `b` makes the means fit. Where
    all synthetic positions are equal `a` is 1; a head with fewer than 10 anchors gets `[1, 0]`.

    Returns:
        float64 `[batch, kv_heads, 2]`: in float32 `a * p + b` would be wrong by whole positions after a million tokens.

    Raises:
        ValueError: `regularization` is negative or not finite.
    """
    return _fit(state, regularization).offsets


@unrecorded()
def update_fit(state: CalibrationState, regularization: float) -> _Fit:
    """Fit the anchors again; `state.offsets` and `state.fitted` say so, in place. See `fit_positions`."""
    fit = _fit(state, regularization)
    state.offsets.copy_(fit.offsets)
    state.fitted.copy_(state.filled >= MIN_ANCHORS)
    return fit


@unrecorded()
def calibrate(
    state: CalibrationState,
    positions: torch.Tensor,
    low: torch.Tensor | float,
    high: torch.Tensor | float,
    regularization: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move made tokens to where the anchors say they belong: `0.7 * (a * p + b) + 0.3 * p`, within limits and in order.

    The fit is kept in `state.offsets`, in place.

    Args:
        state: anchors of `[batch, kv_heads]` heads.
        positions: of the made tokens in the order of the stream, `[batch, kv_heads, tokens]`.
        low, high: limits, numbers or tensors `[batch or 1, kv_heads or 1, 1]`; where `low > high`, `low` is the position.
        regularization: of `fit_positions`.
        valid: which slots hold a token, bool, as `positions`; None for all.

    Returns:
        As `positions` in shape and dtype (float32 for whole numbers), worked out in float64, never falling over a head's
        valid slots. Slots that are not valid, positions that are not finite and heads with fewer than 10 anchors keep what
        they had.

    Raises:
        ValueError: `regularization` is negative or not finite, or `positions` are not of the state's heads; nothing has
            changed.
    """
    if positions.dim() != 3 or positions.shape[:2] != state.filled.shape:
        raise ValueError(
            f"positions of shape {tuple(positions.shape)} must be [batch, kv_heads, tokens], "
            f"with (batch, kv_heads)={tuple(state.filled.shape)}"
        )
    if not positions.is_floating_point():
        positions = positions.float()
    fit = update_fit(state, regularization)
    old = positions.double()
    moved = (old + BLEND * fit.drift(old)).clamp(max=high).clamp(min=low)
    usable = positions.isfinite() if valid is None else positions.isfinite() & valid
    moved = _sorted(moved, usable).to(positions.dtype)
    return torch.where(usable & state.fitted[..., None], moved, positions)


def _ranks(valid: torch.Tensor) -> torch.Tensor:
    """How many valid slots of its head come before each valid slot, int64 as `valid`."""
    return (valid.cumsum(-1) - 1).clamp_min(0)


def _sorted(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The valid values of each head in rising order over its valid slots; what is in the others has no meaning."""
    return values.masked_fill(~valid, torch.inf).sort(dim=-1).values.gather(-1, _ranks(valid))


@unrecorded()
def anchor_positions(mean: torch.Tensor, mode: str, seed: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Positions of tokens made from several, by `anchor_mode`.

    Args:
        mean: mean position, weighted by mass, of the tokens each made token stands for, `[batch, kv_heads, tokens]`.
        mode: `mean`: those. `grid`: evenly from a head's smallest to its largest mean position, in the order of the slots.
            `hybrid`: half way between both, moved by up to an eighth of the grid's step, in rising order.
        seed: of what `hybrid` draws; every head and row gets the same draw, so that it matters to none which it is.
        valid: which slots hold a token, bool, as `mean`; None for all.

    Returns:
        As `mean` in shape and dtype (float32 for whole numbers). Slots that are not valid and positions that are not finite
        keep what they had.

    Raises:
        ValueError: an unknown `mode`.
    """
    if mode not in ANCHOR_MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(ANCHOR_MODES)}")
    if not mean.is_floating_point():
        mean = mean.float()
    tokens = mean.shape[-1]
    if mode == "mean" or tokens == 0:
        return mean
    usable = mean.isfinite() if valid is None else mean.isfinite() & valid
    centre = mean.double()
    low = centre.masked_fill(~usable, torch.inf).amin(-1, keepdim=True)
    high = centre.masked_fill(~usable, -torch.inf).amax(-1, keepdim=True)
    rank = _ranks(usable)
    step = (high - low) / (usable.sum(-1, keepdim=True) - 1).clamp_min(1)
    placed = low + step * rank
    if mode == "hybrid":
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(tokens, generator=generator, dtype=torch.float64).to(mean.device)
        # Drawn for the first, second, ... token, not for a slot: unused slots then make no difference.
        placed = (placed + centre) / 2 + (draw[rank] - 0.5) * step / 4
        placed = _sorted(placed.clamp(min=low, max=high), usable)
    return torch.where(usable, placed.to(mean.dtype), mean)


class CalibrationMixin:
    """The documented calibration methods of the cache, for one head of row 0, and the views of what it remembers."""

    def _update_calibration_anchors(
        self, layer_idx: int, head_idx: int, recent_positions: torch.Tensor | Sequence[float]
    ) -> None:
        """Pair the true positions of the newest tokens with those the cache counts: the last before `current_length`.

        Args:
            recent_positions: `[n]`, the newest token last; NaN and infinity are skipped.

        Raises:
            TypeError, ValueError: not a 1-D tensor or list of numbers, or no such head; nothing has changed.
        """
        true = _one_head("recent_positions", recent_positions)
        state: CalibrationState = self._head_state("calibration", layer_idx, head_idx)
        count = torch.arange(self.current_length - len(true), self.current_length, device=true.device)
        update_anchors(state, count[None, None], true[None, None])

    def _calibrate_synthetic_positions(
        self,
        layer_idx: int,
        head_idx: int,
        synthetic_positions: torch.Tensor | Sequence[float],
        compressed_keys: torch.Tensor,
    ) -> torch.Tensor:
        """The positions of made tokens, moved by what the head's anchors tell; see `calibrate`.

        Args:
            synthetic_positions: `[tokens]`, in the order of the stream.
            compressed_keys: the keys they belong to, `[tokens, head_dim]`; only their number matters.

        Returns:
            `[tokens]`, rising, within `[start_size, current_length - recent_size]` (`start_size` where that is nothing), in
            the dtype given (float32 for whole numbers). With fewer than 10 anchors: what was given.

        Raises:
            TypeError, ValueError: not a 1-D tensor or list of numbers, another number of keys, or no such head; nothing has
                changed.
        """
        positions = _one_head("synthetic_positions", synthetic_positions)
        if not isinstance(compressed_keys, torch.Tensor):
            raise TypeError(f"compressed_keys must be a tensor [tokens, head_dim], not {type(compressed_keys).__name__}")
        if compressed_keys.dim() == 0 or len(compressed_keys) != len(positions):
            raise ValueError(
                f"compressed_keys of shape {tuple(compressed_keys.shape)} must have as many rows as there are "
                f"synthetic_positions: {len(positions)}"
            )
        state: CalibrationState = self._head_state("calibration", layer_idx, head_idx)
        if len(positions) == 0 or int(state.filled) < MIN_ANCHORS:
            return positions
        low, high = self.start_size, self.current_length - self.recent_size
        given = positions.to(state.filled.device)[None, None]
        moved = calibrate(state, given, low, high, self.config.calibration_regularization)
        self._count_by_hand("calibrations", 1)
        return moved[0, 0].to(positions.device)

    @property
    def calibration_anchors(self) -> HeadView:
        """Anchors by `(layer, head)`: float32 `[n, 2]`, the position by the count and the true one, the newest last."""

        def read(layer: int, row: int, head: int) -> torch.Tensor | None:
            state: CalibrationState | None = self._peek_state("calibration", layer, row, head)
            if state is None or not bool(state.filled.any()):
                return None
            return torch.stack([state.synthetic, state.true], dim=-1)[state.valid]

        return HeadView("calibration_anchors", self._state_heads("calibration"), read)

    @property
    def calibration_offsets(self) -> HeadView:
        """The last fit by `(layer, head)`, once there was one: `[a, b]` of `true = a * synthetic + b`, float32."""

        def read(layer: int, row: int, head: int) -> torch.Tensor | None:
            state: CalibrationState | None = self._peek_state("calibration", layer, row, head)
            if state is None or not bool(state.fitted):
                return None
            return state.offsets[0, 0].clone()

        return HeadView("calibration_offsets", self._state_heads("calibration"), read)


def _one_head(name: str, positions: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """`positions` as a tensor `[n]`; raises `TypeError` or `ValueError` naming the argument for anything else."""
    if not isinstance(positions, torch.Tensor):
        try:
            positions = torch.as_tensor(positions)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}={positions!r} must be a 1-D tensor or a list of numbers") from None
    if positions.dtype == torch.bool or positions.is_complex():
        raise TypeError(f"{name} of dtype {positions.dtype} must hold whole or real numbers")
    if positions.dim() != 1:
        raise ValueError(f"{name} of shape {tuple(positions.shape)} must be 1-D, one position a token")
    return positions
