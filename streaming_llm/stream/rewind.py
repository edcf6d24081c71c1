"""The newest tokens are taken back: those held one by one are let go, and where that is not all, the archive tells the rest.

The recent window is then read from the archive. What had been made of later tokens stays, without their part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..compaction.memory import Memory
from ..data.tokens import WeightedTokens, concatenate
from ..store.removal import archived_window, true_position, without
from ..store.stack import Part, Stack
from .positions import PositionWindow
from .upkeep import at_positions, moved_memory


def cropped(stack: Stack, gone: int, done: Sequence[int] = ()) -> Stack:
    """The stack without the last `gone` tokens of each row, which must be held one by one and real.

    The rows `done` hold nothing of them any more.
    """
    if not gone:
        return stack
    rows = tuple(row if number in done else row.cropped(gone) for number, row in enumerate(stack.rows))
    real = None if stack.real is None else stack.real[:, : stack.columns - gone]
    # Nothing uses these slots any more: they are as those of untouched tokens again.
    ends = [row.length if real is None else real.shape[1] for row in rows]
    ends = torch.tensor(ends, device=stack.device).repeat(len(stack.layers))
    free = torch.arange(stack.tokens.length, device=stack.device) >= ends[:, None]
    return dataclasses.replace(
        stack,
        rows=rows,
        seen=stack.seen - gone,
        tail=stack.tail - gone,
        real=real,
        tokens=stack.tokens.cleared(free[:, None]),
    )


def rewound(stacks: Sequence[Stack], gone: int, window: PositionWindow) -> tuple[list[Stack], PositionWindow, list[int]]:
    """The stacks without the last `gone` tokens of each row, held one by one or archived.

    Returns:
        `(stacks, window, shifts)`: and their positions, moved less where the next token would have no place otherwise, and
        how far back each row was moved by that, none of them more than 0.
    """
    window = window.copy()
    window.remove(gone)
    due = [number for number, row in enumerate(stacks[0].rows) if row.exact_length(stacks[0].config) < gone]
    if not due:
        return [cropped(stack, gone) for stack in stacks], window, []
    lengths = [0] * stacks[0].batch
    for number in due:
        rows = [stack.rows[number].rewound(gone, stack.config, stack.archive_cap) for stack in stacks]
        lengths[number] = max(row.length for row in rows)
    before = window.offsets * len(lengths) if len(window.offsets) == 1 else window.offsets
    moved = window.rewind(lengths)
    shifts = [after - own for after, own in zip(moved, before, strict=True)]
    return [_rewound(stack, gone, due, moved) for stack in stacks], window, shifts


def _rewound(stack: Stack, gone: int, due: Sequence[int], moved: Sequence[int]) -> Stack:
    classes = stack.classes(lambda number: (number in due, moved[number]))
    parts = [_rewound_rows(stack, which, gone, moved[which[0]]) for which in classes if which[0] in due]
    back = stack.with_parts(parts)
    # What a row has seen is its own, whatever is done to it: here it is to be less.
    rows = [row._replace(seen=row.seen - gone) if number in due else row for number, row in enumerate(back.rows)]
    return cropped(dataclasses.replace(back, rows=tuple(rows)), gone, due)


def _rewound_rows(stack: Stack, which: Sequence[int], gone: int, moved: int) -> Part:
    """Equal rows, whose positions are moved `moved` from now on, without more tokens than they hold one by one."""
    part, archive, config = stack.part(which), stack.archive, stack.config
    row, index, held = part.row, stack.index(which), part.tokens
    after = row.rewound(gone, config, stack.archive_cap)
    first, last = config.dynamic_start_size, config.dynamic_start_size + row.width
    window = range(after.archived, after.archived + after.length - last)
    middle, links, rest = without(archive, index, row, window.start, held.slice(first, last))
    turns = stack.rope is not None and stack.rope.rotates
    begins = true_position(archive, which, window.start, middle.beta)
    memory = _remembered(part.memory, middle, rest, begins - row.moved)
    forward = row.moved - moved
    if forward:
        memory = moved_memory(stack, memory, -forward, turns)
    # What stands for tokens some of which are gone may be made of later ones: it is to stand before the window.
    pos = torch.minimum(middle.pos + forward, (begins - moved - 1).clamp_min(0))
    pos = torch.where(middle.valid, pos, middle.pos)
    middle = dataclasses.replace(middle, **at_positions(stack, middle, pos, turns))
    recent = archived_window(archive, index, which, window, moved, held, stack.rope)
    tokens = concatenate([held.slice(0, first), middle, recent])
    return part._replace(row=after._replace(moved=moved), tokens=tokens, memory=memory, links=links)


def _remembered(memory: Memory, middle: WeightedTokens, rest: torch.Tensor, begins: torch.Tensor) -> Memory:
    """What the modules remember without the originals at `begins` and later, and those nothing stands for any more.

    Args:
        rest: part of its mass that each token of the middle has left.
    """
    memory = memory.map(torch.clone)
    originals = memory.originals
    if originals is not None and originals.slots and middle.length:
        parent = originals.parent.clamp(max=middle.length - 1)
        originals.share.div_(rest.gather(2, parent)).clamp_(0.0, 1.0)
        originals.free((originals.pos >= begins) | ~middle.valid.gather(2, parent))
    return memory
