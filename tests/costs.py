"""What a run costs, counted and not timed: operators, calls of Python functions, and bytes of temporaries."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operators(TorchDispatchMode):
    """Count the operators that run within, by name in `counts`; those that only make a view do no work and are left out."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[], object]) -> int:
    """Operators of `run()` that are no views."""
    with Operators() as found:
        run()
    return found.counts.total()


def python_calls(run: Callable[[], object]) -> int:
    """Calls of Python functions in `run()`."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


class Temporaries(TorchDispatchMode):
    """Follow the storages that operators make within.

    Attributes:
        peak: bytes that were alive at once, at most, what is left behind included.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        # Number and bytes of what was made; less than 0 where it was given back.
        self._events: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage(), given)
        return result

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size, number = storage._cdata, storage.nbytes(), len(self._events)
        if key in given or key in self._alive:
            return

        def gone(_):
            if self._alive.pop(key, None) is not None:
                self.now -= size
                self._events.append((number, -size))

        self._alive[key] = weakref.ref(storage, gone), number
        self._events.append((number, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    @property
    def working(self) -> int:
        """Bytes that were alive at once, at most, of what was given back by now."""
        left = {number for _, number in self._alive.values()}
        now = peak = 0
        for number, size in self._events:
            now += 0 if number in left else size
            peak = max(peak, now)
        return peak
