"""The stream a cache holds: its stacks, the positions its tokens have, and the pass that is under way.

A pass works on stacks of its own; `commit` puts them in the place of the stream's, `abort` forgets them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..attend.recall import Recalled
from ..compressors import get_compressor
from ..config import ADMSConfig
from ..data.autograd import unrecorded
from ..data.padding import MaskChange
from ..data.rope import Rope
from ..store.row import Row
from ..store.stack import Stack
from .arrival import Arrival, NonFiniteError
from .forward_pass import Pass, with_layer
from .passes import StackPass
from .positions import PositionWindow
from .ranks import Ranks
from .rewind import rewound
from .trading import FIRST_TRADE, next_trade, runs, traded
from .upkeep import Upkeep


class Stream:
    """See the module.

    Args:
        config: the settings.
        wired: whether attention shows its queries and sees log-mass.
        layers_at_once: layers that share a stack, and are compacted in one call.
        window: the positions the model is given.
        ranks: the processes a model's heads are spread over; None where each has all.
    """

    def __init__(
        self,
        config: ADMSConfig,
        wired: bool,
        layers_at_once: int = 1,
        window: PositionWindow | None = None,
        ranks: Ranks | None = None,
    ):
        self.config, self.wired, self.ranks = config, wired, ranks
        self.layers_at_once = layers_at_once if wired else 1
        self.window = PositionWindow() if window is None else window
        self.compressor = get_compressor(config.compressor_type)(config)
        self.upkeep = Upkeep(config, self.compressor, wired, self.window.limit)
        self.clock = self.upkeep.clock
        self.ropes: dict[int, Rope | None] = {}
        # Called with each pass that is about to be committed; where it fails nothing may have changed.
        self.committed: Callable[[Pass], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.stacks: list[Stack] = []
        self.next_trades: tuple[int, ...] = ()
        self.window.reset()
        self.open: Pass | None = None
        # What the last pass recalled, by layer.
        self.read: dict[int, Recalled] = {}
        self.records_past = False
        # Tokens were to be removed that had been compacted already; see `ADMSLayer.keys`.
        self.cut = False

    # -- what is held ----------------------------------------------------------------------------------------------------

    def stack_of(self, layer: int) -> Stack | None:
        """The stack that holds a layer as committed; None before its first token."""
        return with_layer(self.stacks, layer)

    def part_of(self, layer: int) -> StackPass | None:
        """What the pass under way did in a layer's stack so far."""
        return None if self.open is None else self.open.of_layer.get(layer)

    @property
    def batch(self) -> int | None:
        """Rows held; None before the first token."""
        return self.stacks[0].batch if self.stacks else None

    @property
    def seen(self) -> int:
        """Columns of the stream so far, padding counted; of a pass that is over, its own too."""
        return self.seen_by(self.stacks[0].layers[0]) if self.stacks else self._trial

    def seen_by(self, layer: int) -> int:
        """As `seen`, of one layer: they differ only where the model is not wired and in the middle of a pass."""
        stack = self.stack_of(layer)
        return (0 if stack is None else stack.seen) + self._trial

    @property
    def _trial(self) -> int:
        """Tokens of a pass that is over and not committed."""
        return self.open.arrival.new if self.open is not None and self.open.over else 0

    @property
    def padded(self) -> bool:
        """Whether there was ever any padding in what the rows hold."""
        return any(row.seen != stack.seen for stack in self.stacks for row in stack.rows)

    @property
    def aligned(self) -> bool:
        """Whether padding has no slots any more, or will have none."""
        return any(not stack.shows_columns for stack in self.stacks)

    @property
    def compacted(self) -> bool:
        """Whether any row was compacted."""
        return any(stack.compacted for stack in self.stacks)

    def exact_lengths(self) -> list[int]:
        """How many of each row's newest tokens every layer holds one by one."""
        rows = zip(*(stack.rows for stack in self.stacks), strict=True)
        return [min(row.exact_length(self.config) for row in own) for own in rows]

    @property
    def croppable(self) -> int:
        """How many of the last tokens can be taken back."""
        reach = (row.reach(stack.config, stack.archive_cap) for stack in self.stacks for row in stack.rows)
        return min(self.tail, self._trial + min(reach, default=0))

    def mask_length(self, layer: int, new: int) -> tuple[int, int]:
        """Slots in use before `new` tokens come to a layer, and the columns it has seen then."""
        part = self.part_of(layer)
        if part is not None:
            return part.start, part.stack.seen
        stacks = self.stacks if self.open is None else self.open.stacks
        stack = with_layer(stacks, layer)
        if stack is None:
            return 0, 0
        row = stack.rows[0]
        due = self.open is None and row.overfull(self.config, new)
        before = row.resting(self.config) if due else stack.columns
        return min(before, stack.seen), stack.seen

    # -- a pass ----------------------------------------------------------------------------------------------------------

    def begin(self, arrival: Arrival, first: Sequence[int], last: Sequence[int], change: MaskChange | None = None) -> Pass:
        """Do what is due, on stacks of its own, and open a pass.

        Args:
            arrival: what comes.
            first, last: true positions of each row's first and last new token; see `PositionWindow.span`.
            change: what a mask changes of the tokens seen; None for nothing.

        Raises:
            ValueError: there are no positions for the tokens; nothing has changed.
        """
        with self.upkeep.clock.timed(self.stacks[0].device if self.stacks else None):
            return self._begun(arrival, first, last, change)

    def _begun(self, arrival: Arrival, first: Sequence[int], last: Sequence[int], change: MaskChange | None) -> Pass:
        if self.stacks and len(arrival.counts) != self.batch:
            raise ValueError(
                f"a batch of {len(arrival.counts)} rows does not fit the cache, which holds {self.batch}: use a new cache "
                "or cache.reset()"
            )
        stacks = self.stacks if change is None else [stack.masked(change) for stack in self.stacks]
        stacks, trades = self._with_trades(list(stacks), arrival)
        stacks = [self._with_room(stack, arrival) for stack in stacks]
        held = [max(row.length for row in own) for own in zip(*(stack.rows for stack in stacks), strict=True)] or [self.seen]
        window = self.window.copy()
        shifts = window.plan(first, last, held)
        if any(shifts):
            shifts = list(shifts) * len(arrival.counts) if len(shifts) == 1 else list(shifts)
            stacks = [self.upkeep.moved(stack, shifts) for stack in stacks]
            window.move(shifts)
        if self.wired:
            # Not before the move, which asks the queries that go.
            stacks = [self.upkeep.roomy(stack, arrival.counts) for stack in stacks]
        window.follow(last)
        return Pass(arrival, stacks, window, trades)

    def _with_room(self, stack: Stack, arrival: Arrival) -> Stack:
        """The stack with the rows compacted that the new tokens would not fit into."""
        classes = stack.classes(lambda number: arrival.counts[number])
        due = [which for which in classes if stack.rows[which[0]].overfull(self.config, arrival.counts[which[0]])]
        return self.upkeep.compacted(stack, due) if due else stack

    def _with_trades(self, stacks: list[Stack], arrival: Arrival) -> tuple[list[Stack], tuple[int, ...]]:
        """Let layers trade budget for the rows that are due, where enough was measured since the last time."""
        config, trades = self.config, self.next_trades or (FIRST_TRADE,) * len(arrival.counts)
        if not (stacks and config.enable_adaptive_controller and config.controller_scope == "model"):
            return stacks, trades
        trading = [
            number
            for number, row in enumerate(stacks[0].rows)
            if row.overfull(config, arrival.counts[number]) and row.compactions >= trades[number]
        ]
        classes: dict[tuple[Row, ...], list[int]] = {}
        for row in trading:
            classes.setdefault(tuple(stack.rows[row] for stack in stacks), []).append(row)
        for which in classes.values():
            done = stacks[0].rows[which[0]].compactions
            stacks = traded([stack.aligned() for stack in stacks], which, self.upkeep, self.layers_at_once, self.ranks)
            trades = tuple(next_trade(done) if row in which else own for row, own in enumerate(trades))
        return stacks, trades

    @unrecorded()
    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's new keys and values `[batch, kv_heads, new, dim]`; returns all that its queries attend to."""
        if self.cut:
            raise RuntimeError(
                "the newest tokens were to be removed by assigning keys, but tokens were compacted already: the cache can't "
                "go on. Ask one question with a cache (a copy.deepcopy of one that read the text), or call cache.reset()"
            )
        if self.wired:
            part = self.open.of_layer.get(layer)
            if part is None or not part.takes(keys, values):
                part = self.part_for(layer, keys, values)
            return part.write(layer, keys, values)
        return self._write_unwired(layer, keys, values)

    def _write_unwired(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `write`, where nothing tells when a pass begins and ends: each layer's part is committed at once."""
        arrival = Arrival(keys.shape[2], (keys.shape[2],) * keys.shape[0])
        stack = self.stack_of(layer)
        if stack is None:
            stack = Stack.empty((layer,), self.config, self.ropes.get(layer), keys, values)
        self._check_shape(stack, keys, values)
        part = StackPass(self._with_room(stack, arrival), arrival, self.upkeep)
        keys, values = part.write(layer, keys, values)
        if part.overflows:
            part.waiting[layer] = (part.singles[layer], None)
        self._check_finite([part])
        stack = part.finished()
        self.stacks = sorted([*(own for own in self.stacks if layer not in own.layers), stack], key=lambda own: own.layers)
        return keys, values

    def compact_states(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer after a compaction, by a new stream that is used for nothing else."""
        self._write_unwired(0, keys, values)
        stack = self.stack_of(0)
        if not stack.compacted:
            stack = self.upkeep.compacted(stack, [list(range(stack.batch))])
        return tuple(states[:, :, : stack.columns] for states in (stack.tokens.keys, stack.tokens.values))

    @staticmethod
    def _check_shape(stack: Stack, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not stack.fits(keys, values):
            own = stack.tokens
            raise ValueError(
                "key_states, value_states of (batch, kv_heads, head_dim, value_dim)="
                f"{(*keys.shape[:2], keys.shape[-1], values.shape[-1])} do not fit the cache, which holds "
                f"{(stack.batch, own.keys.shape[1], own.keys.shape[-1], own.values.shape[-1])}; use a new cache or "
                "cache.reset()"
            )

    def part_for(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> StackPass:
        """Where a layer's states of the pass under way go; its stack is made where there is none.

        Raises `ValueError` for states unlike those held.
        """
        part = self.part_of(layer)
        if part is None:
            stack = with_layer(self.open.stacks, layer)
            if stack is None:
                layers = next((run for run in self._runs() if layer in run), (layer,))
                taken = {number for stack in self.open.stacks for number in stack.layers}
                layers = tuple(number for number in layers if number not in taken)
                stack = Stack.empty(layers, self.config, self.ropes.get(layer), keys, values)
                self.open.stacks.append(stack)
            part = self.open.add(StackPass(stack, self.open.arrival, self.upkeep))
        if not part.stack.columns and layer != part.stack.layers[0] and not part.stack.alike(keys, values):
            return self._leave(part, layer, keys, values)
        self._check_shape(part.stack, keys, values)
        return part

    def _leave(self, part: StackPass, layer: int, keys: torch.Tensor, values: torch.Tensor) -> StackPass:
        """Give a layer whose shape turns out to differ from its neighbours' a stack of its own."""
        at = part.stack.layers.index(layer)
        rest = part.stack.layers[at:]
        part.narrow(part.stack.layers[:at])
        self.open.stacks = [stack for stack in self.open.stacks if layer not in stack.layers] + [part.stack]
        stack = Stack.empty(rest, self.config, self.ropes.get(layer), keys, values)
        self.open.stacks.append(stack)
        return self.open.add(StackPass(stack, self.open.arrival, self.upkeep))

    def _runs(self) -> list[tuple[int, ...]]:
        layers = sorted(self.ropes)
        return runs(layers, [self.ropes[layer] for layer in layers], self.layers_at_once)

    def commit(self) -> None:
        """What the pass brought stays; where that fails it is still open.

        Raises:
            NonFiniteError: it brought NaN or infinity.
            RuntimeError: the model's attention did not show its queries.
        """
        done = self.open
        if done is None:
            return
        self._check(done.parts)
        written = {layer for part in done.parts for layer in part.stack.layers}
        stacks = [part.finished() for part in done.parts]
        stacks += [stack for stack in done.stacks if stack.layers[0] not in written]
        if self.committed is not None:
            self.committed(done)
        self.stacks = sorted(stacks, key=lambda own: own.layers)
        self.next_trades, self.window, self.open = done.next_trades, done.window, None
        recalling = [part.recalling for part in done.parts if part.recalls]
        self.read = {layer: found for own in recalling for layer, found in own.recalled.items()}

    def check(self) -> None:
        """Raise what `commit` would, of a pass that is over and only waits for a crop."""
        if self.open is not None:
            self._check(self.open.parts)

    def _check(self, parts: list[StackPass]) -> None:
        if self.wired and any(part.unanswered for part in parts):
            raise RuntimeError(
                "the cache was made by enable_adms_llm, but the model's attention does not show it its queries: the model "
                "is not (or no longer) enabled. Call enable_adms_llm(model, ...) again and use the cache it returns"
            )
        self._check_finite(parts)

    @staticmethod
    def _check_finite(parts: list[StackPass]) -> None:
        # The device is asked once.
        finite = [flag for flag in (part.finite() for part in parts) if flag is not None]
        if finite and finite[0].device.type != "meta":
            if not bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all()):
                for part in parts:
                    part.clear()
                raise NonFiniteError.of(parts[0].stack)

    def abort(self) -> None:
        """Drop the pass under way."""
        done, self.open = self.open, None
        for part in () if done is None else done.parts:
            part.clear()

    def settle(self) -> None:
        """Commit a pass that only waited for a crop."""
        if self.open is not None and self.open.over:
            self.commit()

    # -- rows and ends -----------------------------------------------------------------------------------------------------

    def pick(self, rows: Sequence[int]) -> None:
        """Row `i` becomes what row `rows[i]` was; no pass is open."""
        stacks = [stack.pick(rows) for stack in self.stacks]
        self.stacks, self.read = stacks, {}
        self.next_trades = tuple(self.next_trades[row] for row in rows) if self.next_trades else ()
        self.window.pick(rows)

    def check_crop(self, gone: int) -> None:
        """Raise `ValueError` where the last `gone` tokens of the rows can't be taken back."""
        if not self.stacks and not self._trial:
            return
        if gone > self.tail:
            raise ValueError(
                f"crop({-gone}) reaches back to padding: of this batch only the last {self.tail} tokens can be taken back"
            )
        if gone > self.croppable:
            recalls = any(stack.archive is not None for stack in self.stacks)
            held = "is held exactly or archived; what is not" if recalls else "is held exactly; what was compacted"
            raise ValueError(
                f"crop({-gone}) asks for more than the last {self.croppable} tokens, which are all that {held} "
                "can't be rolled back"
            )

    @property
    def tail(self) -> int:
        """How many of the newest tokens are real in every row."""
        stack = self.stacks[0] if self.stacks else None
        tail = 0 if stack is None else stack.tail
        if self.open is None or not self.open.over:
            return tail
        arrival = self.open.arrival
        return tail + arrival.new if arrival.real is None else arrival.tail

    def crop(self, gone: int) -> list[int]:
        """Take back the last `gone` tokens of each row, and settle the rest; see `check_crop`.

        Returns how far back each row's positions were moved for that; less than 0: forward.
        """
        shifts = []
        self.check_crop(gone)
        if self.open is not None and self.open.over:
            trial = min(gone, self.open.arrival.new)
            if trial < self.open.arrival.new:
                self.open.arrival = self.open.arrival.without(trial)
                for part in self.open.parts:
                    part.cropped(trial)
                self.open.window.remove(trial)
                self.commit()
            else:
                self.abort()
            gone -= trial
        if gone and self.stacks:
            stacks, window, shifts = rewound(self.stacks, gone, self.window)
            self.stacks, self.window, self.read = stacks, window, {}
        return shifts
