"""Layers trade budget: what each loses at a compaction decides how much of the model's total it gets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..compaction.controller import layer_budgets
from ..store.stack import Stack
from .ranks import Ranks
from .upkeep import Upkeep

# Layers trade after so many compactions first, then after twice as many each time (much is still to be learnt), and at last
# every so many.
FIRST_TRADE, _EVERY = 2, 64


def next_trade(compactions: int) -> int:
    """After how many compactions layers that trade now do so again."""
    return min(2 * compactions, compactions + _EVERY)


def asked(lost: torch.Tensor) -> torch.Tensor:
    """What each layer lost, on the host: all that a device is ever asked between two passes, since budgets are shapes."""
    return lost.cpu()


def traded(
    stacks: Sequence[Stack], which: list[int], upkeep: Upkeep, layers_at_once: int, ranks: Ranks | None
) -> list[Stack]:
    """Compact rows that are due, in all layers, to budgets that follow what each layer lost.

    It asks the device once for all layers, which is why it is done rarely.

    Args:
        stacks: all of the cache, without slots for padding; rows `which` are equal in each.
        layers_at_once: layers of equal budgets to put into one stack.
        ranks: the processes the heads are spread over, which all trade now; None where each has all heads.
    """
    singles = sorted((stack.single(layer) for stack in stacks for layer in stack.layers), key=lambda own: own.layers)
    first = singles[0]
    losses = [1.0 - single.remembered(which).controller.energy.to(first.device).double().mean(-1) for single in singles]
    lost = torch.stack(losses, dim=-1)
    budgets = layer_budgets(asked(lost if ranks is None else ranks.mean(lost)), first.config.compressed_budget)
    # Rows of a batch that are all at one point keep one width; others are each as they would be alone.
    together = [which]
    if len(which) < first.batch:
        alike: dict[tuple, list[int]] = {}
        for row, own in zip(which, budgets.tolist(), strict=True):
            alike.setdefault(tuple(own), []).append(row)
        together = list(alike.values())
    for rows in together:
        own = budgets[[which.index(row) for row in rows]]
        widest, least = own.amax(0).tolist(), own.amin(0).tolist()
        singles = [
            _to_budget(single, rows, own[:, number], widest[number], least[number], upkeep)
            for number, single in enumerate(singles)
        ]
    return joined(singles, layers_at_once)


def _to_budget(single: Stack, rows: list[int], budgets: torch.Tensor, widest: int, least: int, upkeep: Upkeep) -> Stack:
    config = single.config
    agreed = torch.zeros(single.batch, dtype=torch.int64)
    agreed[rows] = budgets
    others = config.sketch_budget + config.replay_budget
    return upkeep.compacted(single, [rows], others + widest, agreed.to(single.device), least)


def joined(singles: Sequence[Stack], layers_at_once: int) -> list[Stack]:
    """Stacks of one layer each, put together where they are equal: at most `layers_at_once` in one."""
    alike: dict[tuple, list[Stack]] = {}
    for single in singles:
        shape = tuple(single.tokens.keys.shape), tuple(single.tokens.values.shape), single.tokens.keys.dtype
        key = (single.rows, single.device, shape, single.rope, single.scale, single.softcap)
        alike.setdefault(key, []).append(single)
    stacks = []
    for members in alike.values():
        for start in range(0, len(members), max(1, layers_at_once)):
            some = members[start : start + max(1, layers_at_once)]
            stacks.append(Stack.join(some, len(some)))
    return stacks


def runs(layers: Sequence[int], ropes: Sequence[object], size: int) -> list[tuple[int, ...]]:
    """Layers that share a stack from their first token on: neighbours whose keys turn alike, at most `size`."""
    groups = []
    for _, run in itertools.groupby(zip(layers, ropes, strict=True), key=lambda pair: pair[1]):
        alike = [layer for layer, _ in run]
        groups += [tuple(alike[start : start + size]) for start in range(0, len(alike), size)]
    return groups
