"""What the last pass recalled, as users see it."""

from __future__ import annotations

import torch

from .data.autograd import unrecorded
from .data.queries import Queries
from .maths.importance import attention_logits
from .store.stack import Stack


class RecalledMixin:
    """`cache.recalled(layer, head)` and `cache.recalled_passages()`."""

    @unrecorded()
    def recalled(self, layer_idx: int, head_idx: int, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What a KV head read from the archive in the last pass, and how strongly; nothing where it read nothing.

        Args:
            layer_idx, head_idx: the layer and its KV head; row: of the batch.

        Returns:
            `(positions, weights)`: the tokens' positions in the stream, int64 `[n]`, and the attention probability each
            drew, the mean over the pass's queries and the head's query heads, float32 `[n]`; the strongest first.

        Raises:
            IndexError: a layer, head or row there is not.
        """
        stack = self.stream.stack_of(layer_idx)
        heads = 0 if stack is None else _heads(stack)
        for name, value, most in (("head_idx", head_idx, heads), ("row", row, 0 if stack is None else stack.batch)):
            if not 0 <= value < most:
                raise IndexError(f"{name}={value} of layer_idx={layer_idx}: there are {most}")
        reading = self.stream.read.get(layer_idx)
        if reading is None or stack.archive is None:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        archive = stack.archive_of(layer_idx)
        at, head = slice(row, row + 1), slice(head_idx, head_idx + 1)
        query = reading.query.unflatten(1, (heads, -1))[at, head]
        queries = Queries(query, stack.scale, stack.softcap)
        held = stack.attended().map(lambda tensor: stack.of_layer(layer_idx, tensor)[at, head])
        beta, stop = held.beta.clone(), reading.first + reading.less.shape[2]
        beta[:, :, reading.first : stop] += reading.less[at, head][:, :, : beta.shape[2] - reading.first]
        logits = attention_logits(queries, held.keys, beta).flatten(0, 3)
        own = queries.logits(reading.keys[at, head]).flatten(0, 3)
        picked = reading.picked[row, head_idx]
        own = own.masked_fill(~picked, -torch.inf)
        weights = torch.cat([logits, own], dim=-1).softmax(-1)[:, logits.shape[-1] :].mean(0)
        order = weights.argsort(descending=True)[: int(picked.sum())]
        return archive.shelves.pos[row][reading.slots[row, head_idx]][order].round().long(), weights[order]

    def recalled_passages(self, most: int = 5, apart: int = 6, row: int = 0) -> list[tuple[float, int, int]]:
        """The passages that the last pass read from the archive, in all layers and heads.

        Args:
            most: passages at most; apart: how far from its strongest token a passage reaches; row: of the batch.

        Returns:
            `(weight, first, last)`, the strongest first: the attention probability that the passage's tokens drew together,
            averaged over layers and heads, and the positions of its first and last.
        """
        drawn: dict[int, float] = {}
        heads = [(layer, head) for stack in self.stream.stacks for layer in stack.layers for head in range(_heads(stack))]
        for layer, head in heads:
            positions, weights = self.recalled(layer, head, row)
            for position, weight in zip(positions.tolist(), weights.tolist(), strict=True):
                drawn[position] = drawn.get(position, 0.0) + weight / len(heads)
        passages = []
        while drawn and len(passages) < most:
            strongest = max(drawn, key=drawn.__getitem__)
            near = sorted(position for position in drawn if abs(position - strongest) <= apart)
            passages.append((sum(drawn.pop(position) for position in near), near[0], near[-1]))
        return sorted(passages, reverse=True)


def _heads(stack: Stack) -> int:
    return stack.tokens.keys.shape[1]
