"""What becomes of a stack between two passes: it is scored, compacted, and moved. Each gives a new stack.

Rows at one point are worked on in one call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch

from ..compaction.counts import Counts
from ..compaction.memory import Memory
from ..compaction.originals import Originals
from ..compaction.pipeline import Compacted, Plan, compact
from ..compressors.base import Compressor
from ..config import ADMSConfig
from ..data.queries import Queries
from ..data.tokens import WeightedTokens, lightened
from ..maths.importance import attention_logits, attention_statistics, less_drawn
from ..store.links import Links
from ..store.row import Row
from ..store.stack import Part, Stack

# Of a prefill's queries before its last window, every fourth is scored: nearly as telling, at a quarter of the cost.
_PREFILL_STEP = 4


class Clock:
    """Counts the seconds that upkeep takes, while it is running; it waits for the device then."""

    def __init__(self):
        self.running, self.seconds, self._within = False, 0.0, False

    @contextlib.contextmanager
    def timed(self, device: torch.device | None) -> Iterator[None]:
        """Count what happens within, once."""
        if not self.running or self._within:
            yield
            return
        self._within = True
        _wait_for(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait_for(device)
            self.seconds += time.perf_counter() - start
            self._within = False


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)


class Upkeep:
    """The work on stacks, with what it needs to know of the cache.

    Args:
        config: the settings.
        compressor: what makes the precision tier.
        wired: whether attention shows its queries and sees log-mass.
        limit: positions the model was made for; None for no limit.
    """

    def __init__(self, config: ADMSConfig, compressor: Compressor, wired: bool, limit: int | None):
        self.config, self.compressor, self.wired, self.limit = config, compressor, wired, limit
        self.clock = Clock()

    # -- scores ----------------------------------------------------------------------------------------------------------

    def scored(self, stack: Stack, which: Sequence[int]) -> Stack:
        """Let the stored queries of equal rows that do not count yet count in their tokens' scores."""
        row = stack.rows[which[0]]
        queries = stack.stored_queries(which, row.scored)
        if queries is None or not row.length:
            return stack
        tokens = _own_statistics(stack.tokens)
        stack = dataclasses.replace(stack, tokens=tokens)
        held = stack.held(which)
        self._remember(held, queries)
        if stack.index(which) is not None or stack.real is not None:
            _write_statistics(stack, which, held)
        return stack.with_row(which, row._replace(scored=row.queries))

    def _remember(self, held: WeightedTokens, queries: Queries, step: int = 1) -> None:
        # Of the queries since the last compaction all are scored: every second was measured to be worse.
        mass, square = attention_statistics(queries.every(step), held.keys, held.beta, self.config.compaction_bytes)
        self.compressor.remember(held, mass, square, queries.window)

    def scored_by(self, stack: Stack, which: Sequence[int], queries: Queries) -> Stack:
        """Let queries that the store has no room for count: those of the newest tokens of equal rows, one for each.

        What is stored counts first. The last of them are stored then.
        """
        row, new, config = stack.rows[which[0]], queries.window, stack.config
        stack = dataclasses.replace(stack, tokens=_own_statistics(stack.tokens))
        held, before = stack.held(which), row.length - new
        waiting = stack.stored_queries(which, row.scored)
        if waiting is not None and before:
            self._remember(held.slice(0, before), waiting)
        # Blocks are counted from the newest query. What fits into the buffer is scored by all of them.
        window, step = (config.attention_window, _PREFILL_STEP) if row.overfull(config, 0) else (new, 1)
        for stop in range((new - 1) % window + 1, new + 1, window):
            part = dataclasses.replace(queries, states=queries.states[:, :, :, max(0, stop - window) : stop])
            self._remember(held.slice(0, before + stop), part, 1 if stop == new else step)
        if stack.index(which) is not None or stack.real is not None:
            _write_statistics(stack, which, held)
        last = queries.last(config.query_slots)
        stack = stack.with_queries(which, last, 0)
        kept = max(0, last.window - config.compression_interval)
        return stack.with_row(which, row._replace(queries=last.window, scored=last.window, kept=kept))

    def roomy(self, stack: Stack, counts: Sequence[int]) -> Stack:
        """Let the store of queries have room for `counts` more of each row, as far as it can: those that count in the scores
        make room, but for the ones that are kept."""
        slots, interval = stack.config.query_slots, stack.config.compression_interval
        if stack.queries is None:
            return stack
        for which in stack.classes(lambda number: counts[number]):
            row, new = stack.rows[which[0]], counts[which[0]]
            # Those kept for a move take no part in when the others count.
            since = row.queries if self.compressor.needs_queries else slots - interval + row.queries - row.kept
            if since + new <= slots:
                continue
            stack = self.scored(stack, which)
            keep = max(0, min(row.queries, slots - max(new, interval)))
            kept = stack.stored_queries(which, row.queries - keep)
            if kept is not None:
                stack = stack.with_queries(which, kept, 0)
            stack = stack.with_row(which, row._replace(queries=keep, scored=keep, kept=keep))
        return stack

    # -- compaction --------------------------------------------------------------------------------------------------------

    def compacted(
        self,
        stack: Stack,
        due: Sequence[Sequence[int]],
        width: int | None = None,
        budgets: torch.Tensor | None = None,
        least: int = 0,
    ) -> Stack:
        """Compact rows of a stack, those of each list of `due` equal ones; padding has no slots afterwards.

        With none due, the rows are only given a buffer of the usual size.

        Args:
            width: slots their middle has from now on; None for as many as now.
            budgets: tokens their layers agreed on, int64 `[layers * batch]`, and the least of them; None for no change.
        """
        due = [alike for which in due for alike in self._of_one_share(stack, which)]
        if due:
            # Before what each row archives is written: all of them see the same shelves.
            stack = stack.with_archive_room(max(stack.leaving(0, stack.rows[which[0]]) for which in due))
        layers, size = len(stack.layers), self._layers_at_once(stack, width) if due else len(stack.layers)

        def done(start: int) -> Stack:
            own = stack if size >= layers else stack.of_layers(start, start + size)
            at = slice(start * stack.batch, (start + size) * stack.batch)
            return self._compacted_layers(own, due, width, None if budgets is None else budgets[at], least)

        return Stack.join(map(done, range(0, layers, size)), layers)

    def _layers_at_once(self, stack: Stack, width: int | None) -> int:
        """How many of the layers are compacted in one call, within `compaction_bytes`."""
        config, tokens, layers = stack.config, stack.tokens, len(stack.layers)
        groups = 1 if stack.queries is None else stack.queries.shape[2]
        dim, itemsize = max(tokens.keys.shape[3], tokens.values.shape[3]), tokens.keys.dtype.itemsize
        middle = max(row.width for row in stack.rows) if width is None else width
        heads = stack.batch * tokens.keys.shape[1]
        work = heads * config.compaction_workspace(groups, dim, itemsize, middle)
        if layers * work <= config.compaction_bytes:
            return layers
        # What a part gives is there twice while it is put to the others.
        given = sum(stack.nbytes[use] for use in ("attended", "query_window", "originals", "modules")) // layers
        given += 0 if stack.archive is None else stack.archive.links.nbytes // layers
        return max(1, config.compaction_bytes // (work + given))

    def _compacted_layers(
        self, stack: Stack, due: Sequence[Sequence[int]], width: int | None, budgets: torch.Tensor | None, least: int
    ) -> Stack:
        for which in due:
            stack = self.scored(stack, which)
        done = [self._compacted_rows(stack, which, width, budgets, least) for which in due]
        parts = [part for part, _ in done]
        if stack.real is not None or not due:
            chosen = {number for which in due for number in which}
            classes = stack.classes(lambda number: number in chosen)
            parts += [stack.part(which) for which in classes if which[0] not in chosen]
        return dataclasses.replace(stack.with_parts(parts), counts=sum((counts for _, counts in done), stack.counts))

    def _compacted_rows(
        self, stack: Stack, which: Sequence[int], width: int | None, budgets: torch.Tensor | None, least: int
    ) -> tuple[Part, Counts]:
        row, config, index = stack.rows[which[0]], stack.config, stack.index(which)
        if budgets is not None:
            agreed = (budgets if index is None else budgets[index], least)
        elif row.least:
            known = stack.memory.controller.budgets[:, 0]
            agreed = (known if index is None else known[index], row.least)
        else:
            agreed = None
        seen = stack.queries is not None
        plan = Plan(
            config=config,
            compressor=self.compressor,
            rope=stack.rope,
            width=row.width if width is None else width,
            queries_seen=seen,
            log_mass=self.wired and seen,
            compactions=row.compactions,
            mass_share=self._mass_share(row, config),
            budgets=agreed,
            traces=stack.archive is not None,
            slots=row._replace(width=row.width if width is None else width).slots(config),
        )
        start = 0 if self.compressor.needs_queries else row.kept
        held = stack.held(which)
        result = compact(held, stack.stored_queries(which, start), stack.remembered(which), plan)
        keep = min(config.kept_queries, row.queries)
        queries = stack.queries if index is None or stack.queries is None else stack.queries.index_select(0, index)
        if queries is not None:
            kept = queries[:, :, :, row.queries - keep : row.queries]
            queries = torch.nn.functional.pad(kept, (0, 0, 0, config.query_slots - keep))
        links, leaving = None, 0
        if stack.archive is not None:
            leaving = stack.leaving(0, row)
            links = self._archived(stack, which, held, result, leaving)
        after = row._replace(
            archived=row.archived + leaving,
            length=row._replace(width=plan.width).resting(config),
            width=plan.width,
            compactions=row.compactions + 1,
            least=least or row.least,
            kept=keep,
            queries=keep,
            scored=keep,
        )
        return Part(which, after, result.tokens, result.memory, queries, links, owned=True), result.counts

    def _archived(self, stack: Stack, which: Sequence[int], held: WeightedTokens, result: Compacted, leaving: int) -> Links:
        """What the archive knows of equal rows now; what left their recent window is on its shelves."""
        row, first = stack.rows[which[0]], stack.config.dynamic_start_size
        last = row.length - stack.config.recent_size
        return stack.archive.compacted(
            stack.index(which),
            which,
            row,
            held,
            slice(last - leaving, last),
            result.tokens.slice(first, first + result.trace.left.shape[2]),
            result.trace,
            row.width if row.compactions else 0,
            stack.rope,
        )

    def _of_one_share(self, stack: Stack, which: Sequence[int]) -> list[list[int]]:
        """Rows at one point, apart where what they have seen lets different shares of their weights stay."""
        found: dict[float, list[int]] = {}
        for number in which:
            found.setdefault(self._mass_share(stack.rows[number], stack.config), []).append(number)
        return list(found.values())

    def _mass_share(self, row: Row, config: ADMSConfig) -> float:
        """What stays of the weight that tokens have for others: past the trained length `mass_decay` each 64 tokens."""
        if self.limit is None or row.seen <= self.limit or not row.compactions:
            return 1.0
        return config.mass_decay ** ((row.length - row.resting(config)) / 64)

    # -- positions ---------------------------------------------------------------------------------------------------------

    def moved(self, stack: Stack, shifts: Sequence[int]) -> Stack:
        """Move each row's tokens `shifts[row]` positions back (0: not at all).

        What would come before its own slot's number, counted from the first sink, stays there: sinks do not move, the middle
        closes up in its order, and the recent window keeps its distances as long as the shift leaves the newest token at a
        position that is no less than its slot.

        A log-mass was made for the distances at which the queries were: from another one a token that stands for thousands
        may draw nearly everything. So none that weighs more than itself draws more of the newest queries than before.
        """
        turns = stack.rope is not None and stack.rope.rotates
        stack = stack.aligned()
        if turns and stack.tokens.keys.dtype.itemsize < 4:
            # From the first move on half-precision keys are also kept as they were, so that roundings do not add up.
            stack = dataclasses.replace(stack, tokens=stack.tokens.with_exact(), memory=stack.memory.with_exact())
        due = [which for which in stack.classes(lambda number: shifts[number]) if shifts[which[0]]]
        return stack.with_parts([self._moved_rows(stack, which, shifts[which[0]], turns) for which in due])

    def _moved_rows(self, stack: Stack, which: Sequence[int], shift: int, turns: bool) -> Part:
        part = stack.part(which)
        held, queries = part.tokens, stack.stored_queries(which)
        slots = torch.arange(held.length, device=stack.device, dtype=torch.float32)
        moved = dataclasses.replace(held, **at_positions(stack, held, torch.maximum(held.pos - shift, slots), turns))
        if turns and part.queries is not None:
            part = part._replace(queries=stack.rope.shift(part.queries, -shift))
        if turns and part.row.compactions and queries is not None:
            queries = queries.last(min(stack.config.recent_size, stack.config.kept_queries))
            after = dataclasses.replace(queries, states=stack.rope.shift(queries.states, -shift))
            less = less_drawn(
                attention_logits(queries, held.keys, held.beta), attention_logits(after, moved.keys, held.beta)
            )
            moved = lightened(moved, lambda beta: beta - less)
        part = part._replace(row=part.row._replace(moved=part.row.moved + shift))
        return part._replace(tokens=moved, memory=moved_memory(stack, part.memory, shift, turns))


def _own_statistics(tokens: WeightedTokens) -> WeightedTokens:
    """The tokens with copies of what scoring changes."""
    return dataclasses.replace(tokens, **{name: getattr(tokens, name).clone() for name in ("score", "mass", "square")})


def _write_statistics(stack: Stack, which: Sequence[int], held: WeightedTokens) -> None:
    """Put the statistics of `held`, which `stack.held(which)` gave, back into the stack's own, in place."""
    index = stack.index(which)
    for name in ("score", "mass", "square"):
        own, new = getattr(stack.tokens, name), getattr(held, name)
        if stack.real is None:
            own[index, :, : held.length] = new
        else:
            at = stack.order(which, held.length).repeat(len(stack.layers), 1)[:, None].expand_as(new)
            index = torch.arange(own.shape[0], device=own.device) if index is None else index
            own[index] = own[index].scatter(2, at, new)


def at_positions(
    stack: Stack, tokens: WeightedTokens | Originals, pos: torch.Tensor, turns: bool
) -> dict[str, torch.Tensor]:
    """Keys and positions of the tokens at `pos`; from where they were exact, if that is kept."""
    if not turns:
        return {"pos": pos}
    keys, at = (tokens.exact_keys, tokens.exact_pos) if tokens.exact else (tokens.keys, tokens.pos)
    return {"keys": torch.where((pos == at)[..., None], keys, stack.rope.move(keys, at, pos)), "pos": pos}


def moved_memory(stack: Stack, memory: Memory, shift: int, turns: bool) -> Memory:
    """What the modules remember of positions, moved `shift` back."""
    changed = {}
    if memory.originals is not None:
        pos = (memory.originals.pos - shift).clamp_min(float(stack.config.dynamic_start_size))
        changed["originals"] = dataclasses.replace(memory.originals, **at_positions(stack, memory.originals, pos, turns))
    if memory.calibration is not None:
        state = memory.calibration
        moved = {name: getattr(state, name) - shift * state.valid for name in ("synthetic", "true")}
        changed["calibration"] = dataclasses.replace(state, **moved)
    return dataclasses.replace(memory, **changed)
