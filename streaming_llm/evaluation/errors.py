"""What the evaluation raises: for something outside the code that is missing, and for an argument that is too small."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

# The smallest value an argument of that name may have.
LEAST = {
    **{"num_samples": 1, "num_eval_tokens": 2, "skip_tokens": 0, "concat_limit": 2, "min_seq_len": 0, "chunk_size": 1},
    **{"score_from": 1, "decode_tokens": 0, "log_every": 0, "seed": 0, "trials": 1, "memory_from": 1, "full_tokens": 0},
    **{"tokens": 1, "window": 1, "seeds": 1},
}


class EvaluationError(RuntimeError):
    """Weights, a text or a package can't be had, or the logits are unusable; the message says what to do."""


def require(*modules: str) -> None:
    """Import the optional packages a step needs, or raise `EvaluationError` naming those that are missing."""
    missing = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise EvaluationError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed here and not installed: "
            'install the evaluation extra, pip install "streaming-llm[eval]" (or pip install -e ".[eval]" in a clone)'
        )


def check_least(arguments: Mapping[str, Any], least: Mapping[str, int] = LEAST) -> None:
    """Raise `ValueError` for an argument that is given and below what `least` says of it."""
    for name, value in arguments.items():
        if value is not None and name in least and value < least[name]:
            raise ValueError(f"{name}={value} is too small; it must be at least {least[name]}")
