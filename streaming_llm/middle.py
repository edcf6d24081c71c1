"""The middle of a layer compacted into all its tiers: precision, sketches and replayed originals, in one order.

What returns from the originals is a candidate like any other; what overflows the precision tier becomes sketches; what was
compressed too badly is replayed. Then made tokens get their positions. The steps themselves are in `dual_fidelity.py`,
`replay.py` and `calibration.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .calibration import anchor_positions, calibrate, update_anchors
from .config import REPLAY_BANK
from .dual_fidelity import make_sketches, promote
from .importance import attention_logits
from .recall import Originals, is_original
from .replay import replay, replay_count, spectral_energy
from .tokens import PRECISION, SKETCH, WeightedTokens, concatenate, gather_tokens, top_in_order

if TYPE_CHECKING:
    from .layer import ADMSLayer

# Originals that may return at once, in parts of the precision tier; two for each sketch promoted, where that is more.
RETURNED_SHARE = 0.125
# Of the stored queries every so many are asked what a sketch draws.
_QUERY_STEP = 8


def compress_with_originals(
    layer: ADMSLayer,
    source: WeightedTokens,
    tokens: WeightedTokens,
    first: int,
    precision: int,
    budget: torch.Tensor | None,
    least: int,
) -> WeightedTokens:
    """The middle of every head, compacted.

    Args:
        layer: whose originals, settings and compressor are used; its counters are kept.
        source: everything the heads hold; `tokens` is its middle, from slot `first` on.
        precision: slots of the precision tier; budget: tokens each head's may hold, None for all of them; least: the fewest.

    Returns:
        `precision + sketch_budget + replay_budget` slots in the order of the stream, unused ones last.
    """
    config, originals = layer.config, layer.originals
    sketches, replayed_slots = config.sketch_budget, config.replay_budget
    width = precision + sketches + replayed_slots
    log_mass = layer.wired and layer.queries_seen
    pool = tokens
    if sketches and config.promotion_budget and config.sketch_originals:
        room = min(originals.slots, max(2 * config.promotion_budget, int(least * RETURNED_SHARE)))
        tokens, returned, promoted = promote(tokens, originals, config.promotion_budget, room, log_mass)
        layer.promotions = layer.promotions + promoted.sum()
        pool = _in_order(concatenate([tokens, returned]), originals)

    if budget is None:
        budget = torch.full(pool.beta.shape[:2], precision, device=pool.beta.device)
    if replayed_slots:
        # Slots the replay tier has no use for are the precision tier's until it does.
        budget = budget + (replayed_slots - layer.replay_state.reserved)
        precision = precision + replayed_slots
    context = source
    if pool is not tokens and layer.compressor.needs_queries:
        context = concatenate([source.slice(0, first), pool, source.slice(first + tokens.length, source.length)])
    middle, assigned = layer.compressed(context, pool, first, precision + sketches, budget + sketches, least + sketches)
    traced = assigned is not None
    if not traced:
        # Nobody knows what stands for what: nothing can come back.
        originals.free(torch.ones_like(originals.valid))
        assigned = torch.zeros_like(pool.beta, dtype=torch.int64)
    elif sketches:
        middle = _sketched(layer, source, pool, middle, assigned, least, log_mass)

    energy = _follow(layer, pool, middle, assigned, traced, log_mass)
    if replayed_slots:
        state = layer.replay_state
        state.energy.copy_(energy)
        wanted = replay_count(energy, config.energy_replay_threshold, replayed_slots)
        count = torch.minimum(wanted, state.reserved)
        state.reserved.copy_(torch.where(wanted > 0, replayed_slots, 0))
        middle, back = replay(middle, originals, count, replayed_slots, log_mass)
        layer.replay_triggers = layer.replay_triggers + (back.valid.any(-1)).sum()
        layer.replayed = layer.replayed + back.valid.sum()
        middle = concatenate([middle, back])
    middle, _ = place_made_tokens(layer, middle)
    return _in_order(middle, originals, width)


def place_made_tokens(layer: ADMSLayer, tokens: WeightedTokens) -> tuple[WeightedTokens, bool]:
    """Give the tokens whose keys are averages their `anchor_mode` position, calibrate it, and rotate the keys there.

    Only where calibration is on and the layer's keys turn with position. Returns the tokens and whether any may have moved.
    """
    config, state, rope = layer.config, layer.calibration, layer.rope
    if state is None or rope is None or not rope.rotates:
        return tokens, False
    made = torch.zeros_like(tokens.valid)
    if config.sketch_reduction != "first":
        made = made | ((tokens.tier == SKETCH) & (tokens.count > 1))
    if layer.compressor.averages_keys:
        made = made | ((tokens.tier == PRECISION) & (tokens.count > 1))
    in_order = torch.where(made, tokens.pos, torch.inf).argsort(dim=2, stable=True)
    back = in_order.argsort(dim=2)
    mean, mask = tokens.pos.gather(2, in_order), made.gather(2, in_order)
    synthetic = anchor_positions(mean, config.anchor_mode, config.seed, mask)
    update_anchors(state, synthetic, mean, mask)
    low = tokens.pos.masked_fill(~tokens.valid, torch.inf).amin(-1, keepdim=True)
    high = tokens.pos.masked_fill(~tokens.valid, -torch.inf).amax(-1, keepdim=True)
    low = torch.where(low.isfinite(), low, 0.0)
    placed = calibrate(state, synthetic, low, torch.maximum(high, low), config.calibration_regularization, mask)
    layer.calibrations = layer.calibrations + (state.fitted & mask.any(-1)).sum()
    if config.anchor_mode == "mean":
        # Mean positions are true: the fit is the identity, and nothing is to be moved.
        return tokens, False
    pos = placed.gather(2, back).to(tokens.pos.dtype)
    # A key is rotated only where that is more than rounding.
    moved = made & ((pos - tokens.pos).abs() > 1e-2)
    pos = torch.where(moved, pos, tokens.pos)
    keys = torch.where(moved[..., None], rope.move(tokens.keys, tokens.pos, pos), tokens.keys)
    tokens.keys, tokens.pos = keys, pos
    return tokens, True


def _in_order(tokens: WeightedTokens, originals: Originals, width: int | None = None) -> WeightedTokens:
    """The first `width` tokens by position, unused slots last; the originals learn their stand-ins' new slots."""
    order = torch.where(tokens.valid, tokens.pos, torch.inf).argsort(dim=2, stable=True)
    if originals.slots:
        originals.parent.copy_(order.argsort(dim=2).gather(2, originals.parent.clamp(max=tokens.length - 1)))
    return tokens.gather(order[:, :, :width])


def _sketched(
    layer: ADMSLayer,
    source: WeightedTokens,
    pool: WeightedTokens,
    middle: WeightedTokens,
    assigned: torch.Tensor,
    least: int,
    log_mass: bool,
) -> WeightedTokens:
    """The compacted middle with what overflows the precision tier as sketches: of its tokens that stand for several those
    that draw least are made anew from all their members."""
    config = layer.config
    several = middle.valid & (middle.count > 1)
    slots = min(config.sketch_budget, middle.length)
    index, picked = top_in_order(-middle.mass, several, slots)
    # Which cluster each slot is, then each token; one more stands for all that is no sketch.
    cluster = torch.full_like(assigned[:, :, :1], slots).expand(*several.shape).contiguous()
    places = torch.arange(slots, device=index.device).expand_as(index)
    cluster = cluster.scatter(2, index, torch.where(picked, places, slots)).gather(2, assigned)
    member = pool.valid & (cluster < slots)
    # Beside one token for each sketch only those that joined something can be members, and so many there are at most.
    at, taken = top_in_order(member.float(), member, min(pool.length, slots + pool.length - least))
    members = pool.gather(at).where_valid(taken)
    chosen = torch.where(taken, cluster.gather(2, at), 0)
    made = make_sketches(members, chosen, slots, config.sketch_reduction, _draws(layer, source) if log_mass else None)
    result = middle.map(torch.clone)
    for name, own in result.tensors().items():
        new = made.field(name) if name != "tier" else torch.full_like(made.tier, SKETCH)
        wide = own.dim() == 4
        where = index[..., None].expand(*index.shape, own.shape[-1]) if wide else index
        own.scatter_(2, where, torch.where(picked[..., None] if wide else picked, new.to(own.dtype), own.gather(2, where)))
    return result


def _draws(layer: ADMSLayer, source: WeightedTokens) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What keys draw by themselves: mean probability `[batch, kv_heads, tokens]`, by queries of the recent window."""
    queries = layer.stored_queries(0)
    if queries is None:
        return None
    queries = queries.last(layer.config.recent_size).every(_QUERY_STEP)
    normaliser = attention_logits(queries, source.keys, source.beta).flatten(2, 3).logsumexp(-1, keepdim=True)
    normaliser = torch.where(normaliser.isfinite(), normaliser, torch.inf)

    def draws(keys: torch.Tensor) -> torch.Tensor:
        return torch.exp(queries.logits(keys).flatten(2, 3) - normaliser).mean(2)

    return draws


def _follow(
    layer: ADMSLayer,
    pool: WeightedTokens,
    middle: WeightedTokens,
    assigned: torch.Tensor,
    traced: bool,
    log_mass: bool,
) -> torch.Tensor:
    """Keep the originals up to date: their new stand-ins, and those of what was compressed now.

    Returns:
        Spectral energy of the stand-ins against what was compressed, `[batch, kv_heads]`; 1 where no replay asks for it.
    """
    config, originals = layer.config, layer.originals
    weight = (lambda tokens: tokens.mass) if log_mass else (lambda tokens: tokens.count.float())
    if originals.slots == 0 or not traced:
        return pool.beta.new_ones(pool.beta.shape[:2])
    originals.follow(assigned, weight(pool), weight(middle))
    to_sketch = (middle.tier == SKETCH).gather(2, assigned)
    joined = is_original(pool) & (middle.count.gather(2, assigned) > 1)
    if not config.replay_budget:
        joined = joined & to_sketch
    most = min(pool.length, config.compression_interval * 3 // 2)
    index, picked = top_in_order((pool.pos - pool.pos.amin(-1, keepdim=True)).clamp_min(0), joined, most)
    new = pool.gather(index).where_valid(picked)
    parent = assigned.gather(2, index)
    share = weight(new) / weight(middle).clamp_min(1e-12).gather(2, parent)
    energy = pool.beta.new_ones(pool.beta.shape[:2])
    if config.replay_budget:
        made_k, made_v = gather_tokens(middle.keys, parent), gather_tokens(middle.values, parent)
        energy = spectral_energy(made_k, made_v, new.keys, new.values, picked)
    newest = REPLAY_BANK * config.replay_budget
    order = layer.rounds * 1_000_000
    originals.store(new, share.clamp(0.0, 1.0), parent, order, newest, middle.tier == SKETCH)
    return energy
