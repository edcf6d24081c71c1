"""What the cache keeps stays outside autograd, and can be written to in every mode a model may run in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Nothing is recorded for a backward pass, and new tensors are ordinary ones, even inside `torch.inference_mode`.

    A tensor made in inference mode can never be written to outside it: a cache filled by `generate` under inference mode
    could not go on elsewhere. Also a decorator.
    """
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving inference mode turns recording on, so the order matters.
    with torch.inference_mode(False), torch.no_grad():
        yield
