"""The order of a compaction: fade, measure, promote, compress, sketch, remap, replay, place, measure again.

`compact` is a function: it reads what the heads hold and what the modules remember, and returns what they hold and remember
afterwards. Nothing it is given changes, so a compaction that fails has never been. The stages are in the modules' own files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..compressors.base import Reference, check_made
from ..data.queries import Queries
from ..data.select import gather_tokens, top_in_order, top_slots
from ..data.tokens import EXACT, PRECISION, RECENT, SINK, SKETCH, WeightedTokens, concatenate, lightened
from ..maths.budgets import Budget, middle_variance, share_budget
from ..maths.importance import attention_logits, importance, spread_over_segments
from ..sizing import REPLAY_BANK
from .calibration import anchor_positions, calibrate, update_anchors, update_fit
from .controller import QUERY_STEP, attention_output, head_budgets, reconstruction_energy, update_controller
from .counts import Counts
from .dual_fidelity import make_sketches, promote
from .memory import Memory
from .originals import Originals, is_original
from .plan import Compacted, Plan
from .replay import replay, replay_count, spectral_energy
from .trace import Trace, left_of

# The controller measures each of a layer's first compactions, then one in so many.
_MEASURED_FIRST, _MEASURED_EVERY = 8, 4
# Originals that may return at once, in parts of the precision tier; two for each sketch promoted, where that is more.
_RETURNED_SHARE = 0.125
# Of the stored queries every so many are asked what a sketch draws.
_QUERY_STEP = 8


def compact(source: WeightedTokens, queries: Queries | None, memory: Memory, plan: Plan) -> Compacted:
    """Bring the middle of every head back to its budget; sinks and recent window stay.

    Args:
        source: all that the heads hold, sinks first, the recent window last, `[rows, kv_heads, tokens, ...]`.
        queries: those stored, the last of them that of the last token; None where there are none.
        memory: what the modules that are on remember.
    """
    return _Compaction(plan, memory.map(torch.clone), queries).run(source)


class _Compaction:
    """One compaction under way: what its stages share. `memory` is its own, and changed in place."""

    def __init__(self, plan: Plan, memory: Memory, queries: Queries | None):
        self.plan, self.memory, self.queries = plan, memory, queries
        self.config, self.counts = plan.config, Counts()
        # What became of each candidate so far, where that is asked for.
        self.trace: Trace | None = None

    def run(self, source: WeightedTokens) -> Compacted:
        """See `compact`."""
        plan, first, last = self.plan, self.config.dynamic_start_size, source.length - self.config.recent_size
        if plan.mass_share != 1.0:
            # log(1 + (exp(beta) - 1) * share), which no log-mass overflows.
            share = plan.mass_share
            source = lightened(source, lambda beta: beta + torch.log(share + (1 - share) * torch.exp(-beta)))
        sinks, recent = source.slice(0, first), source.slice(last, source.length)
        if plan.width and last - first <= plan.width:
            # The widest head may keep more than there is: unused slots stand for what it can't fill.
            spare = WeightedTokens.empty(source.keys, source.values, plan.width + 1 - (last - first))
            source = concatenate([source.slice(0, last), spare, recent])
            last += spare.length
        before, mass = self._measured_output(source), source.slice(first, last).mass.sum(-1)
        tokens = source.slice(first, last)
        if plan.traces:
            self.trace = Trace.unknown(tokens, plan.width)
        middle = self._middle(source, tokens, first) if plan.width else tokens.slice(0, 0)
        self._count(tokens, middle)
        sinks = dataclasses.replace(sinks, tier=torch.full_like(sinks.tier, SINK))
        recent = dataclasses.replace(recent, tier=torch.full_like(recent.tier, RECENT))
        result = concatenate([sinks, middle, recent], plan.slots)
        if before is not None:
            held = result.slice(0, first + middle.length + recent.length)
            energy = reconstruction_energy(before, attention_output(self._asked(QUERY_STEP), held))
            update_controller(self.memory.controller, energy, mass, self.config.controller_gain)
        return Compacted(result, self.memory, self.counts, self.trace)

    def _asked(self, step: int) -> Queries:
        """A sample of the queries that have seen all candidates: those of the recent window."""
        return self.queries.last(self.config.recent_size).every(step)

    def _measured_output(self, source: WeightedTokens) -> torch.Tensor | None:
        """The attention output that the controller compares with, where this compaction is measured."""
        done = self.plan.compactions
        due = done < _MEASURED_FIRST or done % _MEASURED_EVERY == 0
        if self.memory.controller is None or not due or self.queries is None:
            return None
        return attention_output(self._asked(QUERY_STEP), source)

    def _middle(self, source: WeightedTokens, tokens: WeightedTokens, first: int) -> WeightedTokens:
        """The middle of every head, compacted into all its tiers, in the order of the stream."""
        budget = self._budget(tokens)
        if self.memory.originals is not None:
            return self._with_originals(source, tokens, first, budget)
        middle, parents = self._compressed(source, tokens, first, budget)
        if self.trace is not None and parents is not None:
            self.trace.parents = parents
        middle, moved = self._placed(middle)
        if moved:
            order = torch.where(middle.valid, middle.pos, torch.inf).argsort(dim=2, stable=True)
            middle = middle.gather(order)
            if self.trace is not None:
                self.trace.reordered(order)
        return middle

    def _with_originals(self, source: WeightedTokens, tokens: WeightedTokens, first: int, budget: Budget) -> WeightedTokens:
        """What returns from the originals is a candidate like any other; what overflows the precision tier becomes sketches;
        what was compressed too badly is replayed."""
        config, originals, log_mass = self.config, self.memory.originals, self.plan.log_mass
        sketches, replay_slots = config.sketch_budget, config.replay_budget
        pool, candidates, places = tokens, tokens, None
        if sketches and config.promotion_budget and config.sketch_originals:
            room = min(originals.slots, max(2 * config.promotion_budget, int(budget.least * _RETURNED_SHARE)))
            tokens, returned, promoted = promote(tokens, originals, config.promotion_budget, room, log_mass)
            self.counts.promotions = promoted.sum()
            pool, order = _in_order(concatenate([tokens, returned]), originals)
            places = order.argsort(dim=2)
            if self.trace is not None:
                self.trace.with_returned(candidates, tokens, returned)
        budget = budget.spread_over(pool.beta)
        if replay_slots:
            # Slots the replay tier has no use for are the precision tier's until it does.
            budget = budget.plus(replay_slots, replay_slots - self.memory.replay.reserved, 0)
        context = source
        if pool is not tokens and self.plan.compressor.needs_queries:
            context = concatenate([source.slice(0, first), pool, source.slice(first + tokens.length, source.length)])
        middle, parents = self._compressed(context, pool, first, budget.plus(sketches, sketches, sketches))
        traced = parents is not None
        if not traced:
            # Nobody knows what stands for what: nothing can come back.
            originals.free(torch.ones_like(originals.valid))
            parents = torch.zeros_like(pool.beta, dtype=torch.int64)
        elif sketches:
            middle = self._sketched(source, pool, middle, parents, budget.least)
        energy = self._remapped(pool, middle, parents, traced)
        if replay_slots:
            middle = self._replayed(middle, energy)
        middle, _ = self._placed(middle)
        if self.trace is not None:
            if traced:
                self.trace.parents = parents if places is None else parents.gather(2, places)
            else:
                self.trace = Trace.unknown(candidates, middle.length)
            if self.trace.left.shape[2] != middle.length:
                self.trace.left = torch.ones_like(middle.mass)
        middle, order = _in_order(middle, originals, self.plan.width)
        if self.trace is not None:
            self.trace.reordered(order, self.plan.width)
        return middle

    def _compressed(
        self, source: WeightedTokens, tokens: WeightedTokens, first: int, budget: Budget
    ) -> tuple[WeightedTokens, torch.Tensor | None]:
        """The exact and precision tiers made of `tokens`.

        Args:
            source: everything the heads hold, the tokens in place of the middle.
            tokens: the candidates; slots with `beta = -inf` are none.
            first: index in `source` of the first of them.

        Returns:
            `(kept, parents)`: `budget.width` slots in the order of the stream, and which of them each token went to (None
            where the compressor does not tell).
        """
        config, width = self.config, budget.width
        worth = importance(tokens, config.importance_metric, config.attention_blend, self.plan.queries_seen)
        exact = max(config.min_importance_tokens, round(config.importance_ratio * width))
        if tokens.length < config.min_middle_size_for_compress:
            exact = width
        exact = min(exact, width)
        spread = spread_over_segments(
            worth, tokens.valid, tokens.pos, exact, config.coverage_segments, config.coverage_priority
        )
        exact_budget = None
        if budget.per_head is not None:
            share = (budget.per_head.float() * (exact / width)).round().long()
            exact_budget = share.clamp_min(min(config.min_importance_tokens, budget.least))
        index, picked = top_slots(spread, tokens.valid, exact, exact_budget)
        pinned = torch.zeros_like(tokens.valid).scatter(2, index, picked)
        # Older queries came before some of the candidates: only those of the recent window have seen them all.
        reference = Reference(
            weight=worth.clamp_min(0),
            mass=tokens.mass,
            pinned=pinned,
            queries=None if self.queries is None else self.queries.last(config.recent_size),
            context=source,
            start=first,
            log_mass=self.plan.log_mass,
        )
        compressor = self.plan.compressor
        kept = compressor.compress(tokens, reference, width, budget.per_head, budget.least)
        check_made(type(compressor).__name__, kept, reference, tokens, width, budget.per_head)
        return kept, reference.assigned

    # -- budgets ---------------------------------------------------------------------------------------------------------

    def _budget(self, tokens: WeightedTokens) -> Budget:
        """What each head's precision tier may keep."""
        config, controller = self.config, self.memory.controller
        width, base = self.plan.width - config.sketch_budget - config.replay_budget, config.compressed_budget
        if self.plan.budgets is not None:
            budgets, least = self.plan.budgets
            self._adjust(budgets[:, None].expand(tokens.beta.shape[:2]))
            return Budget(width, controller.budgets, least)
        if controller is not None and config.controller_scope == "layer":
            floor, ceiling = config.controller_energy_floor, config.controller_energy_ceiling
            self._adjust(head_budgets(controller, base, floor, ceiling, config.controller_group_size))
            return Budget(width, controller.budgets, min(1, base))
        if self.memory.variance is None:
            return Budget(width, None, width)
        self.memory.variance.update(
            middle_variance(tokens.keys, tokens.values, tokens.valid), config.adaptive_variance_smoothing
        )
        least = max(1, int(base * config.adaptive_budget_floor))
        self.memory.variance.budgets.copy_(share_budget(self.memory.variance.variance, base, least, width))
        return Budget(width, self.memory.variance.budgets, least)

    def _adjust(self, budgets: torch.Tensor) -> None:
        """Put the controller's budgets `[rows, kv_heads]` in force."""
        own = self.memory.controller.budgets
        self.counts.adjustments = (torch.where(own == 0, self.config.compressed_budget, own) != budgets).sum()
        own.copy_(budgets)

    # -- sketches, replay, positions ---------------------------------------------------------------------------------------

    def _sketched(
        self, source: WeightedTokens, pool: WeightedTokens, middle: WeightedTokens, parents: torch.Tensor, least: int
    ) -> WeightedTokens:
        """The compacted middle with what overflows the precision tier as sketches: of its tokens that stand for several
        those that draw least are made anew from all their members."""
        config = self.config
        several = middle.valid & (middle.count > 1)
        slots = min(config.sketch_budget, middle.length)
        index, picked = top_in_order(-middle.mass, several, slots)
        # Which cluster each slot is, then each token; one more stands for all that is no sketch.
        cluster = torch.full_like(parents[:, :, :1], slots).expand(*several.shape).contiguous()
        places = torch.arange(slots, device=index.device).expand_as(index)
        cluster = cluster.scatter(2, index, torch.where(picked, places, slots)).gather(2, parents)
        member = pool.valid & (cluster < slots)
        # Beside one token for each sketch only those that joined something can be members, and so many there are at most.
        at, taken = top_in_order(member.float(), member, min(pool.length, slots + pool.length - least))
        members = pool.gather(at).where_valid(taken)
        chosen = torch.where(taken, cluster.gather(2, at), 0)
        made = make_sketches(members, chosen, slots, config.sketch_reduction, self._mean_key_attention(source))
        made = dataclasses.replace(made, tier=torch.full_like(made.tier, SKETCH))
        return middle.with_slots(index, picked, made)

    def _mean_key_attention(self, source: WeightedTokens) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A function from keys to what they draw by themselves, `[rows, kv_heads, tokens]`: their mean probability by the
        queries of the recent window. None where no query is known or log-mass is not seen."""
        if self.queries is None or not self.plan.log_mass:
            return None
        queries = self._asked(_QUERY_STEP)
        normaliser = attention_logits(queries, source.keys, source.beta).flatten(2, 3).logsumexp(-1, keepdim=True)
        normaliser = torch.where(normaliser.isfinite(), normaliser, torch.inf)
        return lambda keys: torch.exp(queries.logits(keys).flatten(2, 3) - normaliser).mean(2)

    def _remapped(self, pool: WeightedTokens, middle: WeightedTokens, parents: torch.Tensor, traced: bool) -> torch.Tensor:
        """Let the originals know their new stand-ins, and keep those of what was compressed now.

        Returns:
            Spectral energy of the stand-ins against what was compressed, `[rows, kv_heads]`; 1 where no replay asks for it.
        """
        config, originals = self.config, self.memory.originals
        energy = pool.beta.new_ones(pool.beta.shape[:2])
        if originals.slots == 0 or not traced:
            return energy
        masses = [tokens.mass if self.plan.log_mass else tokens.count.float() for tokens in (pool, middle)]
        originals.follow(parents, *masses)
        to_sketch = (middle.tier == SKETCH).gather(2, parents)
        joined = is_original(pool) & (middle.count.gather(2, parents) > 1)
        if not config.replay_budget:
            joined = joined & to_sketch
        most = min(pool.length, config.compression_interval * 3 // 2)
        index, picked = top_in_order((pool.pos - pool.pos.amin(-1, keepdim=True)).clamp_min(0), joined, most)
        new = pool.gather(index).where_valid(picked)
        parent = parents.gather(2, index)
        share = masses[0].gather(2, index) * picked / masses[1].clamp_min(1e-12).gather(2, parent)
        if config.replay_budget:
            made = (gather_tokens(states, parent) for states in (middle.keys, middle.values))
            energy = spectral_energy(*made, new.keys, new.values, picked)
        arrival, newest = self.plan.compactions * 1_000_000, REPLAY_BANK * config.replay_budget
        originals.store(new, share.clamp(0.0, 1.0), parent, arrival, newest, middle.tier == SKETCH)
        return energy

    def _replayed(self, middle: WeightedTokens, energy: torch.Tensor) -> WeightedTokens:
        """The middle with the originals that come back behind it, where `energy [rows, kv_heads]` is too low."""
        config, state = self.config, self.memory.replay
        state.energy.copy_(energy)
        wanted = replay_count(energy, config.energy_replay_threshold, config.replay_budget)
        count = torch.minimum(wanted, state.reserved)
        state.reserved.copy_(torch.where(wanted > 0, config.replay_budget, 0))
        before = middle
        middle, back = replay(middle, self.memory.originals, count, config.replay_budget, self.plan.log_mass)
        if self.trace is not None:
            self.trace.left = torch.cat([left_of(before, middle), torch.ones_like(back.mass)], dim=2)
        self.counts.replay_triggers = back.valid.any(-1).sum()
        self.counts.replayed = back.valid.sum()
        return concatenate([middle, back])

    def _placed(self, tokens: WeightedTokens) -> tuple[WeightedTokens, bool]:
        """Give the tokens whose keys are averages their `anchor_mode` position, calibrate it, and rotate the keys there.

        Only where calibration is on and the layer's keys turn with position. Returns the tokens and whether any may have
        moved.
        """
        config, state, rope = self.config, self.memory.calibration, self.plan.rope
        if state is None or rope is None or not rope.rotates:
            return tokens, False
        made = torch.zeros_like(tokens.valid)
        if config.sketch_reduction != "first":
            made = made | ((tokens.tier == SKETCH) & (tokens.count > 1))
        if self.plan.compressor.averages_keys:
            made = made | ((tokens.tier == PRECISION) & (tokens.count > 1))
        in_order = torch.where(made, tokens.pos, torch.inf).argsort(dim=2, stable=True)
        mean, mask = tokens.pos.gather(2, in_order), made.gather(2, in_order)
        synthetic = anchor_positions(mean, config.anchor_mode, config.seed, mask)
        update_anchors(state, synthetic, mean, mask)
        if config.anchor_mode == "mean":
            # Mean positions are true: the fit is the identity, and nothing is to be moved.
            update_fit(state, config.calibration_regularization)
            self.counts.calibrations = (state.fitted & mask.any(-1)).sum()
            return tokens, False
        low = tokens.pos.masked_fill(~tokens.valid, torch.inf).amin(-1, keepdim=True)
        high = tokens.pos.masked_fill(~tokens.valid, -torch.inf).amax(-1, keepdim=True)
        low = torch.where(low.isfinite(), low, 0.0)
        placed = calibrate(state, synthetic, low, torch.maximum(high, low), config.calibration_regularization, mask)
        self.counts.calibrations = (state.fitted & mask.any(-1)).sum()
        pos = placed.gather(2, in_order.argsort(dim=2)).to(tokens.pos.dtype)
        # A key is rotated only where that is more than rounding.
        moved = made & ((pos - tokens.pos).abs() > 1e-2)
        pos = torch.where(moved, pos, tokens.pos)
        keys = torch.where(moved[..., None], rope.move(tokens.keys, tokens.pos, pos), tokens.keys)
        return dataclasses.replace(tokens, keys=keys, pos=pos), True

    def _count(self, before: WeightedTokens, after: WeightedTokens) -> None:
        """Count what became of the candidates."""
        counts, batch_heads = self.counts, before.beta.shape[:2]
        counts.head_compactions = batch_heads[0] * batch_heads[1]
        left = before.valid.sum()
        if after.length:
            counts.kept_exact = (after.tier == EXACT).sum()
            counts.kept_compressed = (after.tier == PRECISION).sum()
            if self.config.sketch_budget:
                counts.kept_sketches = (after.tier == SKETCH).sum()
            left = left - after.valid.sum()
        counts.dropped = left


def _in_order(tokens: WeightedTokens, originals: Originals, width: int | None = None) -> tuple[WeightedTokens, torch.Tensor]:
    """The first `width` tokens by position, unused slots last; the originals learn their stand-ins' new slots.

    Returns:
        `(tokens, order)`: and the slot that each came from, of all of them.
    """
    order = torch.where(tokens.valid, tokens.pos, torch.inf).argsort(dim=2, stable=True)
    if originals.slots:
        originals.parent.copy_(order.argsort(dim=2).gather(2, originals.parent.clamp(max=tokens.length - 1)))
    return tokens.gather(order[:, :, :width]), order
