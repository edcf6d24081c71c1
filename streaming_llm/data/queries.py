"""The queries a layer remembers: what attention is taken over between passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Queries:
    """Reference queries of one layer.

    Attributes:
        states: `[batch, kv_heads, groups, window, head_dim]`, rotated, newest last; the newest belongs to the newest token.
        scale: what the logits are multiplied by.
        softcap: the model's logit soft-capping (Gemma 2), None without.
        step: how many tokens lie between a query and the next (1: every token's query is there).
    """

    states: torch.Tensor
    scale: float
    softcap: float | None = None
    step: int = 1

    @property
    def window(self) -> int:
        """Number of queries per head."""
        return self.states.shape[3]

    def part(self, index: slice, step: int = 1, at: slice = slice(None)) -> Queries:
        return Queries(self.states[at, :, :, index], self.scale, self.softcap, self.step * step)

    def last(self, window: int) -> Queries:
        """The newest `window` queries."""
        return self if self.window <= window else self.part(slice(self.window - window, None))

    def every(self, step: int) -> Queries:
        """Every `step`-th query, the newest among them."""
        return self if step == 1 else self.part(slice((self.window - 1) % step, None, step), step)

    def energy(self) -> torch.Tensor:
        """Mean square logit per unit of squared key length and dimension, float32 `[batch, kv_heads]`."""
        norm = torch.linalg.vector_norm(self.states.float(), dim=(2, 3, 4))
        return norm.square() / (self.states[0, 0].numel() or 1) * self.scale**2

    def logits(self, keys: torch.Tensor) -> torch.Tensor:
        """`softcap(q.k * scale)`, float32 `[batch, kv_heads, groups, window, tokens]`; no log-mass, no causality."""
        batch, heads, groups, window, dim = self.states.shape
        flat = self.states.reshape(batch, heads, groups * window, dim).float() * self.scale
        logits = flat @ keys.float().transpose(-1, -2)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.view(batch, heads, groups, window, keys.shape[2])
