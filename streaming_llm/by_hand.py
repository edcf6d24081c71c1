"""What the modules' documented per-head methods stand on: one head's part of a layer's state, made when needed.

A layer that a model fills shows its own state. Tried by hand without a model, the methods have a state of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .compaction.calibration import CalibrationState
from .compaction.controller import ControllerState
from .compaction.originals import Originals
from .config import ADMSConfig
from .data.autograd import unrecorded
from .data.state import HeadState
from .data.tokens import WeightedTokens
from .layer import ADMSLayer
from .sizing import REPLAY_BANK


@dataclass
class HandState:
    """What was put into a layer by hand: row 0 only, as many heads as were named."""

    sketches: WeightedTokens | None = None
    originals: Originals | None = None
    replay: Originals | None = None
    calibration: CalibrationState | None = None
    controller: ControllerState | None = None


class ByHandMixin:
    """Access to the modules' state by (layer, head); by hand means row 0."""

    config: ADMSConfig
    layers: list[Any]
    _hand: dict[int, HandState]
    _hand_counts: dict[str, int]
    _variances: dict[int, Any]

    def _layer_by_hand(self, layer_idx: int, head_idx: int) -> ADMSLayer:
        """The layer, made where there is none; `ValueError` for indices that can't be."""
        for name, value in (("layer_idx", layer_idx), ("head_idx", head_idx)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 0")
        self._make_layers(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, ADMSLayer):
            raise ValueError(f"layer_idx={layer_idx} has a sliding window: it keeps no middle")
        if layer.is_initialized and head_idx >= layer.stack.tokens.keys.shape[1]:
            raise ValueError(f"head_idx={head_idx} must be below {layer.stack.tokens.keys.shape[1]}, the layer's KV heads")
        return layer

    def _own_hand(self, layer_idx: int) -> HandState:
        return self._hand.setdefault(layer_idx, HandState())

    def _layer_state(self, name: str, layer: int) -> HeadState | None:
        """A module's state of one layer, of its rows and heads, as views; None where it has none."""
        own = self.layers[layer] if layer < len(self.layers) else None
        if not isinstance(own, ADMSLayer):
            return None
        stack = own.stack
        if stack is None:
            return getattr(self._hand.get(layer), name, None)
        state = getattr(stack.memory, "originals" if name == "replay" else name)
        return None if state is None else state.map(lambda tensor: stack.of_layer(layer, tensor))

    @unrecorded()
    def _head_state(self, name: str, layer_idx: int, head_idx: int) -> HeadState:
        """One head's part of a layer's `calibration` or `controller` state, as views, for row 0."""
        layer = self._layer_by_hand(layer_idx, head_idx)
        state = self._layer_state(name, layer_idx)
        if state is None and layer.is_initialized:
            raise RuntimeError(f"layer {layer_idx} is filled by a model with the {name} off: there is nothing to do by hand")
        missing = head_idx + 1 - (0 if state is None else state.heads)
        if missing > 0:
            device = torch.device("cpu") if state is None else next(iter(state.tensors().values())).device
            if name == "calibration":
                more = CalibrationState.empty(1, missing, self.config.calibration_window, device)
            else:
                more = ControllerState.empty(1, missing, device)
            state = more if state is None else state.with_heads(more)
            setattr(self._own_hand(layer_idx), name, state)
        return state.part(0, head_idx)

    def _state_heads(self, name: str) -> Callable[[], list[tuple[int, int]]]:
        """A function telling which layers have a state of this name, and for how many heads."""

        def heads() -> list[tuple[int, int]]:
            states = ((number, self._layer_state(name, number)) for number in range(len(self.layers)))
            return [(number, state.heads) for number, state in states if state is not None]

        return heads

    def _peek_state(self, name: str, layer: int, row: int, head: int) -> HeadState | None:
        """One head's part of a state, or None where it is not there."""
        state = self._layer_state(name, layer)
        if state is None or head >= state.heads:
            return None
        if not 0 <= row < next(iter(state.tensors().values())).shape[0]:
            raise ValueError(f"row={row} must be a row of the batch")
        return state.part(row, head)

    # -- banks -----------------------------------------------------------------------------------------------------------

    def _check_banks(self, layer_idx: int, head_idx: int) -> None:
        if self._layer_by_hand(layer_idx, head_idx).is_initialized:
            raise RuntimeError(f"layer {layer_idx} is filled by a model: its banks change by compaction only, not by hand")

    @unrecorded()
    def _hand_bank(
        self, layer_idx: int, head_idx: int, keys: torch.Tensor | None = None, values: torch.Tensor | None = None
    ) -> tuple[WeightedTokens, Originals]:
        """Sketches and originals of one head, as views; made with the shape of `keys` and `values [tokens, dim]`."""
        self._check_banks(layer_idx, head_idx)
        hand = self._own_hand(layer_idx)
        held = hand.sketches
        missing = head_idx + 1 - (0 if held is None else held.keys.shape[1])
        if missing > 0:
            like = _like(held, keys, values, missing)
            sketches = WeightedTokens.empty(*like, max(1, self.config.sketch_budget))
            originals = Originals.empty(*like, max(1, self.config.sketch_originals))
            if held is None and keys is None:
                return sketches.map(lambda t: t[:, :1]), originals.part(0, 0)
            if held is not None:
                more = sketches.tensors()
                sketches = WeightedTokens(**{name: torch.cat([t, more[name]], 1) for name, t in held.tensors().items()})
                originals = hand.originals.with_heads(originals)
            hand.sketches, hand.originals = sketches, originals
        part = hand.sketches.map(lambda tensor: tensor[:1, head_idx : head_idx + 1])
        return part, hand.originals.part(0, head_idx)

    def _middle_and_originals(self, layer: int, row: int, head: int) -> tuple[WeightedTokens, Originals] | None:
        """The middle of one head and its originals, as views; None where it keeps none."""
        originals = self._peek_state("originals", layer, row, head)
        if originals is None:
            return None
        stack = self.layers[layer].stack
        if stack is None:
            middle = self._hand[layer].sketches
        else:
            own = stack.rows[row]
            if not own.compactions:
                return None
            first = self.config.dynamic_start_size
            middle = stack.tokens.slice(first, first + own.width).map(lambda tensor: stack.of_layer(layer, tensor))
        return middle.map(lambda tensor: tensor[row : row + 1, head : head + 1]), originals

    @unrecorded()
    def _hand_replay(
        self, layer_idx: int, head_idx: int, keys: torch.Tensor | None = None, values: torch.Tensor | None = None
    ) -> Originals:
        """The replay bank of one head, as views."""
        if keys is not None:
            self._check_banks(layer_idx, head_idx)
        if self._layer_by_hand(layer_idx, head_idx).is_initialized:
            bank = self._layer_state("replay", layer_idx)
            if bank is not None:
                return bank.part(0, head_idx)
        bank = self._own_hand(layer_idx).replay
        missing = head_idx + 1 - (0 if bank is None else bank.heads)
        if missing > 0:
            more = Originals.empty(*_like(bank, keys, values, missing), max(1, REPLAY_BANK * self.config.replay_budget))
            if bank is None and keys is None:
                return more.part(0, 0)
            bank = more if bank is None else bank.with_heads(more)
            self._own_hand(layer_idx).replay = bank
        return bank.part(0, head_idx)

    def _count_by_hand(self, name: str, number: int) -> None:
        self._hand_counts[name] = self._hand_counts.get(name, 0) + number


def _like(
    held: WeightedTokens | Originals | None, keys: torch.Tensor | None, values: torch.Tensor | None, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `heads` heads, shaped as those held, else as those given `[tokens, dim]`."""
    empty = torch.zeros(1, 1, 0, 1, dtype=torch.float32)
    if held is not None:
        keys, values = held.keys, held.values
    else:
        keys, values = (empty if given is None else given[None, None] for given in (keys, values))
    return tuple(states[:, :1].expand(1, heads, *states.shape[2:]) for states in (keys, values))
