"""ADM++: a bounded, compressing KV cache for transformers."""

from . import session  # noqa: F401  gives the cache `save` and `load`
from .cache import ADMSKVCache
from .compressors import register_compressor
from .compressors.base import Compressor, Reference
from .config import ADMSConfig
from .data.queries import Queries
from .data.tokens import WeightedTokens
from .layer import ADMSLayer
from .model.enable import (
    disable_adms_llm,
    enable_adms_llm,
    enable_adms_low_rank,
    enable_adms_vq,
    enable_streaming_llm,
)
from .model.families import SUPPORTED_MODEL_TYPES
from .settings import Settings
from .stream.arrival import NonFiniteError

__version__ = "0.1.0"

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "ADMSConfig",
    "ADMSKVCache",
    "ADMSLayer",
    "Compressor",
    "NonFiniteError",
    "Queries",
    "Reference",
    "Settings",
    "WeightedTokens",
    "disable_adms_llm",
    "enable_adms_llm",
    "enable_adms_low_rank",
    "enable_adms_vq",
    "enable_streaming_llm",
    "register_compressor",
]
