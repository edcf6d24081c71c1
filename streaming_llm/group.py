"""Layers compacted together: their buffers are parts of one, so that one batched call serves them all.

On an accelerator a compaction is bound by the number of kernels, not by their size: all layers go at once. On a CPU a few
at a time, as many as stay in its caches.
"""

from __future__ import annotations

import torch

from .layer import ADMSLayer
from .tokens import WeightedTokens

CPU_LAYERS = 8
_SHARED = (
    "length",
    "compacted",
    "padded",
    "queries_seen",
    "query_count",
    "query_folded",
    "query_scale",
    "query_softcap",
)


class LayerGroup:
    """A run of layers of equal shape on one device, and the buffer they share.

    Each layer works on its own part of the buffer; a layer whose shape turns out to differ, or whose rows were rearranged,
    leaves, and compacts by itself from then on.
    """

    def __init__(self, layers: list[ADMSLayer]):
        self.layers = layers
        self.whole: ADMSLayer | None = None
        for layer in layers:
            layer.group = self

    def allocate(self, layer: ADMSLayer, keys: torch.Tensor, values: torch.Tensor) -> WeightedTokens:
        """The part of the buffer that belongs to `layer`, for states shaped like `keys` and `values`."""
        if self.whole is None:
            self.whole = ADMSLayer(layer.config, layer.wired)
            self.whole.dtype, self.whole.device = keys.dtype, keys.device
            self.whole.buffer = WeightedTokens.empty(keys, values, layer.config.buffer_tokens, copies=len(self.layers))
        held = self.whole.buffer
        rows = held.keys.shape[0] // len(self.layers)
        fits = (rows, *keys.shape[1:2], keys.shape[3], values.shape[3], keys.dtype, keys.device) == (
            keys.shape[0],
            held.keys.shape[1],
            held.keys.shape[3],
            held.values.shape[3],
            held.keys.dtype,
            held.keys.device,
        )
        if not fits:
            layer.group = None
            return WeightedTokens.empty(keys, values, layer.config.buffer_tokens)
        return held.map(lambda tensor: self._part(layer, tensor))

    def _part(self, layer: ADMSLayer, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.shape[0] // len(self.layers)
        number = next(i for i, member in enumerate(self.layers) if member is layer)
        return tensor[number * rows : (number + 1) * rows]

    def query_buffer(self, layer: ADMSLayer, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """The part of the shared query buffer that belongs to `layer`, zeros of `shape` `[batch, ...]` at first."""
        whole = self.whole
        if whole.query_buffer is None:
            whole.query_buffer = like.new_zeros(shape[0] * len(self.layers), *shape[1:])
        if whole.query_buffer.shape[1:] != torch.Size(shape[1:]) or whole.query_buffer.dtype != like.dtype:
            layer.group = None
            return like.new_zeros(shape)
        return self._part(layer, whole.query_buffer)

    def query_real(self, layer: ADMSLayer, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """The part of the shared marks of real queries that belongs to `layer`, all True at first."""
        if self.whole.query_real is None:
            self.whole.query_real = torch.ones(shape[0] * len(self.layers), *shape[1:], dtype=torch.bool, device=device)
        return self._part(layer, self.whole.query_real)

    @property
    def ready(self) -> bool:
        """Whether all layers are at the same point, so that one call can compact them."""
        first = self.layers[0]
        return all(
            layer.group is self
            and layer.is_initialized
            and layer.overflow is None
            and (layer.query_real is None) == (first.query_real is None)
            and (layer.query_buffer is None) == (first.query_buffer is None)
            and all(getattr(layer, name) == getattr(first, name) for name in _SHARED)
            for layer in self.layers
        )

    def compact(self) -> None:
        """Compact all layers in one call."""
        whole, first = self.whole, self.layers[0]
        for name in _SHARED:
            setattr(whole, name, getattr(first, name))
        whole.profile = first.profile
        before = whole.compressions
        whole.compact()
        for layer in self.layers:
            for name in _SHARED:
                setattr(layer, name, getattr(whole, name))
            layer._bias = None
            layer.compressions += (whole.compressions - before) // len(self.layers)
            if whole.budgets is not None:
                layer.budgets = self._part(layer, whole.budgets)
        self._hand_out_counts()

    def newest_are_bad(self) -> list[torch.Tensor]:
        """As `ADMSLayer.newest_are_bad`, asked once where all layers are at the same point."""
        first = self.layers[0]
        if not self.ready:
            return [layer.newest_are_bad() for layer in self.layers if layer.is_initialized]
        self.whole.length, self.whole.seen, self.whole._undo = first.length, first.seen, first._undo
        return [self.whole.newest_are_bad()]

    def _hand_out_counts(self) -> None:
        whole = self.whole
        for name in ("kept_exact", "kept_compressed", "dropped", "compaction_seconds"):
            setattr(self.layers[0], name, getattr(self.layers[0], name) + getattr(whole, name))
            setattr(whole, name, 0)


def group_layers(layers: list[ADMSLayer], size: int) -> None:
    """Let every `size` layers, in their order, share a buffer from their first token on."""
    if size > 1:
        for start in range(0, len(layers), size):
            LayerGroup(layers[start : start + size])
