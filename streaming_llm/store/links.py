"""What may change of archived tokens at a compaction; see `archive.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data.state import HeadState


@dataclass
class Links(HeadState):
    """What may change of archived tokens, tensors `[rows, kv_heads, slots]`, and what they are found by.

    Attributes:
        share: part of its representative's mass that is the token's own, in [0, 1].
        representative: slot of the middle whose token stands for it; -1 for none.
        open: whether the token may be recalled: it is there, and no token of the middle itself.
        basis: directions of the head's unrotated keys, float32 `[rows, kv_heads, head_dim, rank]`.
        mean: mean of these keys, float32 `[rows, kv_heads, 1, head_dim]`.
        step: what a code's unit is worth, float32 `[rows, kv_heads, 1, rank]`; 1 where codes are floating.
    """

    share: torch.Tensor
    representative: torch.Tensor
    open: torch.Tensor
    basis: torch.Tensor
    mean: torch.Tensor
    step: torch.Tensor

    def of_rows(self, index: torch.Tensor | None) -> Links:
        """The rows `index` of these; the very tensors for None, which is all."""
        return self if index is None else self.map(lambda own: own.index_select(0, index))

    def with_rows(self, index: torch.Tensor | None, links: Links) -> Links:
        """These with the rows `index` as in `links`; None for all."""
        if index is None:
            return links
        own = self.map(torch.clone)
        for name, tensor in own.tensors().items():
            tensor[index] = getattr(links, name)
        return own
