"""What the modules' documented per-head methods stand on: one head's part of a layer's batched state, made when needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .autograd import unrecorded
from .calibration import CalibrationState
from .config import REPLAY_BANK
from .controller import ControllerState
from .layer import ADMSLayer
from .recall import Originals
from .state import HeadState
from .tokens import WeightedTokens


class ByHandMixin:
    """Access to the modules' state by (layer, head); by hand means row 0."""

    def _layer_by_hand(self, layer_idx: int, head_idx: int) -> ADMSLayer:
        """The layer, made where there is none; `ValueError` for indices that can't be."""
        for name, value in (("layer_idx", layer_idx), ("head_idx", head_idx)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 0")
        self._make_layers(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, ADMSLayer):
            raise ValueError(f"layer_idx={layer_idx} has a sliding window: it keeps no middle")
        if layer.is_initialized and head_idx >= layer.buffer.keys.shape[1]:
            raise ValueError(f"head_idx={head_idx} must be below {layer.buffer.keys.shape[1]}, the layer's KV heads")
        return layer

    @unrecorded()
    def _head_state(self, name: str, layer_idx: int, head_idx: int) -> HeadState:
        """One head's part of a layer's `calibration` or `controller` state, as views, for row 0."""
        layer = self._layer_by_hand(layer_idx, head_idx)
        state = getattr(layer, name)
        if state is None and layer.is_initialized:
            raise RuntimeError(f"layer {layer_idx} is filled by a model with the {name} off: there is nothing to do by hand")
        missing = head_idx + 1 - (0 if state is None else state.heads)
        if missing > 0:
            device = torch.device("cpu") if state is None else next(iter(state.tensors().values())).device
            if name == "calibration":
                more = CalibrationState.empty(1, missing, self.config.calibration_window, device)
            else:
                more = ControllerState.empty(1, missing, device)
            setattr(layer, name, more if state is None else state.with_heads(more))
        return getattr(layer, name).part(0, head_idx)

    def _state_heads(self, *names: str) -> Callable[[], list[tuple[int, int]]]:
        """A function telling which layers have one of these states, and for how many heads."""

        def heads() -> list[tuple[int, int]]:
            found = []
            for number, layer in enumerate(self.layers):
                if not isinstance(layer, ADMSLayer):
                    continue
                states = [getattr(layer.of_row(0)[0], name) for name in names]
                counts = [state.heads for state in states if state is not None]
                if counts:
                    found.append((number, max(counts)))
            return found

        return heads

    def _peek_state(self, name: str, layer: int, row: int, head: int) -> HeadState | None:
        """One head's part of a state, or None where it is not there."""
        own, row = self.layers[layer].of_row(row)
        state = getattr(own, name)
        if state is None or head >= state.heads:
            return None
        if not 0 <= row < next(iter(state.tensors().values())).shape[0]:
            raise ValueError(f"row={row} must be a row of the batch")
        return state.part(row, head)

    # -- banks -----------------------------------------------------------------------------------------------------------

    def _banks(self, layer_idx: int, head_idx: int) -> ADMSLayer:
        layer = self._layer_by_hand(layer_idx, head_idx)
        if layer.is_initialized:
            raise RuntimeError(f"layer {layer_idx} is filled by a model: its banks change by compaction only, not by hand")
        return layer

    @unrecorded()
    def _hand_bank(
        self, layer_idx: int, head_idx: int, keys: torch.Tensor | None = None, values: torch.Tensor | None = None
    ) -> tuple[WeightedTokens, Originals]:
        """Sketches and originals of one head, as views; made with the shape of `keys` and `values [tokens, dim]`."""
        layer = self._banks(layer_idx, head_idx)
        missing = head_idx + 1 - (0 if layer.hand_sketches is None else layer.hand_sketches.keys.shape[1])
        if missing > 0:
            if layer.hand_sketches is not None:
                like_k, like_v = layer.hand_sketches.keys, layer.hand_sketches.values
            else:
                empty = torch.zeros(1, 1, 0, 1, dtype=torch.float32)
                like_k = empty if keys is None else keys[None, None]
                like_v = empty if values is None else values[None, None]
            like_k, like_v = (x[:, :1].expand(1, missing, *x.shape[2:]) for x in (like_k, like_v))
            sketches = WeightedTokens.empty(like_k, like_v, max(1, self.config.sketch_budget))
            originals = Originals.empty(like_k, like_v, max(1, self.config.sketch_originals))
            if layer.hand_sketches is None and keys is None:
                return sketches.map(lambda t: t[:, :1]), originals.part(0, 0)
            if layer.hand_sketches is not None:
                held = layer.hand_sketches
                sketches = WeightedTokens(
                    **{name: torch.cat([tensor, getattr(sketches, name)], 1) for name, tensor in held.tensors().items()}
                )
                originals = layer.originals.with_heads(originals)
            layer.hand_sketches, layer.originals = sketches, originals
        part = layer.hand_sketches.map(lambda tensor: tensor[:1, head_idx : head_idx + 1])
        return part, layer.originals.part(0, head_idx)

    def _middle_and_originals(self, layer: int, row: int, head: int) -> tuple[WeightedTokens, Originals] | None:
        """The middle of one head and its originals, as views; None where it keeps none."""
        whole = self.layers[layer]
        own, place = whole.of_row(row)
        if own.originals is None or head >= own.originals.heads:
            return None
        if own.is_initialized:
            if not own.compacted:
                return None
            first = self.config.dynamic_start_size
            middle = whole.buffer.slice(first, first + own.width)
        elif own.hand_sketches is not None:
            middle = own.hand_sketches
        else:
            return None
        return middle.map(lambda tensor: tensor[row : row + 1, head : head + 1]), own.originals.part(place, head)

    @unrecorded()
    def _hand_replay(
        self, layer_idx: int, head_idx: int, keys: torch.Tensor | None = None, values: torch.Tensor | None = None
    ) -> Originals:
        """The replay bank of one head, as views."""
        layer = self._layer_by_hand(layer_idx, head_idx)
        if layer.is_initialized:
            if keys is not None:
                self._banks(layer_idx, head_idx)
            if layer.originals is not None:
                return layer.originals.part(0, head_idx)
        bank = layer.replay_hand
        missing = head_idx + 1 - (0 if bank is None else bank.heads)
        if missing > 0:
            if bank is not None:
                like_k, like_v = bank.keys, bank.values
            else:
                empty = torch.zeros(1, 1, 0, 1, dtype=torch.float32)
                like_k = empty if keys is None else keys[None, None]
                like_v = empty if values is None else values[None, None]
            like_k, like_v = (x[:, :1].expand(1, missing, *x.shape[2:]) for x in (like_k, like_v))
            more = Originals.empty(like_k, like_v, max(1, REPLAY_BANK * self.config.replay_budget))
            if bank is None and keys is None:
                return more.part(0, 0)
            layer.replay_hand = more if bank is None else bank.with_heads(more)
        return layer.replay_hand.part(0, head_idx)

    def _replay_originals(self, layer: int, row: int, head: int) -> Originals | None:
        """Where one head's replay bank is, or None."""
        own, row = self.layers[layer].of_row(row)
        bank = own.originals if own.is_initialized else own.replay_hand
        return None if bank is None or head >= bank.heads else bank.part(row, head)

    def _count_by_hand(self, name: str, number: int) -> None:
        self._hand_counts[name] = self._hand_counts.get(name, 0) + number

    _hand_counts: dict[str, int]
    _variances: dict[int, Any]
