"""Dual-fidelity mid memory: what overflows the precision tier becomes sketches that lead back to their originals.

A sketch is one weighted token for a cluster of similar ones. Its log-mass is its members' attention over what its own key
draws, as in `compressors/vq.py`; its residual energy says how badly it stands for the originals that are still stored. By
hand clusters grow round density peaks (Rodriguez & Laio 2014, Science 344), in a compaction round what the compressor kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..compressors.merge import features, squared_distance
from ..config import SKETCH_REDUCTIONS
from ..data.autograd import unrecorded
from ..data.select import add_tokens, gather_tokens, top_in_order
from ..data.state import HeadView
from ..data.tokens import EXACT, SKETCH, UNUSED, WeightedTokens, concatenate
from .originals import Originals, spread_pick, stand_in_error, take_off

_TINY = 1e-12
# A key that draws next to nothing would need a log-mass that explodes for the query it does suit: this share of the average
# mass of a token is added to what is drawn and to what should be, and the gain is bounded.
_FAINT = 0.1
_MOST_LOG_GAIN = 1.0


def reduce_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    assigned: torch.Tensor,
    clusters: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters of tokens reduced to one key and one value each.

    Args:
        keys, values: `[batch, kv_heads, tokens, dim]`, oldest first.
        weight: of each token, `[batch, kv_heads, tokens]`; 0 for what is in no cluster.
        assigned: each token's cluster, int64 `[batch, kv_heads, tokens]`.
        clusters: how many there are.
        reduction: `mean` (weighted), `sum` (weighted), or `first` (the first member as it is).

    Returns:
        float32 `[batch, kv_heads, clusters, dim]` each; zeros for an empty cluster.
    """
    if reduction not in SKETCH_REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {', '.join(SKETCH_REDUCTIONS)}")
    if reduction == "first":
        first, some = _first_member(weight > 0, assigned, clusters)
        return tuple(gather_tokens(states, first).float() * some[..., None] for states in (keys, values))
    if reduction == "mean":
        weight = weight / _summed(weight, assigned, clusters).clamp_min(_TINY).gather(2, assigned)

    def added(states: torch.Tensor) -> torch.Tensor:
        weighted = states.float() * weight[..., None]
        sums = weighted.new_zeros(*states.shape[:2], clusters, states.shape[-1])
        add_tokens(sums, assigned, weighted)
        return sums

    return added(keys), added(values)


def _summed(values: torch.Tensor, assigned: torch.Tensor, clusters: int) -> torch.Tensor:
    """Sums of `values [batch, kv_heads, tokens]` over each cluster, in their dtype."""
    return values.new_zeros(*values.shape[:2], clusters).scatter_add_(2, assigned, values)


def _first_member(member: torch.Tensor, assigned: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of each cluster's first member, and whether it has any; both `[batch, kv_heads, clusters]`."""
    tokens = member.shape[-1]
    place = torch.where(member, torch.arange(tokens, device=member.device), tokens)
    first = torch.full((*member.shape[:2], clusters), tokens, device=member.device)
    first = first.scatter_reduce(2, assigned, place, "amin")
    return first.clamp(max=max(tokens - 1, 0)), first < tokens


@unrecorded()
def residual_energy(
    original_k: torch.Tensor, original_v: torch.Tensor, approx_k: torch.Tensor, approx_v: torch.Tensor
) -> torch.Tensor:
    """Error norm over original norm of an approximation, 0 = perfect; each `[batch, kv_heads, tokens, dim]`.

    Token by token where there are as many; otherwise each original against its best stand-in. No originals: 0; no
    approximation: 1.

    Returns:
        float32 `[batch, kv_heads]` in [0, 1].
    """
    original = torch.cat([original_k.float(), original_v.float()], -1)
    approx = torch.cat([approx_k.float(), approx_v.float()], -1)
    norm = original.square().sum((2, 3))
    if original.shape[2] == 0:
        return torch.zeros_like(norm)
    if approx.shape[2] == 0:
        return torch.ones_like(norm)
    if approx.shape[2] != original.shape[2]:
        approx = gather_tokens(approx, squared_distance(original, approx).argmin(-1))
    error = (original - approx).square().sum((2, 3))
    return torch.nan_to_num((error / norm.clamp_min(_TINY)).sqrt(), nan=1.0, posinf=1.0).clamp(0.0, 1.0)


def similar_clusters(tokens: WeightedTokens, clusters: int, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Assign each valid token to one of at most `clusters` clusters of similar ones.

    Args:
        scale: what values are multiplied by beside keys (`merge.value_scale`).
        weight: `[batch, kv_heads, tokens]`; tokens of large weight far from any of larger weight become the centres.

    Returns:
        int64 `[batch, kv_heads, tokens]`; what it holds for slots that are not valid means nothing.
    """
    valid = tokens.valid
    states = features(tokens.keys, tokens.values, scale)
    distance = squared_distance(states, states)
    order = torch.arange(tokens.length, device=weight.device)
    same = (weight[:, :, None, :] == weight[..., None]) & (order[None, :] < order[:, None])
    heavier = ((weight[:, :, None, :] > weight[..., None]) | same) & valid[:, :, None, :]
    reach = distance.masked_fill(~heavier, torch.inf).amin(-1)
    farthest = distance.masked_fill(~valid[:, :, None, :], 0.0).amax(-1)
    index, picked = top_in_order(weight * torch.minimum(reach, farthest), valid, clusters)
    to_centre = gather_tokens(distance.transpose(-1, -2), index).transpose(-1, -2)
    assigned = to_centre.masked_fill(~picked[:, :, None, :], torch.inf).argmin(-1)
    # A centre is its own, also where another lies in the same place.
    own = torch.arange(clusters, device=weight.device).expand_as(index)
    return assigned.scatter(2, index, torch.where(picked, own, assigned.gather(2, index)))


def make_sketches(
    members: WeightedTokens,
    assigned: torch.Tensor,
    clusters: int,
    reduction: str,
    draws: Callable[[torch.Tensor], torch.Tensor] | None,
) -> WeightedTokens:
    """One weighted token for each cluster of the members, with all their mass.

    Args:
        members: weighted tokens, oldest first; invalid slots take no part.
        assigned: each member's cluster, int64 `[batch, kv_heads, members]`.
        reduction: `mean` weighs the members by how many tokens they are, `sum` by their attention mass (the sum of what
            they contribute, over the mass that `beta` then carries), `first` keeps the first member's key and value.
        draws: mean attention probability that given keys draw by themselves, `[batch, kv_heads, clusters, dim]` to
            `[batch, kv_heads, clusters]`; None where no query is known or log-mass is not seen: `beta` then stays 0.

    Returns:
        `clusters` weighted tokens, empty ones unused. A cluster of one is that token as it was.
    """
    valid = members.valid
    mass = members.mass if draws is not None else members.count.float()
    mass = torch.where(valid, mass.clamp_min(_TINY), 0.0)
    weight = torch.where(valid, members.count.float(), 0.0) if reduction == "mean" else mass
    keys, values = reduce_tokens(members.keys, members.values, weight, assigned, clusters, reduction)
    if reduction == "sum":
        size = _summed(weight, assigned, clusters).clamp_min(_TINY)[..., None]
        keys, values = keys / size, values / size
    first, used = _first_member(valid, assigned, clusters)
    # Of a member that is alone nothing else is asked.
    asked = {name: gather_tokens(getattr(members, name), first) for name in ("keys", "values", "beta", "pos", "tier")}
    alone = dataclasses.replace(members, **asked)
    single = _summed(valid.int(), assigned, clusters) == 1
    keys = torch.where(single[..., None], alone.keys, keys.to(alone.keys.dtype))
    values = torch.where(single[..., None], alone.values, values.to(alone.values.dtype))
    total = _summed(mass, assigned, clusters)
    count = _summed(members.count * valid, assigned, clusters)
    beta = torch.zeros_like(total)
    if draws is not None:
        faint = _FAINT * mass.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1) + 1e-30
        gain = ((total + faint) / (draws(keys) + faint)).log()
        beta = torch.where(single, alone.beta, torch.minimum(gain, count.clamp_min(1).float().log() + _MOST_LOG_GAIN))
    pos = alone.pos
    if reduction != "first":
        pos = torch.where(single, pos, _summed(mass * members.pos, assigned, clusters) / total.clamp_min(_TINY))

    def largest(field: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(total).scatter_reduce(2, assigned, field * valid, "amax")

    return WeightedTokens(
        keys=keys,
        values=values,
        beta=torch.where(used, beta, -torch.inf),
        pos=pos,
        score=largest(members.score),
        mass=_summed(members.mass * valid, assigned, clusters),
        square=largest(members.square),
        count=count,
        tier=torch.where(used, torch.where(single, alone.tier, SKETCH), UNUSED).to(torch.int8),
    )


def sketch_energies(tokens: WeightedTokens, originals: Originals) -> torch.Tensor:
    """Residual energy of each sketch over its stored originals, float32 `[batch, kv_heads, tokens]` in [0, 1].

    0 for what is no sketch or has no originals left.
    """
    error, norm = stand_in_error(tokens, originals)
    energy = (error / norm.clamp_min(_TINY)).sqrt().clamp(0.0, 1.0)
    return energy * ((tokens.tier == SKETCH) & (norm > 0))


def promote(
    tokens: WeightedTokens,
    originals: Originals,
    sketches: int,
    room: int,
    log_mass: bool = True,
) -> tuple[WeightedTokens, WeightedTokens, torch.Tensor]:
    """Let the originals of the worst sketches return.

    The sketches with the highest residual energy, weighted by the attention they draw, give back their originals, evenly
    subsampled where they are more than `room`; those where that is less than the other tiers' tokens draw on average do not.

    Args:
        tokens: the middle, whose slots `originals.parent` names.
        originals: what leaves is freed, in place.
        sketches: most sketches a head promotes.
        room: most originals that return.

    Returns:
        `(tokens, returned, promoted)`: the middle with the returned tokens' mass taken off, `room` slots of exact tokens,
        and how many sketches each head promoted, `[batch, kv_heads]`.
    """
    worth = sketch_energies(tokens, originals) * tokens.mass.clamp_min(0)
    # What draws less than a token of the other tiers does on average is well off as a sketch.
    others = tokens.valid & (tokens.tier != SKETCH)
    usual = (tokens.mass * others).sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp_min(1)
    index, picked = top_in_order(worth, (worth > 0) & (worth >= usual), min(sketches, tokens.length))
    chosen = torch.zeros_like(tokens.valid).scatter(2, index, picked)
    parent = originals.parent.clamp(max=tokens.length - 1)
    candidates = originals.valid & chosen.gather(2, parent)
    at, taken = spread_pick(worth.gather(2, parent), candidates, room)
    returned = originals.take(at, taken, EXACT)
    stand_in, share = parent.gather(2, at), originals.share.gather(2, at)
    returned.mass = tokens.mass.gather(2, stand_in) * share * taken
    returned.square = tokens.square.gather(2, stand_in) * share.square() * taken
    drawn = tokens.score.gather(2, stand_in) * share.sqrt()
    returned.score = torch.maximum(originals.score.gather(2, at), drawn) * taken
    leaving = torch.zeros_like(candidates).scatter(2, at, taken)
    promoted = torch.zeros_like(tokens.count).scatter_add_(2, stand_in, taken.to(tokens.count.dtype)) > 0
    rest = take_off(tokens, originals, leaving, log_mass, sketches_only=True)
    return rest, returned, promoted.sum(-1)


def as_batch(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of one head, `[tokens, dim]`, as a batch of one."""
    return tuple(tensor[None, None] for tensor in states)


def check_head(**states: torch.Tensor) -> None:
    """Raise unless each is a `[tokens, dim]` tensor, all of as many tokens within a `_k`, `_v` pair."""
    for name, tensor in states.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} of shape {shape} must be a tensor [tokens, head_dim]")
    for name, tensor in states.items():
        other = states.get(name[:-2] + "_v") if name.endswith("_k") else None
        if other is not None and other.shape[0] != tensor.shape[0]:
            raise ValueError(f"{name} has {tensor.shape[0]} tokens and {name[:-2]}_v {other.shape[0]}: they must be as many")


def as_positions(name: str, positions, tokens: int, device: torch.device) -> torch.Tensor:
    """Positions of one head as float32 `[tokens]`; `ValueError` where they are not as many as the tokens."""
    positions = torch.as_tensor(positions, device=device).reshape(-1).float()
    if positions.shape[0] != tokens:
        raise ValueError(f"{name} has {positions.shape[0]} entries: it must have one for each of the {tokens} tokens")
    return positions


class DualFidelityMixin:
    """The sketch tier as documented for one head; the views show row 0 (`.row(n)` another)."""

    @property
    def sketch_bank(self) -> HeadView:
        """Per (layer, head): `keys`, `values`, `positions` of the sketches `[n, ...]`, and of what they lead back to:
        `original_k`, `original_v`, `original_positions` `[m, ...]`, `sketch_of` `[m]` (index of each one's sketch)."""
        return HeadView("sketch_bank", self._state_heads("originals"), self._read_sketches)

    @property
    def sketch_energies(self) -> HeadView:
        """Per (layer, head): residual energy of each sketch of `sketch_bank`, float32 `[n]` in [0, 1]."""

        def read(layer: int, row: int, head: int) -> torch.Tensor | None:
            found = self._sketches_of(layer, row, head)
            if found is None:
                return None
            tokens, originals = found
            return sketch_energies(tokens, originals)[0, 0][(tokens.tier == SKETCH)[0, 0]]

        return HeadView("sketch_energies", self._state_heads("originals"), read)

    def _sketches_of(self, layer: int, row: int, head: int) -> tuple[WeightedTokens, Originals] | None:
        """Middle and originals of one head, or None where it has no sketch."""
        found = self._middle_and_originals(layer, row, head)
        return None if found is None or not bool((found[0].tier == SKETCH).any()) else found

    def _read_sketches(self, layer: int, row: int, head: int) -> dict[str, torch.Tensor] | None:
        found = self._sketches_of(layer, row, head)
        if found is None:
            return None
        tokens, originals = found
        sketch = (tokens.tier == SKETCH)[0, 0]
        parent = originals.parent[0, 0].clamp(max=sketch.shape[0] - 1)
        own = originals.valid[0, 0] & sketch[parent]
        return {
            "keys": tokens.keys[0, 0][sketch],
            "values": tokens.values[0, 0][sketch],
            "positions": tokens.pos[0, 0][sketch],
            "log_mass": tokens.beta[0, 0][sketch],
            "original_k": originals.keys[0, 0][own],
            "original_v": originals.values[0, 0][own],
            "original_positions": originals.pos[0, 0][own],
            "sketch_of": (sketch.cumsum(0) - 1)[parent[own]],
        }

    def _apply_sketch_reduction(
        self, tokens_k: torch.Tensor, tokens_v: torch.Tensor, reduction: str = "mean"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[tokens, head_dim]` as one, `(k, v)` each `[1, head_dim]`; none give none.

        Raises `ValueError` for a reduction other than `mean`, `sum`, `first`.
        """
        check_head(tokens_k=tokens_k, tokens_v=tokens_v)
        keys, values = as_batch(tokens_k, tokens_v)
        weight = torch.ones(1, 1, tokens_k.shape[0], dtype=torch.float32, device=tokens_k.device)
        if tokens_k.shape[0] == 0 and reduction in SKETCH_REDUCTIONS:
            return tokens_k, tokens_v
        k, v = reduce_tokens(keys, values, weight, weight.long() * 0, 1, reduction)
        return k[0, 0].to(tokens_k.dtype), v[0, 0].to(tokens_v.dtype)

    def _compute_residual_energy(
        self, original_k: torch.Tensor, original_v: torch.Tensor, approx_k: torch.Tensor, approx_v: torch.Tensor
    ) -> float:
        """`residual_energy` of one head's tokens `[tokens, head_dim]`."""
        check_head(original_k=original_k, original_v=original_v, approx_k=approx_k, approx_v=approx_v)
        return float(residual_energy(*as_batch(original_k, original_v, approx_k, approx_v)))

    @unrecorded()
    def _update_sketch_bank(self, layer_idx: int, head_idx: int, overflow_k, overflow_v, overflow_positions) -> None:
        """Make sketches of a head's overflow, beside those it has; the tokens become their originals."""
        check_head(overflow_k=overflow_k, overflow_v=overflow_v)
        positions = as_positions("overflow_positions", overflow_positions, overflow_k.shape[0], overflow_k.device)
        slots = self.config.sketch_budget
        tokens, originals = self._hand_bank(layer_idx, head_idx, overflow_k, overflow_v)
        count = overflow_k.shape[0]
        if slots == 0 or count == 0:
            return
        keys, values = as_batch(overflow_k, overflow_v)
        new = WeightedTokens.new(keys, values, positions[None, None])
        new.tier.fill_(EXACT)
        both = concatenate([tokens, new])
        scale = torch.ones(1, 1, 1, 1, dtype=torch.float32, device=overflow_k.device)
        assigned = similar_clusters(both, slots, scale, both.count.float())
        made = make_sketches(both, assigned, slots, self.config.sketch_reduction, None)
        # By hand also a sketch of one token is a sketch: its original is stored beside it.
        made.tier = torch.where(made.valid, SKETCH, UNUSED).to(torch.int8)
        held = tokens.length
        originals.follow(assigned[:, :, :held], tokens.count.float(), made.count.float())
        parent = assigned[:, :, held:]
        order = int(originals.order.max()) + 1
        originals.store(new, 1.0 / made.count.float().gather(2, parent).clamp_min(1), parent, order, count)
        tokens.write(0, made)

    def _promote_sketches_to_precision(
        self, layer_idx: int, head_idx: int, promotion_budget: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Originals `(k, v, positions)` of the `promotion_budget` sketches with the highest energy; they leave the bank.

        At most `compressed_budget` originals, evenly subsampled where they are more; the rest goes with its sketch.
        """
        tokens, originals = self._hand_bank(layer_idx, head_idx)
        sketch = tokens.tier == SKETCH
        energy = torch.where(sketch, sketch_energies(tokens, originals), -1.0)
        index, picked = top_in_order(energy + 1.0, sketch, min(max(promotion_budget, 0), tokens.length))
        chosen = torch.zeros_like(sketch).scatter(2, index, picked)
        candidates = originals.valid & chosen.gather(2, originals.parent)
        at, taken = spread_pick(-originals.pos, candidates, min(max(1, self.config.compressed_budget), originals.slots))
        at = at[0, 0][taken[0, 0]]
        result = originals.keys[0, 0][at], originals.values[0, 0][at], originals.pos[0, 0][at]
        originals.free(candidates)
        tokens.write(0, tokens.where_valid(tokens.valid & ~chosen))
        self._count_by_hand("promotions", int(picked.sum()))
        return result

    def _get_sketch_tokens(
        self, layer_idx: int, head_idx: int, budget: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """At most `budget` sketches of a head, `(k, v, positions)`, evenly subsampled where there are more."""
        if budget < 0:
            raise ValueError(f"budget={budget} must be at least 0")
        self._layer_by_hand(layer_idx, head_idx)
        found = self._middle_and_originals(layer_idx, 0, head_idx)
        tokens, _ = self._hand_bank(layer_idx, head_idx) if found is None else found
        sketch = tokens.tier == SKETCH
        index, picked = spread_pick(-tokens.pos, sketch, min(max(budget, 1), max(tokens.length, 1)))
        at = index[0, 0][picked[0, 0]][:budget]
        return tokens.keys[0, 0][at], tokens.values[0, 0][at], tokens.pos[0, 0][at]
