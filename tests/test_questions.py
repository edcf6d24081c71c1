"""Decoding and compaction ask the device nothing: on tensors that hold no data every question raises."""

from __future__ import annotations

import pytest
import torch

from streaming_llm import ADMSConfig, enable_adms_llm
from streaming_llm.evaluation.soak import tiny_model
from streaming_llm.stream import trading

SIZES = {
    "start_size": 1, "recent_size": 6, "compressed_budget": 8, "compression_interval": 4, "rank": 2,
    "attention_window": 6, "num_clusters": 2, "min_middle_size_for_compress": 0, "min_importance_tokens": 0,
    "calibration_window": 16,
}  # fmt: skip
MODULES = {"sketch_budget": 2, "replay_budget": 1, "energy_replay_threshold": 1.0, "sketch_originals": 8}
RECALL = {"enable_recall": True, "recall_budget": 4, "recall_chunk_budget": 8, "recall_rank": 4, "recall_tokens": 48}


def plus(**settings) -> ADMSConfig:
    return ADMSConfig.adm_plus_plus(**SIZES, **MODULES, **settings)


CONFIGS = {
    "base": ADMSConfig(**SIZES),
    "sketches": ADMSConfig(**SIZES, enable_dual_fidelity=True, sketch_budget=2, sketch_originals=8),
    "replay": ADMSConfig(**SIZES, enable_residual_replay=True, replay_budget=1, energy_replay_threshold=1.0),
    "calibration": ADMSConfig(**SIZES, enable_position_calibration=True),
    "all": plus(),
    "budgets within layers": plus(controller_scope="layer"),
    "grid": plus(anchor_mode="grid"),
    "hybrid": plus(anchor_mode="hybrid"),
    "first": plus(sketch_reduction="first"),
    "sum": plus(sketch_reduction="sum"),
    "mixed": ADMSConfig(**SIZES, importance_metric="mixed"),
    "value norm": ADMSConfig(**SIZES, importance_metric="value_norm"),
    "key norm": ADMSConfig(**SIZES, importance_metric="key_norm"),
    "coverage": ADMSConfig(**SIZES, coverage_priority=0.5),
    "protected": ADMSConfig(**SIZES, protect_exact=True),
    "variance": ADMSConfig(**SIZES, use_adaptive_budget=True),
    "vq": plus(compressor_type="vq"),
    "attention matching": plus(compressor_type="attention_matching"),
    "absolute positions": ADMSConfig(**SIZES, position_policy="absolute"),
    "positions of the cache": plus(position_policy="cache"),
    "recall": ADMSConfig(**SIZES, **RECALL),
    "all with recall": plus(**RECALL),
    "recall in 8 bits": ADMSConfig(**SIZES, **RECALL, recall_bits=8),
    "recall in 4 bits": plus(**RECALL, recall_bits=4),
    "in parts": plus(compaction_bytes=1),
}


def runs_on_meta() -> bool:
    """Whether the model itself computes without data: transformers 5.2 asks for autocast there, which torch has none of."""
    try:
        tiny_model(1024).to("meta")(torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not runs_on_meta(), reason="this transformers can't run on meta tensors")

# A prompt, steps (more than ids wait for), chunks, one longer than the buffer, steps.
PASSES = (5, *[1] * 66, 3, 4, 40, *[1] * 5)


@pytest.mark.parametrize("name,dtype", [*((name, torch.float32) for name in CONFIGS), ("all", torch.bfloat16)])
@torch.no_grad()
def test_a_stream_asks_the_device_nothing_but_what_layers_lost_where_they_trade(name, dtype, monkeypatch):
    questions = []

    def answer(lost: torch.Tensor) -> torch.Tensor:
        questions.append(lost)
        return torch.linspace(0.1, 0.9, lost.numel(), dtype=lost.dtype).view(lost.shape)

    monkeypatch.setattr(trading, "asked", answer)
    model = tiny_model(1024).to(dtype)
    # What is read of the model once, when it is enabled, is asked then.
    cache = enable_adms_llm(model, CONFIGS[name])
    model.to("meta")
    for new in PASSES:
        model(torch.zeros(2, new, dtype=torch.int64, device="meta"), past_key_values=cache)
    compactions = {row.compactions for stack in cache.stream.stacks for row in stack.rows}
    assert min(compactions) > 15
    trades = CONFIGS[name].enable_adaptive_controller and CONFIGS[name].controller_scope == "model"
    assert (0 < len(questions) <= 6) if trades else not questions


@torch.no_grad()
def test_a_question_would_have_been_noticed():
    model = tiny_model(1024)
    cache = enable_adms_llm(model, CONFIGS["all"])
    model.to("meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        for new in PASSES:
            model(torch.zeros(1, new, dtype=torch.int64, device="meta"), past_key_values=cache)
