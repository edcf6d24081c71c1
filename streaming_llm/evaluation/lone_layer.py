"""One layer with a stream of its own: attention by hand, for experiments without a model."""

from __future__ import annotations

from typing import Any

import torch

from streaming_llm.config import ADMSConfig
from streaming_llm.layer import ADMSLayer
from streaming_llm.store.row import Row
from streaming_llm.stream.arrival import Arrival
from streaming_llm.stream.positions import PositionWindow
from streaming_llm.stream.stream import Stream


class LoneLayer(ADMSLayer):
    """A layer whose `update` begins a pass and whose `observe` ends it.

    Args:
        config: the settings.
        wired: whether queries are shown, by `observe`, and log-mass is seen.

    Attributes:
        ends_passes: False to leave a pass open after `observe`, for `stream.abort()`.
    """

    def __init__(self, config: ADMSConfig, wired: bool = True, **stream: Any):
        super().__init__(Stream(config, wired, **stream), 0)
        self.ends_passes = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, arrival: Arrival | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ADMSLayer.update`; a pass that was not ended before is dropped, one on trial is committed."""
        self.stream.settle()
        if self.stream.wired:
            arrival = arrival or Arrival(key_states.shape[2], (key_states.shape[2],) * key_states.shape[0])
            real = arrival.counts if arrival.real is not None else None
            span = PositionWindow.span(self.stream.window, None, arrival.real, real, arrival.new)
            self.stream.open = self.stream.begin(arrival, *span)
        return super().update(key_states, value_states)

    def observe(self, query: torch.Tensor, scale: float, softcap: float | None = None) -> None:
        """As `ADMSLayer.observe`; the pass is committed, where the layer does not record past."""
        super().observe(query, scale, softcap)
        self.stream.open.over = True
        if self.ends_passes and not self.stream.records_past:
            try:
                self.stream.commit()
            except BaseException:
                self.stream.abort()
                raise

    def compact(self) -> None:
        """Compact rows that hold more than they would after a compaction."""
        stack, config = self.stack, self.stream.config
        fixed = config.dynamic_start_size + config.recent_size
        due = [which for which in stack.classes() if stack.rows[which[0]].length - fixed > self.width]
        if due:
            self.stream.stacks = [self.stream.upkeep.compacted(stack, due)]

    def crop(self, tokens_to_remove: int) -> None:
        """As `ADMSKVCache.crop`."""
        seen = self.get_seq_length()
        self.stream.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        self.stream.reset()

    @property
    def row(self) -> Row:
        """Where its first row stands."""
        return self.stack.rows[0] if self.stack is not None else Row(width=self.stream.config.widest_middle)

    @property
    def seen(self) -> int:
        """Tokens of the stream."""
        return self.get_seq_length()

    @property
    def length(self) -> int:
        """Slots in use by the longest row."""
        return 0 if self.stack is None else self.stack.columns

    @property
    def width(self) -> int:
        """Slots of the middle."""
        config = self.stream.config
        return self.row.width if self.row.compactions else config.middle_allocation

    @property
    def config(self) -> ADMSConfig:
        """The settings."""
        return self.stream.config

    @property
    def wired(self) -> bool:
        """Whether queries are shown."""
        return self.stream.wired

    @property
    def buffer(self) -> Any:
        """All slots, used or not."""
        return None if self.stack is None else self.stack.tokens

    def __getattr__(self, name: str) -> Any:
        # Counters and what the modules remember, by their names there.
        stack = None if name.startswith("__") else self.__dict__["stream"].stack_of(0)
        for place in () if stack is None else (stack, stack.counts, stack.memory, stack.rows[0]):
            if hasattr(place, name):
                return getattr(place, name)
        raise AttributeError(name)
