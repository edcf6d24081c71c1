"""The error the evaluation raises when something outside the code is missing: weights, a text, a package."""

from __future__ import annotations

import importlib


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
