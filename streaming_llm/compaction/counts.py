"""What compactions did, counted on the device: a compaction gives its counts as a result, whoever asked adds them up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass
class Counts:
    """Totals over rows, heads and layers; each an int, or a scalar tensor that is only read when somebody asks.

    Attributes:
        head_compactions: compactions of single (layer, row, head)s.
        kept_exact, kept_compressed, kept_sketches: tokens of these tiers after each.
        dropped: tokens taken out by them, merged into others or evicted.
        promotions: sketches whose originals returned.
        replay_triggers, replayed: heads that replayed, and originals they got back.
        calibrations: fits that placed synthetic tokens.
        adjustments: changes of a head's budget by the controller.
        asked, recalled: heads that asked the archive in a pass, and tokens they read from it.
    """

    head_compactions: torch.Tensor | int = 0
    kept_exact: torch.Tensor | int = 0
    kept_compressed: torch.Tensor | int = 0
    kept_sketches: torch.Tensor | int = 0
    dropped: torch.Tensor | int = 0
    promotions: torch.Tensor | int = 0
    replay_triggers: torch.Tensor | int = 0
    replayed: torch.Tensor | int = 0
    calibrations: torch.Tensor | int = 0
    adjustments: torch.Tensor | int = 0
    asked: torch.Tensor | int = 0
    recalled: torch.Tensor | int = 0

    def __add__(self, other: Counts) -> Counts:
        names = (item.name for item in dataclasses.fields(self))
        return Counts(**{name: _sum(getattr(self, name), getattr(other, name)) for name in names})


def _sum(own: torch.Tensor | int, other: torch.Tensor | int) -> torch.Tensor | int:
    return own if isinstance(other, int) and not other else own + other
