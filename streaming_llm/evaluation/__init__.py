"""Streaming evaluation: perplexity, KL divergence from the full cache, memory and time of caches on one stream."""

from .errors import EvaluationError
from .methods import METHODS, cache_factory, plan_methods, resolve_settings
from .models import load_model
from .streaming import MethodResult, evaluate_streams, lockstep
from .texts import TextStreams, load_text, shipped_text

__all__ = [
    "METHODS",
    "EvaluationError",
    "MethodResult",
    "TextStreams",
    "cache_factory",
    "evaluate_streams",
    "load_model",
    "load_text",
    "lockstep",
    "plan_methods",
    "resolve_settings",
    "shipped_text",
]
