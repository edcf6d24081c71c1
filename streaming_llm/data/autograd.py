"""What the cache keeps stays outside autograd and autocast, and can be written to in every mode a model may run in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


class _Unrecorded:
    """See `unrecorded`. No generator: one costs ten calls each time, and a step of decoding has many."""

    def __enter__(self) -> None:
        self._modes = contextlib.ExitStack()
        for kind in _device_types():
            if torch.is_autocast_enabled(kind):
                self._modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            # Leaving inference mode turns recording on, so the order matters.
            self._modes.enter_context(torch.inference_mode(False))
            self._modes.enter_context(torch.no_grad())

    def __exit__(self, *error: Any) -> None:
        self._modes.__exit__(*error)

    def __call__(self, function: Function) -> Function:
        @functools.wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                for kind in _device_types():
                    if torch.is_autocast_enabled(kind):
                        break
                else:
                    return function(*args, **kwargs)
            with _Unrecorded():
                return function(*args, **kwargs)

        return within  # type: ignore[return-value]


def unrecorded() -> _Unrecorded:
    """Nothing is recorded for a backward pass, nothing is cast, and new tensors are ordinary ones.

    A tensor made in `torch.inference_mode` can never be written to outside it: a cache filled by `generate` under inference
    mode could not go on elsewhere. `torch.autocast` would have scores and fits, which need float32, computed in half
    precision. Also a decorator.
    """
    return _Unrecorded()


def autocast_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype a matrix product of `dtype` is computed in: autocast's where that is on there; it leaves float64 alone."""
    cast = dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if cast else dtype
