"""Where in the model's trained length a stream stands: positions that stay below it, however long the stream.

RoPE depends on differences of positions only, so all that is held can be moved together. StreamingLLM (Xiao et al. 2023,
arXiv 2309.17453) counts positions within the cache; here they are the true ones while they fit, and then those of a window
that is moved on in large steps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

# Where the next token stands after a move, in parts of the window: the farther back, the rarer the moves.
TARGET = 0.5


@dataclass
class PositionWindow:
    """The positions of a cache's rows.

    Attributes:
        policy: `auto`, `absolute` or `cache`; see `ADMSConfig.position_policy`.
        limit: positions there are, None for no limit.
        fixed: why stored keys can't be moved, None where they can.
        offsets: what is subtracted from true positions, per row; one number where all rows have the same.
        following: true position of the next token, likewise; None before the first token.
    """

    policy: str = "absolute"
    limit: int | None = None
    fixed: str | None = None
    offsets: list[int] = field(default_factory=lambda: [0])
    following: list[int] | None = None

    def copy(self) -> PositionWindow:
        """One that may go on without this one."""
        return dataclasses.replace(self, offsets=list(self.offsets), following=self.following and list(self.following))

    def span(self, positions: torch.Tensor | None, real: torch.Tensor | None, counts: list[int] | None, new: int):
        """First and last true position of the new tokens of each row, as two lists (of one number where all are the same).

        Args:
            positions: what the model was given `[batch or 1, new]`; None to count on.
            real, counts: as for `layer.Arrival`.
        """
        known = [0] if self.following is None else self.following
        trusted = new == 1 and counts is None and self.following is not None
        if positions is None or (trusted and positions.device.type != "cpu"):
            # An accelerator is not asked what every step brings: the next token is the next token.
            rows = len(counts) if counts is not None else len(known)
            known = known * rows if len(known) == 1 else known
            counts = [new] * rows if counts is None else counts
            return known, [start + count - 1 for start, count in zip(known, counts, strict=True)]
        if real is None:
            ends = positions[:, [0, -1]].tolist()
            if all(pair == ends[0] for pair in ends) and len(known) == 1:
                ends = ends[:1]
            return [first for first, _ in ends], [last for _, last in ends]
        positions = positions.expand(real.shape).to(real.device)
        huge = torch.iinfo(torch.int64).max
        first = torch.where(real, positions.long(), huge).amin(-1)
        last = torch.where(real, positions.long(), -1).amax(-1)
        known = known * len(real) if len(known) == 1 else known
        pairs = zip(torch.stack([first, last], -1).tolist(), known, counts, strict=True)
        pairs = [(low, high) if count else (start, start - 1) for (low, high), start, count in pairs]
        return [low for low, _ in pairs], [high for _, high in pairs]

    def plan(self, first: list[int], last: list[int], held: list[int]) -> list[int]:
        """How far each row's tokens must move back before tokens at these true positions come.

        Args:
            first, last: what `span` gave.
            held: slots in use by each row (one number for all).

        Raises:
            ValueError: they can't be given positions below the limit; nothing has changed.
        """
        rows = max(len(first), len(self.offsets), len(held))
        first, last, held, offsets = (x * rows if len(x) == 1 else x for x in (first, last, held, self.offsets))
        shifts = []
        for low, high, slots, offset in zip(first, last, held, offsets, strict=True):
            if high < low:
                shifts.append(0)
                continue
            start, stop = low - offset, high - offset
            if start < 0:
                raise ValueError(f"position_ids start at {low}, before what the cache has seen; call cache.reset() first")
            over = self.limit is not None and stop >= self.limit
            if self.policy == "absolute" or not (over or (self.policy == "cache" and start > slots)):
                if over:
                    raise ValueError(self._refusal(high))
                shifts.append(0)
                continue
            if self.fixed is not None:
                raise ValueError(self._refusal(high))
            goal = slots if self.policy == "cache" or not slots else max(slots, int(self.limit * TARGET))
            span = high - low + 1
            if self.limit is not None:
                if slots + span > self.limit:
                    raise ValueError(
                        f"{span} new tokens beside {slots} held do not fit into the {self.limit} positions the model was "
                        "made for: give fewer at a time (generate(prefill_chunk_size=...)) or choose smaller budgets"
                    )
                goal = min(goal, self.limit - span)
            shifts.append(max(0, start - goal))
        return shifts

    def _refusal(self, position: int) -> str:
        why = self.fixed or "position_policy='absolute' keeps positions as they are; 'auto' keeps them inside that length"
        return f"position {position} is past the {self.limit} positions the model was made for, and {why}"

    def move(self, shifts: list[int]) -> None:
        """The rows' tokens were moved back so far."""
        offsets = self.offsets * len(shifts) if len(self.offsets) == 1 else self.offsets
        self.offsets = _common([offset + shift for offset, shift in zip(offsets, shifts, strict=True)])

    def place(
        self, positions: torch.Tensor | None, real: torch.Tensor | None, first: list[int], new: int, counting: bool, device
    ) -> torch.Tensor | None:
        """The positions to give the model, `[batch or 1, new]`; None where it may count for itself.

        Args:
            first: true position of each row's first new token.
            counting: whether the model would count right.
        """
        if positions is None:
            if counting and not any(self.offsets):
                return None
            rows = max(len(first), len(self.offsets))
            starts = torch.tensor(first, device=device).expand(rows)[:, None]
            steps = torch.arange(new, device=device)[None] if real is None else real.to(device).long().cumsum(-1) - 1
            positions = starts + steps
        elif not any(self.offsets):
            return positions
        return (positions - torch.tensor(self.offsets, device=positions.device)[:, None]).clamp_min(0)

    def follow(self, last: list[int]) -> None:
        """Tokens up to these true positions have come."""
        self.following = _common([position + 1 for position in last])

    def remove(self, gone: int) -> None:
        """The last `gone` tokens of each row are taken back."""
        if self.following is not None:
            self.following = [position - gone for position in self.following]

    def rewind(self, held: list[int]) -> list[int]:
        """Move less where so many tokens were taken back that the next would stand before its own slot.

        Args:
            held: slots in use by each row, those there are now.

        Returns:
            What is now subtracted from each row's true positions.
        """
        following, offsets = (known * len(held) if len(known) == 1 else known for known in (self.following, self.offsets))
        less = []
        for start, offset, slots in zip(following, offsets, held, strict=True):
            if start - offset < slots:
                goal = slots if self.policy == "cache" or self.limit is None else max(slots, int(self.limit * TARGET))
                offset = min(offset, max(0, start - goal))
            less.append(offset)
        self.offsets = _common(less)
        return less

    def pick(self, rows: list[int]) -> None:
        """Row `i` becomes what row `rows[i]` was."""
        for name in ("offsets", "following"):
            known = getattr(self, name)
            if known is not None and len(known) > 1:
                setattr(self, name, _common([known[row] for row in rows]))

    def reset(self) -> None:
        """As before the first token."""
        self.offsets, self.following = [0], None


def _common(numbers: list[int]) -> list[int]:
    return numbers[:1] if all(number == numbers[0] for number in numbers) else numbers
