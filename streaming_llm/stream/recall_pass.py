"""What a pass through one stack recalls, layer by layer, once the queries of each are known."""

from __future__ import annotations

import torch

from ..attend.recall import Recalled, asking, chosen, closed_up, lighter, turned_basis, turned_queries
from ..compaction.counts import Counts
from ..store.archive import Archive
from ..store.stack import Stack
from .arrival import Arrival


class RecallPass:
    """See the module.

    Args:
        stack: as the pass found it; arrival: what came.
        positions: of the new tokens, `[batch or 1, new]`.
        real: which of them are no padding, bool `[batch, new]`; None where all are.

    Attributes:
        recalled: what each layer read.
        counts: how often it asked and how much it read.
    """

    def __init__(self, stack: Stack, arrival: Arrival, positions: torch.Tensor, real: torch.Tensor | None):
        self.stack, self.arrival, self.positions, self.real = stack, arrival, positions, real
        # Where the ring has turned, what is left is anywhere in it.
        self.live = [min(stack.archive.slots, row.archived) for row in stack.rows]
        self.recalled: dict[int, Recalled] = {}
        self._bases: dict[float, torch.Tensor] = {}

    @classmethod
    def of(cls, stack: Stack, arrival: Arrival, positions: torch.Tensor, real: torch.Tensor | None) -> RecallPass | None:
        """None where there is nothing to recall."""
        if stack.archive is None or not stack.config.recall_budget or not any(row.archived for row in stack.rows):
            return None
        return cls(stack, arrival, positions, real)

    @property
    def counts(self) -> Counts:
        """See the class."""
        picked = [found.picked.sum() for found in self.recalled.values()]
        asked = sum(found.picked.shape[0] * found.picked.shape[1] for found in self.recalled.values())
        return Counts(asked=asked, recalled=torch.stack(picked).sum() if picked else 0)

    def recall(self, layer: int, query: torch.Tensor, scale: float, stop: int | None) -> Recalled:
        """Choose and read what a layer's queries ask for.

        Args:
            query: `[batch, heads, new, head_dim]`, rotated; scale: what logits are multiplied by.
            stop: slots in use, the new tokens among them, behind which there may be room; None where the pass is elsewhere.
        """
        stack, config, archive = self.stack, self.stack.config, self.stack.archive_of(layer)
        most = max(config.recall_budget, config.recall_chunk_budget)
        budgets = [min(config.recall_budget * max(count, 1), most) for count in self.arrival.counts]
        slots, picked = chosen(self._scores(layer, archive, query, scale), budgets)
        keys, values, share, representative = archive.read(slots)
        first, moved = config.dynamic_start_size, [row.moved for row in stack.rows]
        if stack.rope is not None and stack.rope.rotates and any(moved):
            pos, rotated = archive.positions(slots, moved)
            keys = stack.rope.move(keys, rotated, closed_up(pos, picked, first))
        less = lighter(share, representative, picked, max(row.width for row in stack.rows))
        room = None if stop is None else self._beside(layer, keys, values, stop)
        self.recalled[layer] = Recalled(keys, values, picked, slots, less, first, query.detach(), room)
        return self.recalled[layer]

    def _scores(self, layer: int, archive: Archive, query: torch.Tensor, scale: float) -> torch.Tensor:
        """How much each archived token is asked for, `[batch, kv_heads, tokens]`."""
        rope, real = self.stack.rope, self.real
        if scale not in self._bases:
            links = self.stack.archive.links
            basis = links.basis * (links.step * scale)
            if query.shape[2] == 1:
                rows = len(self.stack.layers) if len(self.positions) > 1 else 1
                basis = turned_basis(basis, self.positions.repeat(rows, 1), rope)
            self._bases[scale] = basis
        if query.shape[2] > 1:
            query, positions, real = asking(query, self.positions, real)
            query = turned_queries(query, positions, rope)
        return archive.scores(query, self.stack.of_layer(layer, self._bases[scale]), self.live, real)

    def _beside(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Put keys and values behind the new tokens, where no row has any, and return all of the layer's; None where there
        is no room."""
        stack, stop = self.stack, start + keys.shape[2]
        # The last slot of rows of different length is where padding goes.
        if stop >= stack.tokens.length:
            return None
        both = []
        for whole, new in ((stack.tokens.keys, keys), (stack.tokens.values, values)):
            own = stack.of_layer(layer, whole)
            own[:, :, start:stop] = new
            both.append(own[:, :, :stop])
        return tuple(both)
