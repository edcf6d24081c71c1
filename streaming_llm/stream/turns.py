"""When rows are compacted: when they must be, and token by token one stack at a time, so that no step takes all of them.

A row's stacks that have as many tokens would all be due at one step. Each is then compacted a step before the next, the last
of them when it must be: from then on they stay that far apart, and each has `compression_interval` tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config import ADMSConfig
from ..store.row import Row
from ..store.stack import Stack


def rows_due(stacks: Sequence[Stack], counts: Sequence[int], config: ADMSConfig) -> list[set[int]]:
    """Which rows of each stack are to be compacted before `counts` new tokens of each row come.

    A row's turns depend on no other row. The first compaction is one of all stacks, as nothing is compacted below the bound,
    and so are those of a cache with an archive, whose layers go back together.
    """
    due = []
    for stack in stacks:
        due.append({number for number, row in enumerate(stack.rows) if row.overfull(config, counts[number])})
    if len(stacks) > 1 and all(stack.archive is None for stack in stacks):
        for number, count in enumerate(counts):
            if count == 1:
                for place in _early([stack.rows[number] for stack in stacks], config):
                    due[place].add(number)
    return due


def _early(rows: Sequence[Row], config: ADMSConfig) -> list[int]:
    """Of one row's places in the stacks those whose turn it is, one token before they must be compacted for each that has
    to go before them."""
    # Steps until each must be compacted: 0 for now.
    slack = [row.capacity(config) - row.length for row in rows]
    if min(slack) >= len(rows) or not all(row.compactions and row.length > row.resting(config) for row in rows):
        return []
    at_once = -(-len(rows) // config.compression_interval)
    order = sorted(range(len(rows)), key=slack.__getitem__)
    turns = max(place + 1 - at_once * slack[number] for place, number in enumerate(order))
    return order[: max(0, turns)]
