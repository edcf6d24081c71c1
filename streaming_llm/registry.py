"""Which compressors there are, by name: the settings name one, and what makes them registers here."""

from __future__ import annotations

from typing import Any

# Filled by `compressors.register_compressor`, which says what may be in it.
COMPRESSORS: dict[str, Any] = {}


def get_compressor(name: str) -> Any:
    """The registered class; `ValueError` names what is registered when there is none."""
    if name not in COMPRESSORS:
        raise ValueError(f"compressor_type={name!r} is not registered: use one of {', '.join(COMPRESSORS)}")
    return COMPRESSORS[name]


def available_compressors() -> tuple[str, ...]:
    """Names that `compressor_type` may have."""
    return tuple(COMPRESSORS)
