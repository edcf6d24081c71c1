"""Rotary positions of stored keys: rotate, unrotate, move and shift them (RoPE: Su et al., arXiv 2104.09864).

Nothing here knows a model: `model/rope_reading.py` reads one's frequencies, scaling and layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

Positions = torch.Tensor | float | int


@dataclass(frozen=True, eq=False, repr=False)
class Rope:
    """How one layer's keys depend on their position.

    Args:
        rope_type: transformers' name of the kind, or "none": a layer without RoPE, whose keys every method returns as given.
        inv_freq: radians a position, float32, `[rotary_dim / 2]`; negative where a family turns the other way. The
            frequencies the model uses at lengths up to `stable_length`.
        attention_scaling: factor on a rotated key's rotary part (YaRN, LongRoPE). A stored key carries it once, so
            `move` and `shift` leave it alone and `unrotate` divides it out.
        interleaved: pairs are dimensions (2i, 2i + 1) (Cohere, GLM, Ernie, Helium) rather than (i, i + rotary_dim / 2).
        stable_length: the longest sequence (highest position + 1) at which the model still uses `inv_freq`; None where
            frequencies do not depend on length. "dynamic" stretches them and "longrope" swaps them past it: keep
            positions below, or see `model/rope_reading.py`.

    Arguments of the methods:
        x: `[batch, kv_heads, tokens, head_dim]` (or any leading dimensions), floating. Worked on in float32 (float64
            if it is that) and returned in its own dtype; dimensions past `rotary_dim` are returned as they are.
        positions: a number, `[tokens]`, or one dimension fewer than `x` with sizes 1 or equal, such as
            `[batch, kv_heads, tokens]`; integer, float32 or float64.

    Precision. `rotate`, `unrotate` and `move` take angles as the model takes them, position times frequency in float32,
    so they agree with its own keys to float32 rounding at any position. Each result is rounded once to the dtype of
    `x`; in bfloat16 these roundings add up over many moves. So keep a key as it was last exact, with that position, and
    derive each later place from it instead of from the one before: then the error is one rounding, however often it
    moves.
    """

    rope_type: str
    inv_freq: torch.Tensor
    attention_scaling: float = 1.0
    interleaved: bool = False
    stable_length: int | None = None
    # A copy of the model's rotary module, kept only where frequencies depend on length, and its layer type to ask for.
    rotary_module: nn.Module | None = None
    layer_type: str | None = None
    # inv_freq on each device it was needed on: layers of one model may live on several.
    _on_device: dict = field(init=False, default_factory=dict)

    @classmethod
    def none(cls) -> Rope:
        """A layer whose keys do not turn with position."""
        return cls("none", torch.empty(0, dtype=torch.float32))

    @property
    def rotates(self) -> bool:
        """Whether keys of this layer turn with position at all."""
        return self.rope_type != "none"

    @property
    def rotary_dim(self) -> int:
        """How many of a head's first dimensions turn."""
        return 2 * self.inv_freq.shape[0]

    def rotate(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Keys (or queries) as the model would have made them at `positions`, from unrotated ones."""
        angles = self._model_angles(x, positions)
        return x if angles is None else self._turn(x, angles.cos(), angles.sin(), self.attention_scaling)

    def unrotate(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """The inverse of `rotate`: keys as they were before RoPE."""
        angles = self._model_angles(x, positions)
        return x if angles is None else self._turn(x, angles.cos(), -angles.sin(), 1 / self.attention_scaling)

    def move(self, x: torch.Tensor, positions: Positions, new_positions: Positions) -> torch.Tensor:
        """Rotated keys at `positions`, taken to `new_positions`: what the model would have stored there.

        The way to re-rotate a key whose position is known: it undoes the very angle the model used, so it is closer to
        the model's own key than `shift` where float32 angles are coarse, and moves compose without error.
        """
        old, new = self._model_angles(x, positions), self._model_angles(x, new_positions)
        if old is None:
            return x
        # cos and sin of the difference from those of the two angles: subtracting float32 angles would lose digits.
        old_cos, old_sin, new_cos, new_sin = old.cos(), old.sin(), new.cos(), new.sin()
        return self._turn(x, new_cos * old_cos + new_sin * old_sin, new_sin * old_cos - new_cos * old_sin)

    def shift(self, x: torch.Tensor, delta: Positions) -> torch.Tensor:
        """Rotated keys turned by `delta` positions, wherever they are; `delta` as `positions`, negative moves back.

        The angle is taken in float64, so a delta of millions is as exact as one of 1.
        """
        if not self.rotates:
            return x
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        delta = _as_positions("delta", delta, x).to(device).to(torch.float64)
        angles = delta[..., None] * self._table(device)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self._turn(x, angles.cos().to(x.device, dtype), angles.sin().to(x.device, dtype))

    def _model_angles(self, x: torch.Tensor, positions: Positions) -> torch.Tensor | None:
        """`[..., tokens, rotary_dim / 2]` in radians, by the float32 product of transformers' rotary modules."""
        if not self.rotates:
            return None
        positions = _as_positions("positions", positions, x).to(torch.float32).to(x.device)
        angles = positions[..., None] * self._table(x.device)
        return angles.double() if x.dtype == torch.float64 else angles

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Turn each pair of `x` by the angle with these cos and sin, `[..., tokens, rotary_dim / 2]`; times `scale`."""
        if x.shape[-1] < self.rotary_dim:
            raise ValueError(f"x has head_dim {x.shape[-1]}; this RoPE needs {self.rotary_dim} or more")
        rotary = x[..., : self.rotary_dim].to(cos.dtype)
        first, second = (rotary[..., 0::2], rotary[..., 1::2]) if self.interleaved else rotary.chunk(2, dim=-1)
        if scale != 1.0:
            cos, sin = cos * scale, sin * scale
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = (torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)).to(x.dtype)
        return turned if x.shape[-1] == self.rotary_dim else torch.cat((turned, x[..., self.rotary_dim :]), dim=-1)

    def _table(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            with torch.inference_mode(False):
                self._on_device[device] = self.inv_freq.to(device)
        return self._on_device[device]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rope):
            return NotImplemented
        return self._scalars() == other._scalars() and torch.equal(self.inv_freq, other.inv_freq)

    def __hash__(self) -> int:
        return hash(self._scalars())

    def __repr__(self) -> str:
        names = ("rope_type", "rotary_dim", "attention_scaling", "interleaved", "stable_length")
        return f"Rope({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def _scalars(self) -> tuple:
        return self.rope_type, self.rotary_dim, self.attention_scaling, self.interleaved, self.stable_length


def _as_positions(name: str, positions: Positions, x: torch.Tensor) -> torch.Tensor:
    """`positions` as a tensor that broadcasts against the leading dimensions of `x`, checked."""
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: allowed are floating dtypes")
    if not isinstance(positions, torch.Tensor):
        positions = torch.tensor(positions, dtype=torch.float64)
    if positions.dtype in (torch.bool, torch.float16, torch.bfloat16) or positions.is_complex():
        raise ValueError(f"{name} has dtype {positions.dtype}: allowed are integers, float32 and float64")
    leading = x.shape[:-1]
    # [batch, tokens] would broadcast over [kv_heads, tokens] unseen where the sizes happen to match.
    fits = positions.ndim in (0, min(1, len(leading)), len(leading))
    sizes = zip(reversed(positions.shape), reversed(leading), strict=False)
    if not fits or any(given not in (1, wanted) for given, wanted in sizes):
        raise ValueError(
            f"{name} has shape {list(positions.shape)}: allowed for x of shape {list(x.shape)} are one number, "
            f"[{leading[-1] if leading else 1}], or {list(leading)} with 1 for any size"
        )
    return positions
