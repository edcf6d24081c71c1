"""What the evaluation raises: for something outside the code that is missing, and for an argument that is too small."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

# The smallest value an argument of that name may have.
LEAST = dict.fromkeys(("skip_tokens", "min_seq_len", "decode_tokens", "log_every", "full_tokens", "seed"), 0)
LEAST |= dict.fromkeys(("num_samples", "chunk_size", "score_from", "memory_from", "trials", "tokens", "window"), 1)
LEAST |= dict.fromkeys(("num_eval_tokens", "concat_limit"), 2)


class EvaluationError(RuntimeError):
    """Weights, a text or a package can't be had, or the logits are unusable; the message says what to do."""


def require(*modules: str, extra: str = "eval") -> None:
    """Import the optional packages a step needs, or raise `EvaluationError` naming those that are missing.

    `extra`: the extra of this package that brings them.
    """
    missing = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise EvaluationError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed here and not installed: "
            f'install the extra {extra}, pip install "streaming-llm[{extra}]" (or pip install -e ".[{extra}]" in a clone)'
        )


def check_least(arguments: Mapping[str, Any], least: Mapping[str, int] = LEAST) -> None:
    """Raise `ValueError` for an argument that is given and below what `least` says of it."""
    for name, value in arguments.items():
        if value is not None and name in least and value < least[name]:
            raise ValueError(f"{name}={value} is too small; it must be at least {least[name]}")
