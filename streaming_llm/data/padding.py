"""What attention masks called padding until now, and what a new mask changes of it.

The record lies on the host, as a list with a tuple of stretches `(start, stop)` of columns for each row, or an empty list
while no row has any. A mask is compared with it by two numbers a row, which come from its device with what is asked anyway.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

Stretches = tuple[tuple[int, int], ...]
# Weights begin here: no masks anyone gives have the same sum of fifth powers (modulo 2**64) and differ.
_FIRST = 1_000_003


@dataclass
class MaskChange:
    """What a mask changes of the columns seen.

    Attributes:
        real: what is a token from now on, bool `[batch, seen]`, on the host.
        hidden: of each row the tokens that are to be none any more, each by its age: the tokens that came after it, as the
            mask was before.
        shown: of each row the padding that is to be tokens, likewise.
    """

    real: torch.Tensor
    hidden: list[tuple[int, ...]]
    shown: list[tuple[int, ...]]


def _weights(start: int, stop: int, device: torch.device | str) -> torch.Tensor:
    return torch.arange(_FIRST + start, _FIRST + stop, device=device) ** 5


def mask_figures(past: torch.Tensor, padding: list[Stretches]) -> torch.Tensor:
    """What tells whether `past [batch, seen]`, 0 for padding, is as recorded: int64, `[batch]` where no padding is known,
    else `[2 * batch]`."""
    counts = past.shape[1] - past.count_nonzero(1)
    if not padding:
        return counts
    # Behind the last padding known the counts tell enough.
    end = past.shape[1] - real_tail(padding, past.shape[1])
    weighed = (past[:, :end] == 0) * _weights(0, end, past.device)
    return torch.cat([counts, weighed.sum(1)])


def known_figures(padding: list[Stretches], batch: int) -> list[int]:
    """What `mask_figures` gives for a mask as recorded."""
    pairs = [_figures(stretches) for stretches in padding] or [(0,)] * batch
    return [number for numbers in zip(*pairs, strict=True) for number in numbers]


@functools.lru_cache(maxsize=1024)
def _figures(stretches: Stretches) -> tuple[int, int]:
    weights = torch.cat([_weights(*stretch, "cpu") for stretch in ((0, 0), *stretches)])
    return len(weights), int(weights.sum())


def _stretches(real: torch.Tensor, start: int = 0) -> Stretches:
    """The stretches of padding in `real`, bool `[columns]`, whose first column is number `start`."""
    border = torch.ones(1, dtype=torch.int8)
    edges = torch.cat([border, real.to("cpu", torch.int8), border]).diff().nonzero()[:, 0].add_(start).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def with_columns(padding: list[Stretches], start: int, real: torch.Tensor) -> list[Stretches]:
    """The record with the columns from `start` on, `real [batch, new]`; what it knew of them is forgotten."""
    rows = []
    for before, own in zip(padding or [()] * len(real), real, strict=True):
        before = tuple((first, min(last, start)) for first, last in before if first < start)
        after = _stretches(own, start)
        if before and after and before[-1][1] == after[0][0]:
            after = ((before[-1][0], after[0][1]), *after[1:])
            before = before[:-1]
        rows.append(before + after)
    return rows if any(rows) else []


def real_tail(padding: list[Stretches], seen: int) -> int:
    """How many of the newest of the columns seen are real in every row."""
    return seen - max((stretches[-1][1] for stretches in padding if stretches), default=0)


def mask_change(past: torch.Tensor, padding: list[Stretches], loose: list[int], slots_kept: bool) -> MaskChange:
    """What a mask changes, refused where that is not held any more.

    Args:
        past: the mask of the columns seen, bool `[batch, seen]`, on the host.
        padding: the record.
        loose: how many of each row's newest tokens are held one by one.
        slots_kept: whether padding still has its slots.

    Raises:
        ValueError: it hides what was merged, or shows padding that is gone.
    """
    known = torch.ones_like(past)
    for row, stretches in enumerate(padding):
        for first, last in stretches:
            known[row, first:last] = False
    ages = known.sum(1, keepdim=True) - known.cumsum(1)
    hidden, shown = known & ~past, past & ~known
    _refuse(
        hidden & (ages >= torch.tensor(loose)[:, None]),
        0,
        [f"which are sinks or were merged: only the row's last {tokens} tokens can still be hidden" for tokens in loose],
    )
    if not slots_kept:
        _refuse(shown, 1, ["which were padding until now, and padding is not held any more"] * len(past))
    own = [[tuple(ages[row, which[row]].tolist()) for row in range(len(past))] for which in (hidden, shown)]
    return MaskChange(past, *own)


def _refuse(wrong: torch.Tensor, value: int, why: list[str]) -> None:
    for row in wrong.any(1).nonzero()[:1, 0].tolist():
        columns = wrong[row].nonzero()[:, 0].tolist()
        raise ValueError(
            f"attention_mask has {value} in row {row} for {len(columns)} of the columns {columns[0]} to {columns[-1]}, "
            f"{why[row]}. Leave them at {1 - value}, or call cache.reset() and give the whole text; rows that end far apart "
            "are better off with a cache each"
        )
