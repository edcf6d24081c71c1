"""Layers compacted together: what a compaction costs, in bytes and in operators."""

from __future__ import annotations

import pytest
import torch
from conftest import token_ids
from costs import operators, peak_temporaries

from streaming_llm import ADMSConfig, enable_adms_llm
from streaming_llm.evaluation.soak import tiny_model

LAYERS = 8
ROOMY = {"recent_size": 256, "compressed_budget": 128, "rank": 8}
SMALL = {"recent_size": 16, "compressed_budget": 8, "compression_interval": 8, "rank": 4}
CONFIGS = {
    "base": ADMSConfig(**ROOMY),
    "adm++": ADMSConfig.adm_plus_plus(**ROOMY),
    "attention matching": ADMSConfig(**ROOMY, compressor_type="attention_matching"),
}


@torch.no_grad()
def compaction(model, config: ADMSConfig, **options) -> tuple[int, int]:
    """Bytes held by a full cache, and the most bytes of temporaries in the pass whose one token makes it compact."""
    cache = enable_adms_llm(model, config, **options)
    full = cache.config.expected_max_tokens
    model(token_ids(full), past_key_values=cache)
    assert not cache.layers[0].stack.compacted
    most = peak_temporaries(lambda: model(token_ids(1), past_key_values=cache))
    assert {row.compactions for stack in cache.stream.stacks for row in stack.rows} == {1}
    return cache.nbytes, most


@pytest.mark.parametrize("name,dtype", [*((name, torch.float32) for name in CONFIGS), ("base", torch.bfloat16)])
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="temporaries of a compaction are not bounded yet")
def test_a_compaction_needs_no_more_memory_than_the_layers_it_compacts(name, dtype):
    held, most = compaction(tiny_model(4096, num_hidden_layers=LAYERS).to(dtype), CONFIGS[name])
    assert most <= held


@pytest.mark.xfail(strict=True, raises=ValueError, reason="there is no such setting yet")
def test_the_bytes_a_compaction_may_use_can_be_set():
    model = tiny_model(4096, num_hidden_layers=LAYERS)
    held, _ = compaction(model, ADMSConfig(**ROOMY))
    for limit in (held // 2, held // 4):
        assert compaction(model, ADMSConfig(**ROOMY, compaction_bytes=limit))[1] <= limit


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="the plan does not count what a compaction needs yet")
def test_a_cache_planned_for_some_bytes_stays_below_them_while_it_compacts():
    model, size = tiny_model(4096, num_hidden_layers=LAYERS), 1_000_000
    held, most = compaction(model, ADMSConfig.from_memory(model.config, size, rank=8))
    assert held + most <= size


@pytest.mark.parametrize(
    "make,change",
    [
        (ADMSConfig, "reorder_cache"),
        (ADMSConfig.adm_plus_plus, "reorder_cache"),
        (ADMSConfig, "batch_repeat_interleave"),
        (ADMSConfig, "batch_select_indices"),
    ],
    ids=["base-reorder", "adm++-reorder", "base-repeat", "base-select"],
)
@torch.no_grad()
def test_layers_whose_rows_were_rearranged_are_compacted_together_as_before(make, change):
    model = tiny_model(4096, num_hidden_layers=LAYERS)
    cache = enable_adms_llm(model, make(**SMALL))
    model(token_ids(40, 2), past_key_values=cache)

    def dearest() -> int:
        interval = cache.config.compression_interval
        ids = token_ids(interval, cache.batch_size)
        return max(operators(lambda t=t: model(ids[:, t : t + 1], past_key_values=cache)) for t in range(interval))

    # The first steps after a prompt that was compacted fit.
    before = max(dearest(), dearest())
    rows = {"reorder_cache": torch.tensor([1, 1]), "batch_repeat_interleave": 2, "batch_select_indices": torch.tensor([1])}
    getattr(cache, change)(rows[change])
    assert dearest() <= before
