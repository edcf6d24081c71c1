"""What the modules of ADM++ remember of each head from one compaction to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import ADMSConfig
from ..data.state import HeadState
from ..maths.budgets import VarianceState
from .calibration import CalibrationState
from .controller import ControllerState
from .originals import Originals
from .replay import ReplayState


@dataclass
class Memory:
    """The state of each module that is on, None for the others; all of the same rows and heads.

    Attributes:
        originals: tokens kept outside the attended set, for promotion and replay.
        replay: what the replay tier knows.
        calibration: anchors and fits.
        controller: what compaction lost, and the budgets that follow.
        variance: how much the middles vary, and the budgets that follow.
    """

    originals: Originals | None = None
    replay: ReplayState | None = None
    calibration: CalibrationState | None = None
    controller: ControllerState | None = None
    variance: VarianceState | None = None

    @classmethod
    def empty(cls, config: ADMSConfig, keys: torch.Tensor, values: torch.Tensor, copies: int = 1) -> Memory:
        """Nothing remembered yet, for heads like those of `keys` and `values`, and `copies` times as many rows."""
        batch, heads, device = keys.shape[0] * copies, keys.shape[1], keys.device
        memory = cls()
        if config.sketch_budget or config.replay_budget:
            memory.originals = Originals.empty(keys, values, config.original_slots, copies)
        if config.replay_budget:
            memory.replay = ReplayState.empty(batch, heads, config.replay_budget, device)
        if config.enable_position_calibration:
            memory.calibration = CalibrationState.empty(batch, heads, config.calibration_window, device)
        if config.enable_adaptive_controller:
            memory.controller = ControllerState.empty(batch, heads, device)
        if config.use_adaptive_budget:
            memory.variance = VarianceState.empty(batch, heads, device)
        return memory

    def states(self) -> dict[str, HeadState]:
        """The states that are there, by name."""
        named = ((item.name, getattr(self, item.name)) for item in dataclasses.fields(self))
        return {name: state for name, state in named if state is not None}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Memory:
        """Each tensor replaced by `function(tensor)`."""
        return Memory(**{name: state.map(function) for name, state in self.states().items()})

    def with_exact(self) -> Memory:
        """The same, the originals' keys also kept as they are before any move."""
        return self if self.originals is None else dataclasses.replace(self, originals=self.originals.with_exact())
