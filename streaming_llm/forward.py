"""Around a forward pass: what the cache does when one begins, ends well, or fails. Called by an enabled model's hooks.

Of transformers' own layers the attributes from before the pass are kept: their tensors are replaced, never written to.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from .config import ADMSConfig
from .data.autograd import unrecorded
from .data.padding import Stretches, known_figures, mask_change, mask_figures, with_columns
from .layer import ADMSLayer
from .seen import SeenTokens, ids_of
from .stream.arrival import Arrival
from .stream.forward_pass import Pass
from .stream.stream import Stream


class ForwardMixin:
    """`begin_forward`, `end_forward` and `abort_forward` of the cache."""

    config: ADMSConfig
    layers: list[Any]
    stream: Stream
    padding: list[Stretches]
    seen_tokens: SeenTokens

    @unrecorded()
    def begin_forward(
        self,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        new: int,
        batch: int,
        device: torch.device,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Take note of what is coming, make room for it, and move the window of positions on where it is due.

        Args:
            positions: the position ids the model would use, `[batch or 1, new]`, or None.
            attention_mask: 2-D, 1 for real tokens, a column for each token seen and new, or for each new one only; or None.
                What it changes of tokens seen holds from now on.
            new: number of new tokens; batch: rows; device: where they are.
            tokens: their ids `[batch, new]`, or embeddings; None where they are not known.

        Returns:
            `(positions, attention_mask)` for the model to use instead.

        Raises:
            ValueError: a mask or positions that can't be right; nothing has changed.
        """
        self._drop_unfinished()
        self._end_recording()
        seen = self.stream.seen
        real, counts, tail, change = None, (new,) * batch, 0, None
        only_new = False
        if isinstance(attention_mask, torch.Tensor):
            attention_mask, only_new = self._whole_mask(attention_mask, seen, new, batch)
            if attention_mask is not None and attention_mask.dim() == 2:
                real = attention_mask[:, -new:].bool()
                figures = [real.flip(1).cumprod(1).sum(1).amin()[None], real.sum(1)]
                if seen and not only_new and self.wired and batch == self.batch_size:
                    figures.append(mask_figures(attention_mask[:, :seen], self.padding))
                tail, *figures = torch.cat(figures).tolist()
                counts, figures = figures[:batch], figures[batch:]
                if figures and figures != known_figures(self.padding, batch):
                    past = attention_mask[:, :seen].bool().cpu()
                    change = mask_change(past, self.padding, self.stream.exact_lengths(), not self.stream.aligned)
                if min(counts) == new:
                    real = None
        if only_new and seen:
            # Counted from a mask of the new tokens alone, they would start at 0 again.
            positions = None
        window = self.window
        # Where a mask takes tokens out, the next one's position is told, not counted.
        first, last = window.span(positions, real, None if real is None and change is None else counts, new)
        if positions is None and window.following is None and real is not None:
            first, last = [0] * batch, [count - 1 for count in counts]
        masked = isinstance(attention_mask, torch.Tensor)
        arrival = Arrival(new, tuple(counts), None, real, masked, tail)
        started = self.stream.begin(arrival, first, last, change)
        following = window.following
        counting = real is None and all(position == seen for position in (following or [0]))
        arrival.positions = started.window.place(positions, real, first, new, counting, device)
        # transformers' own layers replace their tensors: what they refer to now is all it takes to go back.
        sliding = [None if isinstance(layer, ADMSLayer) else dict(vars(layer)) for layer in self.layers]
        padding = self.padding if change is None else with_columns([], 0, change.real)
        if real is not None:
            # Of one token a row the counts have told.
            padding = with_columns(padding, seen, torch.tensor(counts)[:, None] if new == 1 else real.cpu())
        started.extra = {"sliding": sliding, "padding": padding, "ids": None if tokens is None else ids_of(tokens)}
        # From here on `abort_forward` goes back.
        self.stream.open = started
        self._move_sliding([after - before for after, before in started.shifts(window)])
        return arrival.positions, attention_mask

    def _whole_mask(self, mask: torch.Tensor, seen: int, new: int, batch: int) -> tuple[torch.Tensor | None, bool]:
        """The mask with a column for every token (None: no padding), and whether it was given for the new ones only."""
        stacks, capacity = self.stream.stacks, self.config.expected_max_tokens
        if mask.dim() != 2:
            if seen + new > capacity or self.stream.padded or self.stream.compacted:
                raise ValueError(
                    f"attention_mask of shape {list(mask.shape)} can't be: once tokens are compacted only a 2-D mask "
                    "[batch, tokens] tells what is padding"
                )
            return mask, False
        if mask.shape[0] != batch or mask.shape[1] not in (seen + new, new):
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} must be [{batch}, {seen + new}] (all tokens seen and new) or "
                f"[{batch}, {new}] (the new ones)"
            )
        if mask.shape[1] == seen + new:
            return mask, False
        sliding = len(self._full_layers()) < len(self.layers)
        real = stacks[0].real if stacks else None
        if bool(mask.all()) and (not self.stream.padded or (real is None and not sliding)):
            # Nothing to tell, now or of what is held: a mask as long as the stream would have to be made at every step.
            return None, True
        if self.stream.padded and real is None and sliding:
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} must be [{batch}, {seen + new}]: with padding in the "
                "batch, layers with a sliding window need the mask of all tokens"
            )
        before = mask.new_ones(batch, seen) if real is None else real.to(mask)
        return torch.cat([before, mask], dim=1), True

    def _end_recording(self) -> None:
        """Let passes count as usual once no crop follows one any more: transformers leaves the layers recording."""
        if self.stream.open is not None:
            self._settle()
            self.stream.records_past = False
        for layer in self.layers:
            own = not isinstance(layer, ADMSLayer) and getattr(layer, "record_past", False)
            if own and layer.is_initialized and layer.keys.shape[2] >= layer.sliding_window:
                layer.crop(0)
                layer.record_past = False

    def _move_sliding(self, shifts: list[int]) -> None:
        """Turn the keys of layers with a sliding window back by so many positions, row by row."""
        for layer in self.layers if any(shifts) else ():
            rope = getattr(layer, "rope", None)
            if not isinstance(layer, ADMSLayer) and rope is not None and layer.is_initialized and layer.keys.shape[2]:
                shift = torch.tensor(shifts, device=layer.keys.device).expand(layer.keys.shape[0])
                layer.keys = rope.shift(layer.keys, -shift.view(-1, 1, 1))

    @unrecorded()
    def end_forward(self) -> None:
        """The forward pass went well. Raises `NonFiniteError` (and takes it back) where it brought NaN or infinity."""
        if self.stream.open is None:
            return
        self.stream.open.over = True
        new = self.stream.open.arrival.new
        with self._aborted_if_it_fails():
            for layer in self.layers:
                if not isinstance(layer, ADMSLayer) and layer.is_initialized:
                    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            if self.stream.records_past:
                self.stream.check()
            else:
                self.stream.commit()
        self._log_every_512(self.stream.seen, new)

    def _committed(self, done: Pass) -> None:
        """What the cache knows of a pass beside its tokens counts with it; where this fails nothing has changed."""
        if done.extra["ids"] is not None:
            seen = copy.deepcopy(self.seen_tokens)
            seen.append(done.extra["ids"][:, : done.arrival.new], self.stream.seen - done.arrival.new)
            self.seen_tokens = seen
        self.padding = done.extra["padding"]

    @unrecorded()
    def abort_forward(self) -> None:
        """The forward pass failed: it has never been."""
        done = self.stream.open
        self.stream.abort()
        for layer, attributes in zip(self.layers, () if done is None else done.extra["sliding"], strict=False):
            if attributes is not None:
                vars(layer).clear()
                vars(layer).update(attributes)

    def _drop_unfinished(self) -> None:
        # Python calls no hook after a KeyboardInterrupt in a forward pass: it is found here, at the next call.
        if self.stream.open is not None and not self.stream.open.over:
            self.abort_forward()

    def _settle(self) -> None:
        """Let a pass that only waited for a crop count; where that fails, it has never been."""
        with self._aborted_if_it_fails():
            self.stream.settle()

    @contextlib.contextmanager
    def _aborted_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort_forward()
            raise
