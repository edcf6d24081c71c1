"""Where one row of the batch stands: how many tokens it holds and has seen, and when it is due for a compaction."""

from __future__ import annotations

from typing import NamedTuple

from ..config import ADMSConfig


class Row(NamedTuple):
    """Where a row of a stack stands, the same in all its layers. Rows at the same `point` are worked on together.

    Attributes:
        length: slots in use; padding uses none.
        seen: tokens of the stream.
        width: slots of the middle; those there will be, before the first compaction.
        compactions: how many there were.
        least: what the layers' agreement leaves the head with the smallest budget; 0 where they never agreed on any.
        kept: queries kept from before the last compaction, `queries`: all that are stored, `scored`: those that count
            in the scores already; they come in this order.
        archived: tokens that came to the archive, without those that were taken back.
        oldest: number of the first archived token that may be there: tokens that were taken back since have overwritten
            those before it.
        moved: by how much positions were moved back so far.
    """

    length: int = 0
    seen: int = 0
    width: int = 0
    compactions: int = 0
    least: int = 0
    kept: int = 0
    queries: int = 0
    scored: int = 0
    archived: int = 0
    oldest: int = 0
    moved: int = 0

    @property
    def point(self) -> Row:
        """All of it but how many tokens went by: what decides which of the row's slots and queries are what."""
        return self._replace(seen=0)

    def resting(self, config: ADMSConfig) -> int:
        """Slots in use right after a compaction."""
        return config.dynamic_start_size + self.width + config.recent_size

    def slots(self, config: ADMSConfig) -> int:
        """Slots the row needs in the buffer."""
        return self.resting(config) + config.compression_interval + config.recall_room

    def capacity(self, config: ADMSConfig) -> int:
        """Slots that may be in use between two passes."""
        return self.slots(config) - config.recall_room if self.compactions else config.expected_max_tokens

    def overfull(self, config: ADMSConfig, new: int) -> bool:
        """Whether `new` more tokens would not fit, and a compaction can make room."""
        width = self.width if self.compactions else config.middle_allocation
        fixed = config.dynamic_start_size + config.recent_size
        return self.length + new > self.capacity(config) and self.length - fixed > width

    def after(self, new: int) -> Row:
        """The row with `new` more tokens."""
        return self._replace(length=self.length + new, seen=self.seen + new)

    def cropped(self, gone: int) -> Row:
        """The row without its last `gone` tokens."""
        queries = max(0, self.queries - gone)
        return self._replace(
            length=self.length - gone,
            seen=self.seen - gone,
            queries=queries,
            kept=min(self.kept, queries),
            scored=min(self.scored, queries),
        )

    def rewound(self, gone: int, config: ADMSConfig, cap: int) -> Row:
        """The row without its last `gone` tokens, more than are held one by one.

        Its recent window is read from the archive, which keeps `cap` tokens, and what is in the window leaves the archive.
        """
        oldest, end = self.first_archived(cap), self.archived + self.exact_length(config) - gone
        start = max(oldest, end - config.recent_size)
        length = config.dynamic_start_size + self.width + end - start
        return self._replace(
            length=length, seen=self.seen - gone, queries=0, kept=0, scored=0, archived=start, oldest=oldest
        )

    def first_archived(self, cap: int) -> int:
        """Number of the oldest token in an archive that keeps `cap`."""
        return max(self.oldest, self.archived - cap)

    def archives_all(self, config: ADMSConfig, exact: int) -> bool:
        """Whether all tokens but the sinks and the newest `exact` are in the archive."""
        there = self.archived - self.first_archived(config.recall_tokens)
        return there == self.seen - exact - config.dynamic_start_size

    def reach(self, config: ADMSConfig, cap: int) -> int:
        """How many of the newest tokens can be taken back: those held one by one, and those in an archive of `cap`."""
        return self.exact_length(config) + self.archived - self.first_archived(cap)

    def exact_length(self, config: ADMSConfig) -> int:
        """How many of the newest tokens are held one by one."""
        return self.length - (config.dynamic_start_size + self.width if self.compactions else 0)
