"""The settings by name, for editors and type checkers: `**settings` of the functions that take them.

Made from the fields of `ADMSConfig` by `python tests/test_typing.py`; change those.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class WindowSettings(TypedDict, total=False):
    """The sizes that StreamingLLM has too."""

    start_size: int
    """sinks: the first tokens of each row, kept exactly (4)"""
    recent_size: int
    """recent window: the last tokens, kept exactly (2000)"""


class RankSettings(TypedDict, total=False):
    """Of the low-rank compressor."""

    rank: int
    """low_rank: dimension of the subspace the leverage is measured in (16)"""


class ClusterSettings(TypedDict, total=False):
    """Of the vector-quantising compressor."""

    num_clusters: int
    """vq: most clusters a head's precision tier is made of (64)"""


class OtherSettings(TypedDict, total=False):
    """All the others."""

    compressed_budget: int
    """tokens of the exact and precision tiers together (128)"""
    compressor_type: str
    """what makes the precision tier: a registered compressor's name (low_rank)"""
    svd_max_tokens: int
    """low_rank: most tokens the subspace is fitted to (512)"""
    anchor_mode: Literal["mean", "grid", "hybrid"]
    """position of a token made from several: their mean, an even grid, or both (mean)"""
    enable_pos_shift: bool
    """keep positions inside the trained length; False means absolute positions (True)"""
    position_policy: Literal["auto", "absolute", "cache"]
    """positions: true ones while they fit the trained length, then a window's (auto), always true ones (absolute), or
    the index in the cache (cache, as StreamingLLM) (auto)"""
    max_seq_length: int
    """length the dynamic sink count is a share of (32768)"""
    enable_dynamic_sink: bool
    """as many sinks as 1% of max_seq_length, at least start_size (False)"""
    compression_interval: int
    """tokens between two compactions (64)"""
    min_middle_size_for_compress: int
    """a middle smaller than this is not given to the compressor: its most important tokens stay (64)"""
    importance_ratio: float
    """share of compressed_budget given to the most important tokens (0.5)"""
    min_importance_tokens: int
    """fewest tokens chosen by importance (within compressed_budget) (4)"""
    importance_metric: Literal["attention", "value_norm", "key_norm", "mixed"]
    """what makes a token important (attention)"""
    attention_window: int
    """recent queries whose attention is averaged (256)"""
    attention_blend: float
    """share of attention in the importance, the rest is the value norm's (1.0)"""
    score_decay: float
    """what is left of a remembered score after 64 tokens without attention (0.9)"""
    mass_decay: float
    """what is left after 64 tokens of the weight a token has for others, in streams past the model's trained length
    (0.97)"""
    protect_exact: bool
    """tokens chosen by importance never stand for others: their value and log-mass stay exact too (False)"""
    coverage_segments: int
    """segments of the middle that coverage_priority spreads tokens over (4)"""
    coverage_priority: float
    """share of the tokens chosen by importance that is spread evenly over the segments (0.0)"""
    enable_dual_fidelity: bool
    """keep what overflows the precision tier as sketches (False)"""
    sketch_budget: int
    """tokens of the sketch tier; 32 where its module is on and this is not given (0)"""
    sketch_reduction: Literal["mean", "sum", "first"]
    """how tokens become a sketch (mean)"""
    sketch_originals: int
    """originals of sketched tokens a head keeps outside the attended set, for promotion (256)"""
    promotion_budget: int
    """most sketches a head promotes at a compaction (4)"""
    enable_residual_replay: bool
    """re-inject originals while reconstruction is poor (False)"""
    replay_budget: int
    """tokens of the replay tier; 16 where its module is on and this is not given (0)"""
    energy_replay_threshold: float
    """spectral energy below which originals are replayed (0.9)"""
    enable_position_calibration: bool
    """calibrate the positions of made tokens (False)"""
    calibration_window: int
    """anchors kept for the calibration (512)"""
    calibration_regularization: float
    """ridge term of the calibration (0.1)"""
    enable_adaptive_controller: bool
    """budgets follow reconstruction energy and attention mass (False)"""
    controller_gain: float
    """weight of the newest measurement in the controller's EMAs (0.3)"""
    controller_energy_floor: float
    """energy below which a head's budget grows (0.8)"""
    controller_energy_ceiling: float
    """energy above which a head's budget shrinks (0.97)"""
    controller_group_size: int
    """heads that share a budget decision (1)"""
    controller_scope: Literal["layer", "model"]
    """what keeps its total while budgets move: each layer, or the model (a layer's heads then have one budget)
    (layer)"""
    use_adaptive_budget: bool
    """budgets in proportion to the variance of a head's middle (False)"""
    adaptive_budget_floor: float
    """smallest multiple of compressed_budget a head gets (0.5)"""
    adaptive_budget_cap: float
    """largest multiple of compressed_budget a head gets (2.5)"""
    adaptive_variance_smoothing: float
    """weight of the newest variance in its EMA (0.1)"""
    enable_recall: bool
    """archive what leaves the recent window, and attend to it again where a query asks (False)"""
    recall_budget: int
    """archived tokens that a query may attend to, beside what is held (64)"""
    recall_chunk_budget: int
    """archived tokens that the queries of a longer pass may attend to, one set for all of them (256)"""
    recall_tokens: int
    """tokens of the archive; past it the oldest leave (32768)"""
    recall_rank: int
    """dimensions of the codes that archived tokens are found by; of a head with fewer than 32 all, where 32 is asked
    (32)"""
    recall_bits: Literal[16, 8, 4]
    """bits a channel of archived keys and values: 16 for as they are, 8 or 4 (16)"""
    recall_store: Literal["device", "host", "disk"]
    """where archived tokens are: on the model's device, in the host's memory, or in a file (device)"""
    compaction_bytes: int
    """bytes a compaction works with, beside what it gives: layers are compacted in parts that fit (268435456)"""
    seed: int
    """seed of whatever is drawn at random (vq's first centres, hybrid anchors) (0)"""


class Settings(WindowSettings, RankSettings, ClusterSettings, OtherSettings, total=False):
    """Any settings of `ADMSConfig`."""


class LowRankSettings(WindowSettings, ClusterSettings, OtherSettings, total=False):
    """Those of `enable_adms_low_rank`, which has the others as parameters."""


class VQSettings(WindowSettings, RankSettings, OtherSettings, total=False):
    """Those of `enable_adms_vq`, likewise."""


class StreamingSettings(RankSettings, ClusterSettings, OtherSettings, total=False):
    """Those of `enable_streaming_llm`, likewise."""
