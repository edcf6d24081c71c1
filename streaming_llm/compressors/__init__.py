"""Compressors: what turns the middle of the stream into few weighted tokens. One file a method, one protocol."""

from __future__ import annotations

from ..registry import COMPRESSORS, available_compressors, get_compressor
from .attention_matching import AttentionMatchingCompressor
from .base import Compressor
from .check import check_compressor
from .low_rank import LowRankCompressor
from .vq import VQCompressor

__all__ = ["Compressor", "available_compressors", "check_compressor", "get_compressor", "register_compressor"]


def register_compressor(name: str, compressor: type[Compressor]) -> None:
    """Make a `Compressor` subclass known as `compressor_type=name`.

    Raises `TypeError` when it is not a subclass of `Compressor`, `ValueError` when the name is taken by another class.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name={name!r} must be a non-empty string")
    if not (isinstance(compressor, type) and issubclass(compressor, Compressor)):
        raise TypeError(f"compressor={compressor!r} must be a subclass of streaming_llm.compressors.base.Compressor")
    if COMPRESSORS.get(name, compressor) is not compressor:
        raise ValueError(f"name={name!r} is already taken by {COMPRESSORS[name].__name__}")
    COMPRESSORS[name] = compressor


for _name, _compressor in (
    ("low_rank", LowRankCompressor),
    ("vq", VQCompressor),
    ("attention_matching", AttentionMatchingCompressor),
):
    register_compressor(_name, _compressor)
