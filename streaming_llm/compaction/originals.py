"""Originals outside the attended set: tokens as they were before something else came to stand for them.

Each remembers which token stands for it and with what share of that token's mass, so that it can come back without counting
twice: what it brings is taken off its stand-in. Sketches are promoted from here (`dual_fidelity.py`), recent ones are
replayed (`replay.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..data.select import gather_tokens, put_tokens, top_slots
from ..data.state import HeadState
from ..data.tokens import CHANGED, SKETCH, UNUSED, WeightedTokens, as_held, squared_norm

_TINY = 1e-12
# Below this share of what it was a remainder's value is not found by subtraction, which would magnify every inaccuracy.
LEAST_REST = 0.5
# What a score counts for when originals are ranked, where the stand-in is no sketch and only replay can bring them back.
_FOR_REPLAY_ONLY = 1e-6


@dataclass
class Originals(HeadState):
    """A bounded store of originals per head, its slots in no particular order.

    Attributes:
        keys: `[batch, kv_heads, slots, head_dim]`, rotated to `pos`, to the bit as the model computed them (or as moved).
        values: `[batch, kv_heads, slots, value_dim]`.
        pos: `[batch, kv_heads, slots]`, float32.
        share: part of its stand-in's mass that is this token's, float32 in [0, 1].
        score: remembered importance when it was stored, float32.
        parent: slot of the middle whose token stands for it, int64.
        order: number of its arrival, rising; -1 for a free slot. int64.
        exact_keys, exact_pos: as for `WeightedTokens`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pos: torch.Tensor
    share: torch.Tensor
    score: torch.Tensor
    parent: torch.Tensor
    order: torch.Tensor
    exact_keys: torch.Tensor | None = None
    exact_pos: torch.Tensor | None = None

    @classmethod
    def empty(cls, keys: torch.Tensor, values: torch.Tensor, slots: int, copies: int = 1) -> Originals:
        """Free slots shaped, typed and placed like `keys` and `values`, for `copies` times as many rows."""
        batch, heads = keys.shape[0] * copies, keys.shape[1]

        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((batch, heads, slots), value, dtype=dtype, device=keys.device)

        return cls(
            keys=keys.new_zeros(batch, heads, slots, keys.shape[-1]),
            values=values.new_zeros(batch, heads, slots, values.shape[-1]),
            pos=full(0, torch.float32),
            share=full(0, torch.float32),
            score=full(0, torch.float32),
            parent=full(0, torch.int64),
            order=full(-1, torch.int64),
        )

    @property
    def valid(self) -> torch.Tensor:
        """Which slots hold an original, bool `[batch, kv_heads, slots]`."""
        return self.order >= 0

    @property
    def slots(self) -> int:
        """Originals a head may keep."""
        return self.order.shape[-1]

    @property
    def exact(self) -> bool:
        """Whether keys are kept as they were before any move."""
        return self.exact_keys is not None

    def with_exact(self) -> Originals:
        """The same with `exact_keys` and `exact_pos`, copies of what they are now."""
        return self if self.exact else dataclasses.replace(self, exact_keys=self.keys.clone(), exact_pos=self.pos.clone())

    def free(self, leaving: torch.Tensor) -> None:
        """Free the slots where `leaving [batch, kv_heads, slots]` is True, in place."""
        self.order.masked_fill_(leaving, -1)
        self.share.masked_fill_(leaving, 0)
        self.score.masked_fill_(leaving, 0)

    def take(self, index: torch.Tensor, picked: torch.Tensor, tier: int) -> WeightedTokens:
        """The originals in the slots `index [batch, kv_heads, n]` as untouched tokens; unused where not `picked`."""
        keys, values, pos = (gather_tokens(tensor, index) for tensor in (self.keys, self.values, self.pos))
        tokens = WeightedTokens.new(keys, values, pos)
        tokens.tier.fill_(tier)
        if self.exact:
            tokens.exact_keys, tokens.exact_pos = gather_tokens(self.exact_keys, index), gather_tokens(self.exact_pos, index)
        return tokens.where_valid(picked)

    def follow(self, assigned: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """The stand-ins were compacted: let every original know its new one, in place.

        Args:
            assigned: slot each old slot's token went to, int64 `[batch, kv_heads, old slots]`.
            before, after: mass of the old and of the new slots' tokens, `[batch, kv_heads, slots]`.
        """
        old = self.parent.clamp(max=assigned.shape[-1] - 1)
        new = assigned.gather(2, old)
        factor = before.clamp_min(_TINY).gather(2, old) / after.clamp_min(_TINY).gather(2, new)
        self.share.mul_(factor.clamp_max(1.0))
        self.parent.copy_(new)

    def store(
        self,
        tokens: WeightedTokens,
        share: torch.Tensor,
        parent: torch.Tensor,
        order: int,
        newest: int,
        sketches: torch.Tensor | None = None,
    ) -> None:
        """Keep the valid `tokens` (originals), in place; where there is no room the least worth keeping goes.

        Worth keeping are the `newest` last to arrive, whatever they scored, then those of highest score, sketches' first.

        Args:
            tokens: candidates `[batch, kv_heads, n, ...]`, oldest first.
            share, parent: as the attributes, `[batch, kv_heads, n]`.
            order: number of the first to arrive.
            newest: how many are kept for being the last to arrive.
            sketches: which slots of the middle hold a sketch, bool `[batch, kv_heads, middle]`; None where that is all one.
        """
        count = min(tokens.length, self.slots)
        if count == 0:
            return
        arrival = torch.arange(order, order + tokens.length, device=share.device)
        arrival = torch.where(tokens.valid, arrival, -1)
        score = torch.cat([self.score, tokens.score], 2)
        if sketches is not None:
            # For the ranking alone: what comes back brings the score it was stored with.
            stand_in = torch.cat([self.parent, parent], 2).clamp(max=sketches.shape[-1] - 1)
            score = torch.where(sketches.gather(2, stand_in), score, score * _FOR_REPLAY_ONLY)
        if newest:
            both = torch.cat([self.order, arrival], 2)
            last = both.topk(min(newest, both.shape[-1]), dim=2).values[..., -1:]
            score = score + (both >= last.clamp_min(0)) * (score.amax(-1, keepdim=True) + 1.0)
        held, new = score[:, :, : self.slots], score[:, :, self.slots :]
        best, index = torch.where(tokens.valid, new, -2.0).topk(count, dim=2)
        worst, slot = torch.where(self.valid, held, -1.0).topk(count, dim=2, largest=False)
        taken = best > worst
        fresh = {"keys": tokens.keys, "values": tokens.values, "pos": tokens.pos, "share": share, "score": tokens.score}
        if self.exact:
            fresh |= {"exact_keys": tokens.field("exact_keys"), "exact_pos": tokens.field("exact_pos")}
        for name, tensor in {**fresh, "parent": parent, "order": arrival}.items():
            own = getattr(self, name)
            chosen = gather_tokens(tensor, index).to(own.dtype)
            if own.dim() == 4:
                put_tokens(own, slot, torch.where(taken[..., None], chosen, gather_tokens(own, slot)))
            else:
                own.scatter_(2, slot, torch.where(taken, chosen, own.gather(2, slot)))


def is_original(tokens: WeightedTokens) -> torch.Tensor:
    """Which tokens are the model's own, to the bit: they stand for themselves alone. Bool `[batch, kv_heads, tokens]`."""
    own = (tokens.count == 1) & (tokens.beta == 0)
    return own & (tokens.tier != SKETCH) & (tokens.tier != UNUSED)


def take_off(
    tokens: WeightedTokens,
    originals: Originals,
    leaving: torch.Tensor,
    log_mass: bool = True,
    most: int | None = None,
    sketches_only: bool = False,
) -> WeightedTokens:
    """The stand-ins without the originals that come back; these are freed in `originals`, in place.

    With shares `s` of those that leave a stand-in `c`: `beta_c += log(1 - sum s)` and, where at least half of it stays,
    `v_c = (v_c - sum s v) / (1 - sum s)`. Their `count` goes with them. A sketch keeps its key and value: they are averages
    of what may be averages themselves. A stand-in nothing is left of becomes an unused slot.

    Args:
        tokens: the middle, whose slots `originals.parent` names.
        leaving: which originals come back, bool `[batch, kv_heads, slots]`, valid ones only.
        log_mass: False where the model's attention does not see `beta`, which then stays 0.
        most: how many of a head leave at most, where that is known.
        sketches_only: True where only sketches lose originals: no value changes then.
    """
    parent = originals.parent.clamp(max=tokens.length - 1)
    share = originals.share * leaving
    gone = torch.zeros_like(tokens.beta).scatter_add_(2, parent, share)
    count = tokens.count - torch.zeros_like(tokens.count).scatter_add_(2, parent, leaving.to(tokens.count.dtype))
    touched = count != tokens.count
    rest = (1.0 - gone).clamp(1e-3, 1.0)
    values = tokens.values
    if not sketches_only:
        index, _ = top_slots(share, leaving, min(originals.slots, most or originals.slots))
        at = parent.gather(2, index)
        own = gather_tokens(originals.values, index).float() * share.gather(2, index)[..., None]
        # Of each that leaves, what leaves its stand-in altogether: several may have one, and all of them write the same.
        together = (at[..., :, None] == at[..., None, :]).to(own.dtype) @ own
        before = gather_tokens(values, at)
        remainder = (before.float() - together) / rest.gather(2, at)[..., None]
        changed = (touched & (tokens.tier != SKETCH) & (rest >= LEAST_REST)).gather(2, at)
        values = values.clone(memory_format=torch.contiguous_format)
        put_tokens(values, at, torch.where(changed[..., None], as_held(remainder, values.dtype), before))
    beta = tokens.beta
    if log_mass:
        less = beta + rest.log()
        beta = torch.where(touched, torch.where(less == 0, CHANGED, less), beta)
    result = dataclasses.replace(
        tokens,
        values=values,
        beta=beta,
        mass=torch.where(touched, tokens.mass * rest, tokens.mass),
        count=count,
    )
    originals.share.div_(rest.gather(2, parent)).clamp_(0.0, 1.0)
    originals.free(leaving)
    return result.where_valid(tokens.valid & (count > 0))


def spread_pick(priority: torch.Tensor, valid: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`width` of the valid slots, evenly subsampled where there are more.

    Args:
        priority: what the slots are ranked by before every n-th is taken, `[batch, kv_heads, slots]`.

    Returns:
        `(index, picked)`, both `[batch, kv_heads, width]`, by falling priority.
    """
    slots = valid.shape[-1]
    order = torch.where(valid, priority, -torch.inf).argsort(dim=2, descending=True, stable=True)
    total = valid.sum(-1, keepdim=True)
    rank = torch.arange(slots, device=valid.device)
    # Of `total` in order, the r-th is taken where the running quota r * width / total reaches the next whole number.
    quota = torch.clamp(total, min=width)
    chosen = (rank < total) & ((rank + 1) * width // quota > rank * width // quota)
    index, picked = top_slots(-rank.float().expand(chosen.shape), chosen, min(width, slots))
    return order.gather(2, index), picked


def stand_in_error(tokens: WeightedTokens, originals: Originals) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of each stand-in over its stored originals, and their squared norm.

    Returns:
        `(error, norm)`, float32 `[batch, kv_heads, tokens]`: sums of `|k_j - k_c|^2 + |v_j - v_c|^2` and of
        `|k_j|^2 + |v_j|^2` over the originals `j` that `c` stands for, keys and values each over its own mean square.
    """
    parent = originals.parent.clamp(max=tokens.length - 1)
    valid = originals.valid
    error = torch.zeros_like(tokens.beta)
    norm = torch.zeros_like(tokens.beta)
    for own, made in ((originals.keys, tokens.keys), (originals.values, tokens.values)):
        own = own.float()
        size = squared_norm(own) * valid
        level = size.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1)
        difference = squared_norm(own - gather_tokens(made, parent).float()) * valid
        error.scatter_add_(2, parent, difference / level.clamp_min(_TINY))
        norm.scatter_add_(2, parent, size / level.clamp_min(_TINY))
    return error, norm
