"""Layers compacted together: their buffers are parts of one, so that one batched call serves them all.

A group has no state of its own: all that is to be known is in the layers, and `LayerGroup.of` makes it anew from them.

On an accelerator a compaction is bound by the number of kernels, not by their size: all layers go at once. On a CPU a few
at a time, as many as stay in its caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from .controller import layer_budgets
from .layer import COUNTS, STATES, ADMSLayer
from .parallel import Ranks
from .state import HeadState, map_tensors
from .tokens import WeightedTokens

CPU_LAYERS = 8
# What of a layer is a part of its group's, what it must have in common with the others to be compacted with them, and what
# it has from them afterwards.
STORED = ("buffer", "query_buffer", *STATES, "variance_ema", "budgets")
_SHARED = (
    "length",
    "seen",
    "limit",
    "width",
    "rounds",
    "compacted",
    "queries_seen",
    "query_count",
    "query_folded",
    "query_scale",
    "query_softcap",
)
# A pass that failed may have taken it from some of the layers.
_HANDED_OUT = (*_SHARED, "query_last")


class LayerGroup:
    """A run of layers of equal shape on one device, and the buffer they share.

    Each layer works on its own part of the buffer; a layer whose shape turns out to differ, or whose rows were rearranged
    without the others', leaves, and compacts by itself from then on.
    """

    def __init__(self, layers: list[ADMSLayer]):
        self.layers = layers
        self.whole: ADMSLayer | None = None
        for layer in layers:
            layer.group = self

    def _make_whole(self, layer: ADMSLayer, dtype: torch.dtype, device: torch.device) -> None:
        self.whole = ADMSLayer(layer.config, layer.wired)
        self.whole.dtype, self.whole.device, self.whole.rope = dtype, device, layer.rope
        # What it counts is the first layer's.
        self.whole.compressor = self.layers[0].compressor

    def allocate(self, layer: ADMSLayer, keys: torch.Tensor, values: torch.Tensor) -> WeightedTokens:
        """The part of the buffer that belongs to `layer`, for states shaped like `keys` and `values`."""
        if self.whole is None:
            self._make_whole(layer, keys.dtype, keys.device)
            self.whole.buffer = WeightedTokens.empty(keys, values, layer.slots, copies=len(self.layers))
            for name, state in layer.new_states(keys, values, copies=len(self.layers)).items():
                setattr(self.whole, name, state)
        held = self.whole.buffer
        rows = held.keys.shape[0] // len(self.layers)
        fits = (rows, *keys.shape[1:2], keys.shape[3], values.shape[3], keys.dtype, values.dtype, keys.device) == (
            keys.shape[0],
            held.keys.shape[1],
            held.keys.shape[3],
            held.values.shape[3],
            held.keys.dtype,
            held.values.dtype,
            held.keys.device,
        )
        if not fits:
            layer.group = None
            return WeightedTokens.empty(keys, values, layer.slots)
        return held.map(lambda tensor: self._part(layer, tensor))

    def _part(self, layer: ADMSLayer, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.shape[0] // len(self.layers)
        number = next(i for i, member in enumerate(self.layers) if member is layer)
        return tensor[number * rows : (number + 1) * rows]

    def state(self, layer: ADMSLayer, name: str, keys: torch.Tensor, values: torch.Tensor) -> HeadState:
        """The part of a module's shared state that belongs to `layer`."""
        return getattr(self.whole, name).map(lambda tensor: self._part(layer, tensor))

    def query_buffer(self, layer: ADMSLayer, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """The part of the shared query buffer that belongs to `layer`, zeros of `shape` `[batch, ...]` at first."""
        whole = self.whole
        if whole.query_buffer is None:
            whole.query_buffer = like.new_zeros(shape[0] * len(self.layers), *shape[1:])
        if whole.query_buffer.shape[1:] != torch.Size(shape[1:]) or whole.query_buffer.dtype != like.dtype:
            layer.group = None
            return like.new_zeros(shape)
        return self._part(layer, whole.query_buffer)

    @property
    def ready(self) -> bool:
        """Whether all layers are at the same point, so that one call can compact them."""
        first = self.layers[0]
        return all(
            layer.group is self
            and layer.is_initialized
            and layer.overflow is None
            and (layer.query_buffer is None) == (first.query_buffer is None)
            and all(getattr(layer, name) == getattr(first, name) for name in _SHARED)
            for layer in self.layers
        )

    @property
    def compacting(self) -> bool:
        """Whether a compaction of the layers began and has not ended."""
        return self.whole is not None and self.whole._compacting

    def compact(self, width: int | None = None) -> None:
        """Compact all layers in one call; `width` as for `ADMSLayer.compact`."""
        whole, first = self.whole, self.layers[0]
        for name in _HANDED_OUT:
            setattr(whole, name, getattr(first, name))
        whole.profile = first.profile
        whole.variance_ema = self._joined("variance_ema")
        before, buffer = whole.compressions, whole.buffer
        whole.compact(width)
        self._hand_out("variance_ema", "budgets", *(() if whole.buffer is buffer else ("buffer",)))
        for layer in self.layers:
            for name in _HANDED_OUT:
                setattr(layer, name, getattr(whole, name))
            layer._bias = None
            layer.compressions += (whole.compressions - before) // len(self.layers)
        self._hand_out_counts()

    def keep_exact(self) -> None:
        """Let all layers keep their keys as they were before any move."""
        for name in ("buffer", "originals"):
            shared = getattr(self.whole, name)
            if shared is not None:
                setattr(self.whole, name, shared.with_exact())
        self._hand_out("buffer", "originals")

    def newest_are_bad(self) -> list[torch.Tensor]:
        """As `ADMSLayer.newest_are_bad`, asked once where all layers are at the same point."""
        first = self.layers[0]
        if not self.ready:
            return [layer.newest_are_bad() for layer in self.layers if layer.is_initialized]
        self.whole.length, self.whole.seen, self.whole._undo = first.length, first.seen, first._undo
        return [self.whole.newest_are_bad()]

    def _hand_out_counts(self) -> None:
        whole = self.whole
        for name in (*COUNTS, "compaction_seconds"):
            setattr(self.layers[0], name, getattr(self.layers[0], name) + getattr(whole, name))
            setattr(whole, name, 0)

    @classmethod
    def of(cls, layers: list[ADMSLayer]) -> LayerGroup:
        """A group of layers that hold tokens already, all of the same shape: what each has is copied into one storage."""
        group = cls(layers)
        first = layers[0]
        group._make_whole(first, first.dtype, first.device)
        for name in STORED:
            setattr(group.whole, name, group._joined(name))
        group._hand_out(*STORED)
        if first.planned is not None:
            group.whole.planned = (torch.cat([layer.planned[0] for layer in layers]), first.planned[1])
        return group

    def _joined(self, name: str) -> torch.Tensor | WeightedTokens | HeadState | None:
        """What the layers have of it, in one storage."""
        parts = [getattr(layer, name) for layer in self.layers]
        if any(part is None for part in parts):
            return None
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts)
        return type(parts[0])(**{key: torch.cat([part.tensors()[key] for part in parts]) for key in parts[0].tensors()})

    def _hand_out(self, *names: str) -> None:
        """Give each layer its parts."""
        for name in names:
            for layer in self.layers:
                if layer.group is self and layer.is_initialized:
                    self._give(layer, name)

    def _give(self, layer: ADMSLayer, name: str) -> None:
        setattr(layer, name, map_tensors(getattr(self.whole, name), lambda tensor: self._part(layer, tensor)))

    def holds(self, layer: ADMSLayer, name: str) -> bool:
        """Whether the layer's attribute of this name is a part of what the group holds."""
        if name not in STORED or self.whole is None:
            return False
        storages: list[set[int]] = [set(), set()]
        for owner, found in zip((self.whole, layer), storages, strict=True):
            map_tensors(getattr(owner, name), lambda tensor, found=found: found.add(tensor.untyped_storage().data_ptr()))
        return bool(storages[1]) and storages[0] == storages[1]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled group gives the layers their parts, which they came without."""
        vars(self).update(state)
        for layer in self.layers if self.whole is not None else ():
            # What a layer has itself comes with it, before or after.
            for name in set(STORED) - vars(layer).keys():
                self._give(layer, name)

    def take_rows(self, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As `ADMSLayer.take_rows` for all layers, which stay together."""
        count = self.whole.buffer.keys.shape[0] // len(self.layers)
        rows = chosen(torch.arange(count, device=self.whole.device))
        each = torch.arange(len(self.layers), device=rows.device)[:, None] * count
        index = (each + rows).flatten()
        self.whole.map_rows(lambda tensor: tensor.index_select(0, index))
        for layer in self.layers:
            layer.map_rows(lambda tensor: tensor.index_select(0, rows), leave=STORED)
        self._hand_out(*STORED)


def whole_groups(layers: list[ADMSLayer]) -> list[LayerGroup]:
    """The groups that hold tokens and that no layer has left; the others' layers compact by themselves."""
    groups = {id(layer.group): layer.group for layer in layers if layer.group is not None}
    return [group for group in groups.values() if group.whole and all(layer.group is group for layer in group.layers)]


def group_layers(layers: list[ADMSLayer], size: int) -> None:
    """Let every `size` layers, in their order, share a buffer from their first token on.

    Layers whose keys turn differently with position are never together.
    """
    if size > 1:
        for _, run in itertools.groupby(layers, key=lambda layer: layer.rope):
            alike = list(run)
            for start in range(0, len(alike), size):
                LayerGroup(alike[start : start + size])


def measured_budgets(layers: list[ADMSLayer], ranks: Ranks | None = None) -> torch.Tensor:
    """The model's budget shared between its layers by what each loses, int64 `[batch, layers]`; see `controller.py`.

    It asks the device once for all layers, which is why it is done rarely.

    Args:
        layers: the model's layers of full attention, at the same point of the stream.
        ranks: the processes the heads are spread over, which all plan now; None where each has all heads.
    """
    lost = torch.stack([1.0 - layer.controller.energy.to(layers[0].device).double().mean(-1) for layer in layers], dim=-1)
    lost = (lost if ranks is None else ranks.mean(lost)).cpu()
    return layer_budgets(lost, layers[0].config.compressed_budget)


def plan_budgets(layers: list[ADMSLayer], budgets: torch.Tensor, size: int) -> None:
    """Give each layer the budgets that were shared out, and compact it to them. All are about to compact.

    Args:
        layers: as for `measured_budgets`, which gave `budgets`.
        size: layers of equal budget to put into one group, from now on.
    """
    config = layers[0].config
    widest, least = budgets.amax(0).tolist(), budgets.amin(0).tolist()
    others = config.sketch_budget + config.replay_budget
    alike: dict[tuple, list[ADMSLayer]] = {}
    for number, layer in enumerate(layers):
        # By itself: what a compaction makes depends on its width, which layers compacted together would have to share.
        layer.group = None
        layer.planned = (budgets[:, number].to(layer.device), least[number])
        layer.compact(others + widest[number])
        key = (layer.width, least[number], layer.device, layer.dtype, layer.rope, tuple(layer.buffer.keys.shape))
        alike.setdefault(key, []).append(layer)
    if size > 1:
        for members in alike.values():
            for start in range(0, len(members), size):
                LayerGroup.of(members[start : start + size])


def can_plan(layers: list[ADMSLayer]) -> bool:
    """Whether all layers hold tokens, are at the same point, and were measured."""
    ready = all(layer.is_initialized and layer.overflow is None and layer.rounds for layer in layers)
    return ready and all(layer.group is None or layer.group.ready for layer in layers)
