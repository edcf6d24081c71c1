"""What a compaction is asked, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compressors.base import Compressor
from ..config import ADMSConfig
from ..data.rope import Rope
from ..data.tokens import WeightedTokens
from .counts import Counts
from .memory import Memory
from .trace import Trace


@dataclass(frozen=True)
class Plan:
    """What a compaction is to do, the same for all its rows.

    Attributes:
        config: the settings.
        compressor: what makes the precision tier.
        rope: how keys turn with position; None where that is not known.
        width: slots of the middle afterwards, all tiers together.
        queries_seen: whether attention ever showed its queries.
        log_mass: whether attention sees log-mass.
        compactions: how many there were before this one.
        mass_share: what stays of the weight that tokens have for others; 1 for all.
        budgets: the controller's budgets that layers agreed on, int64 `[rows]`, and the least of them; None without.
        traces: whether it is to be told what became of each candidate.
        slots: slots the result is to have; those behind the recent window are as of untouched tokens.
    """

    config: ADMSConfig
    compressor: Compressor
    rope: Rope | None
    width: int
    queries_seen: bool = False
    log_mass: bool = False
    compactions: int = 0
    mass_share: float = 1.0
    budgets: tuple[torch.Tensor, int] | None = None
    traces: bool = False
    slots: int = 0


@dataclass
class Compacted:
    """What a compaction gives.

    Attributes:
        tokens: sinks, `width` slots of middle and recent window, one after the other; see `Plan.slots`.
        memory: what the modules remember now.
        counts: what was done.
        trace: what became of the candidates; None where `Plan.traces` did not ask.
    """

    tokens: WeightedTokens
    memory: Memory
    counts: Counts
    trace: Trace | None = None
