"""What a cache of some settings takes: tokens a head, bytes, positions; and the largest one that fits into a memory."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from .registry import get_compressor
from .settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Dimensions of the codes of archived tokens, of heads that have so many.
RECALL_RANK = 32

# Per-token bookkeeping beside key and value: log-mass, position, score, mass, square (float32), count (int32), tier (int8).
BOOKKEEPING_BYTES = 6 * 4 + 1
# Per stored original beside key and value: position, share, score (float32), stand-in and arrival (int64).
ORIGINAL_BYTES = 3 * 4 + 2 * 8
# Beside a key kept as it was before any move: its position (float32).
EXACT_BYTES = 4
# Per head: the controller's and replay's state, and what the calibration keeps beside its anchors.
CONTROLLER_BYTES, REPLAY_BYTES, CALIBRATION_BYTES, VARIANCE_BYTES = 2 * 4 + 2 * 8, 4 + 8, 8 + 2 * 4 + 1, 4 + 2 * 8
# Queries kept for a move of positions, after which no merged token may draw more of them than before.
MOVE_QUERIES = 16
# Originals a head keeps for replay, as a multiple of `replay_budget`.
REPLAY_BANK = 4

logger = logging.getLogger("streaming_llm")

Config = TypeVar("Config", bound="Sizes")


def _positive(name: str, value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a positive {what}")
    return int(value)


class Sizes:
    """What follows from the settings of an `ADMSConfig`, which is one of these, by itself and for a model."""

    @property
    def dynamic_start_size(self) -> int:
        """Sinks in force: `start_size`, or 1% of `max_seq_length` where that is more and `enable_dynamic_sink` is on."""
        if not self.enable_dynamic_sink:
            return self.start_size
        return max(self.start_size, self.max_seq_length // 100)

    @property
    def precision_slots(self) -> int:
        """Slots of `compressed_budget` each head's buffer has: the widest head's, where budgets differ within a layer."""
        if self.use_adaptive_budget:
            return math.ceil(self.compressed_budget * self.adaptive_budget_cap)
        if self.enable_adaptive_controller and self.controller_scope == "layer":
            return 2 * self.compressed_budget
        return self.compressed_budget

    @property
    def original_slots(self) -> int:
        """Originals each head keeps outside the attended set."""
        return max(self.sketch_originals if self.sketch_budget else 0, REPLAY_BANK * self.replay_budget)

    @property
    def recall_room(self) -> int:
        """Slots of the buffer that what a query recalls is written to, behind the tokens held."""
        return self.recall_budget * self.enable_recall

    @property
    def archive_slots(self) -> int:
        """Tokens each head's archive has room for once it is full; 0 without recall. A pass of more than two
        `compression_interval` makes room for its own, up to `recall_tokens` more, until it is over."""
        return (self.recall_tokens + 4 * self.compression_interval) * self.enable_recall

    def code_rank(self, head_dim: int) -> int:
        """Dimensions of the codes of archived tokens."""
        return min(self.recall_rank, head_dim)

    def archived_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of a token in the archive of one head, index included; its positions are one pair for a whole layer."""
        stored = head_dim * itemsize if self.recall_bits == 16 else head_dim * self.recall_bits // 8 + 2
        rank = self.code_rank(head_dim)
        return 2 * stored + (rank + 7 if self.recall_bits == 4 else 2 * rank + 9)

    @property
    def middle_allocation(self) -> int:
        """Tokens between sinks and recent window after a compaction (per head, on average over a layer's heads)."""
        return self.compressed_budget + self.sketch_budget + self.replay_budget

    @property
    def expected_max_tokens(self) -> int:
        """Most tokens a head holds between two forward passes (averaged over a layer's heads when budgets adapt)."""
        return self.dynamic_start_size + self.middle_allocation + self.recent_size + self.compression_interval

    @property
    def widest_middle(self) -> int:
        """Middle slots each head's buffer has: the widest head's, where budgets differ between heads."""
        return self.precision_slots + self.sketch_budget + self.replay_budget

    @property
    def buffer_tokens(self) -> int:
        """Slots each head's buffer has (more than `expected_max_tokens` only where budgets differ between heads)."""
        fixed = self.dynamic_start_size + self.recent_size + self.compression_interval + self.recall_room
        return self.widest_middle + fixed

    @property
    def kept_queries(self) -> int:
        """Queries a layer keeps from before the last compaction: for a fit, or to hold against a move of positions."""
        if self.middle_allocation == 0:
            return 0
        if get_compressor(self.compressor_type).needs_queries:
            return self.attention_window
        return 0 if self.positions == "absolute" else min(MOVE_QUERIES, self.compression_interval)

    @property
    def query_slots(self) -> int:
        """Queries a layer stores per query head: those since the last compaction, and those kept from before it."""
        return self.kept_queries + self.compression_interval if self.middle_allocation else 0

    def compaction_workspace(self, groups: int, head_dim: int, itemsize: int, middle: int | None = None) -> int:
        """Most bytes that a compaction works with for each head of each row, beside the tokens and memory it gives.

        What scoring takes is not counted: it goes by rows, as many at a time as fit. A compressor of one's own is taken to
        need what those here do.

        Args:
            groups: query heads of a KV head.
            middle: slots of the middle; `widest_middle` when None.
        """
        middle = self.widest_middle if middle is None else middle
        returned = max(2 * self.promotion_budget, middle // 8) if self.sketch_budget else 0
        candidates = middle + self.compression_interval + returned
        held = self.dynamic_start_size + self.recent_size + candidates
        # Tokens that look for one to join; where budgets differ a head may keep next to nothing.
        differ = self.enable_adaptive_controller or self.use_adaptive_budget
        joining = candidates if differ else candidates - middle + self.replay_budget
        if get_compressor(self.compressor_type).needs_queries:
            asked = groups * self.attention_window
        else:
            asked = groups * -(-self.query_slots // 8)
        numbers = asked * (held + 3 * candidates) + joining * middle + 8 * candidates * (head_dim + 4) + 4 * held * head_dim
        return 4 * numbers + 48 * self.archive_slots

    def memory_bytes(
        self,
        model_config: Any,
        dtype: Any = None,
        batch_size: int = 1,
        moved: bool = False,
        compacting: bool = False,
    ) -> int:
        """Bytes the cache of one model takes once every buffer exists, everything included.

        Args:
            model_config: the model's `PreTrainedConfig`; layers with a sliding window keep their own bounded cache and are
                counted with it.
            dtype: a `torch.dtype` or its name; the config's own when None.
            batch_size: rows.
            moved: past the model's trained length, where positions were moved: in half precision keys are from then on
                also kept as they were, so that roundings do not add up. No more in float32 or with absolute positions.
            compacting: in the middle of a compaction of all layers: until the pass it is due for has gone well both what
                was held and what is to be are there, and what it works with, `compaction_bytes` or what one layer needs.
        """
        shape = ModelShape.of(model_config, dtype)
        batch_size = _positive("batch_size", batch_size, "whole number of rows")
        exact = 0
        if moved and shape.itemsize < 4 and shape.rotates and self.positions != "absolute":
            exact = shape.head_dim * shape.itemsize + EXACT_BYTES
        token = shape.head_dim * 2 * shape.itemsize + BOOKKEEPING_BYTES + exact
        queries = self.query_slots * shape.groups * shape.head_dim * shape.itemsize
        original = shape.head_dim * 2 * shape.itemsize + ORIGINAL_BYTES + exact
        modules = 2 * 4 * self.calibration_window + CALIBRATION_BYTES if self.enable_position_calibration else 0
        modules += CONTROLLER_BYTES * self.enable_adaptive_controller + REPLAY_BYTES * bool(self.replay_budget)
        modules += VARIANCE_BYTES * self.use_adaptive_budget
        head = self.buffer_tokens * token + queries + self.original_slots * original + modules
        state = head + 7 * self.archive_slots
        if self.enable_recall:
            head += self.archive_slots * self.archived_bytes(shape.head_dim, shape.itemsize)
            rank = self.code_rank(shape.head_dim)
            head += 4 * (shape.head_dim * (rank + 1) + rank)
        full = shape.full_layers * (shape.kv_heads * head + 8 * self.archive_slots)
        sliding = shape.sliding_tokens * shape.kv_heads * shape.head_dim * 2 * shape.itemsize
        held = batch_size * (full + sliding)
        if not (compacting and self.middle_allocation and shape.full_layers):
            return held
        rows = batch_size * shape.kv_heads
        layer = rows * (self.compaction_workspace(shape.groups, shape.head_dim, shape.itemsize) + state)
        most = max(layer, min(self.compaction_bytes, shape.full_layers * layer))
        return held + rows * shape.full_layers * state + most

    @classmethod
    def from_memory(
        cls: type[Config],
        model_config: Any,
        bytes: int,
        dtype: Any = None,
        batch_size: int = 1,
        compacting: bool = True,
        **settings: Unpack[Settings],
    ) -> Config:
        """The largest cache of the given shape that fits into `bytes`, however long the stream, also while it compacts:
        `memory_bytes(moved=True, compacting=True)`; `compacting=False` counts what it holds alone.

        The tokens that fit are shared half and half between the recent window and `compressed_budget` (the best split
        measured), except for what `settings` fixes. Raises `ValueError` when not even the smallest cache fits.
        """
        bytes = _positive("bytes", bytes, "whole number of bytes")
        cls.check_names(settings)
        for item in dataclasses.fields(cls):
            if item.name in settings:
                cls._checked(item, settings[item.name])

        def sized(tokens: int) -> Config:
            chosen = dict(settings)
            # A budget below what the settings ask to keep by importance would be refused.
            least = chosen.get("min_importance_tokens", 0)
            split = chosen.get("compressed_budget", max(tokens // 2, least))
            recent = chosen.setdefault("recent_size", max(1, tokens - split))
            middle = chosen.setdefault("compressed_budget", max(0, tokens - recent, least))
            chosen.setdefault("min_importance_tokens", min(4, middle))
            return cls(**chosen)

        def fits(tokens: int) -> bool:
            config = sized(tokens)
            limit = config.position_limit(model_config)
            placed = limit is None or config.most_slots <= limit
            return placed and config.memory_bytes(model_config, dtype, batch_size, True, compacting) <= bytes

        if not fits(1):
            smallest = sized(1)
            limit = smallest.position_limit(model_config)
            if limit is not None and smallest.most_slots > limit:
                raise smallest._does_not_fit(limit)
            least = smallest.memory_bytes(model_config, dtype, batch_size, True, compacting)
            raise ValueError(f"bytes={bytes} is too little for this model and these settings: at least {least} are needed")
        if "recent_size" in settings and "compressed_budget" in settings:
            return sized(1)
        high = 2
        while fits(high) and high < 1 << 32:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return sized(low)

    @property
    def most_slots(self) -> int:
        """Slots a head may come to use between two forward passes; more than `buffer_tokens` where layers trade budget."""
        traded = self.enable_adaptive_controller and self.controller_scope == "model"
        return self.buffer_tokens - self.recall_room + self.compressed_budget * traded

    def position_limit(self, model_config: Any) -> int | None:
        """The length that all a head may hold must fit into: the trained one, or where RoPE changes its frequencies.

        None where positions are never moved: with absolute positions, or without RoPE, the stream itself ends there.
        """
        text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        if self.positions == "absolute" or not ModelShape.of(model_config).rotates:
            return None
        lengths = [text.max_position_embeddings] if getattr(text, "max_position_embeddings", None) else []
        parameters = text.rope_parameters
        for rope in parameters.values() if "full_attention" in parameters else [parameters]:
            changes = rope.get("original_max_position_embeddings") or text.max_position_embeddings
            lengths += {"longrope": [changes], "dynamic": [changes - 1]}.get(rope.get("rope_type"), [])
        return min(lengths, default=None)

    def fit_positions(self: Config, limit: int) -> Config:
        """This config, where all that a head may hold fits below `limit`, as a stream past the trained length needs it.

        The default `recent_size`, which nobody chose, is shortened to what fits, with a warning. Any other raises
        `ValueError` naming the larger of `recent_size` and `compressed_budget`, and the most it may be with the other
        settings as they are.
        """
        over = self.most_slots - limit
        if over <= 0:
            return self
        if over < self.recent_size == type(self).recent_size:
            fitting = dataclasses.replace(self, recent_size=self.recent_size - over)
            logger.warning("recent_size is %d: more does not fit into the model's %d positions", fitting.recent_size, limit)
            return fitting
        raise self._does_not_fit(limit)

    def _does_not_fit(self, limit: int) -> ValueError:
        least = {"recent_size": 1, "compressed_budget": self.min_importance_tokens}
        name = max(least, key=lambda name: getattr(self, name))
        values = range(least[name], getattr(self, name))
        fitting = bisect.bisect(values, limit, key=lambda value: dataclasses.replace(self, **{name: value}).most_slots)
        way = f"{name}={values[fitting - 1]} is the most that does" if fitting else "choose smaller budgets"
        return ValueError(
            f"{name}={getattr(self, name)} does not fit: with sinks, the other budgets and compression_interval a head may "
            f"hold {self.most_slots} tokens, and the model was made for {limit} positions; {way}"
        )

    def check_model(self, model_config: Any) -> None:
        """Raise `ValueError` for a setting that the model's shape does not allow (`rank` above head_dim)."""
        head_dim = ModelShape.of(model_config).head_dim
        self.check_head_dim(head_dim)

    def check_head_dim(self, head_dim: int) -> None:
        """Raise `ValueError` where `rank` exceeds the heads' dimension and the compressor uses it."""
        if self.compressor_type == "low_rank" and self.rank > head_dim:
            raise ValueError(f"rank={self.rank} must not exceed the model's head_dim={head_dim}")
        # Heads with fewer dimensions than the default have codes of all they have.
        if self.enable_recall and self.recall_rank > max(head_dim, RECALL_RANK):
            raise ValueError(f"recall_rank={self.recall_rank} must not exceed the model's head_dim={head_dim}")


@dataclass(frozen=True)
class ModelShape:
    """What the memory of a cache depends on in a model."""

    full_layers: int
    sliding_tokens: int
    kv_heads: int
    groups: int
    head_dim: int
    itemsize: int
    rotates: bool

    @classmethod
    def of(cls, model_config: Any, dtype: Any = None) -> ModelShape:
        text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        if not hasattr(text, "num_attention_heads"):
            raise TypeError(f"model_config is a {type(model_config).__name__} and must be a model's config, model.config")
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
            kv_heads = 1  # Falcon's new architecture has fewer KV heads than query heads too, but copies each for the cache
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        if dtype is None:
            dtype = getattr(text, "dtype", None) or torch.float32
        if isinstance(dtype, str):
            name = dtype.removeprefix("torch.")
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"dtype={name!r} must be a torch dtype such as float32, bfloat16 or float16")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype={dtype!r} must be a torch dtype or its name, not {type(dtype).__name__}")
        windows = layer_windows(text)
        return cls(
            full_layers=sum(window is None for window in windows),
            sliding_tokens=sum(window - 1 for window in windows if window is not None),
            kv_heads=kv_heads,
            groups=heads // kv_heads,
            head_dim=head_dim,
            itemsize=dtype.itemsize,
            # Of the supported models, those without RoPE have no parameters for it.
            rotates=getattr(text, "rope_parameters", None) is not None and not getattr(text, "alibi", False),
        )


def layer_windows(text_config: Any) -> list[int | None]:
    """The attention window of each layer of a model, None where the layer attends to everything.

    Follows the config's `layer_types` where it has them, else its `sliding_window`, as transformers' own cache does.
    """
    count = text_config.num_hidden_layers
    sliding = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None)
    if kinds is None:
        return [sliding] * count
    return [sliding if kind == "sliding_attention" else None for kind in kinds]
