"""Rows and ends of what a cache holds: tokens are taken back, rows are rearranged, in all layers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .data.autograd import unrecorded
from .data.padding import Stretches, with_columns
from .layer import ADMSLayer
from .seen import SeenTokens
from .stream.stream import Stream


def _held_by_sliding(layer: DynamicSlidingWindowLayer) -> int:
    """How many of the last tokens transformers' layer can take back, so that it still has its window."""
    held = layer.keys.shape[2] if layer.is_initialized else 0
    return held if held == layer.get_seq_length() else max(0, held - layer.sliding_window + 1)


class RowsMixin:
    """`crop` and what beam search asks of the cache."""

    layers: list[Any]
    stream: Stream
    _move_sliding: Callable[[list[int]], None]
    padding: list[Stretches]
    seen_tokens: SeenTokens

    @unrecorded()
    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every layer; 0 settles what was tried out.

        Raises:
            ValueError: they are not all held exactly (or archived, where the cache recalls), in whichever layer; nothing has
                changed.
        """
        self._drop_unfinished()
        gone = -tokens_to_remove
        if gone < 0:
            # Releases before 5.10 give the length to keep.
            gone = max(0, self.get_seq_length() - tokens_to_remove)
        self.stream.check_crop(gone)
        sliding = [layer for layer in self.layers if not isinstance(layer, ADMSLayer)]
        for layer in sliding:
            if gone > _held_by_sliding(layer):
                raise ValueError(
                    f"crop({tokens_to_remove}) needs tokens that a layer with a sliding window has dropped; call "
                    "cache.activate_past_recording() before the pass that is to be taken back"
                )
        before = [dict(vars(layer)) for layer in sliding]
        try:
            for layer in sliding:
                # Transformers' sliding layers refuse to be cropped by 0 where they record nothing.
                if gone or getattr(layer, "record_past", False):
                    layer.crop(-gone)
            with self._aborted_if_it_fails():
                shifts = self.stream.crop(gone)
        except BaseException:
            for layer, attributes in zip(sliding, before, strict=True):
                vars(layer).update(attributes)
            raise
        self._move_sliding(shifts)
        if self.padding:
            self.padding = with_columns(self.padding, self.stream.seen, torch.ones(len(self.padding), 0, dtype=torch.bool))
        self.seen_tokens.remove(max(0, self.seen_tokens.length - self.stream.seen))

    @property
    def held_one_by_one(self) -> int:
        """How many of the last tokens `crop` can take back."""
        sliding = (_held_by_sliding(layer) for layer in self.layers if not isinstance(layer, ADMSLayer))
        return min([self.stream.croppable, *sliding])

    def activate_past_recording(self) -> None:
        """Passes count only with the next `crop` or pass from now on; see `ADMSLayer.activate_past_recording`."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` of every layer becomes what row `beam_idx[i]` was."""
        self._pick_rows(lambda layer: layer.reorder_cache(beam_idx), beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        rows = torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats)
        self._pick_rows(lambda layer: layer.batch_repeat_interleave(repeats), rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`."""
        self._pick_rows(lambda layer: layer.batch_select_indices(indices), indices)

    @unrecorded()
    def _pick_rows(self, sliding: Callable[[Any], None], indices: Any) -> None:
        self._drop_unfinished()
        self._settle()
        if self.stream.batch is None:
            return
        for layer in self.layers:
            if not isinstance(layer, ADMSLayer):
                sliding(layer)
        at = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        order = torch.arange(self.stream.batch)[at].tolist()
        self.stream.pick(order)
        self.padding = [self.padding[row] for row in order] if self.padding else []
        self.seen_tokens.pick(indices)
