"""Layers compacted together: what a compaction costs, in bytes and in operators."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import token_ids
from costs import Temporaries, operators

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


def compaction(model, config: ADMSConfig) -> tuple[int, Temporaries, torch.Tensor]:
    """Bytes held by a full cache, what the pass whose one token makes it compact makes of temporaries, and its logits."""
    cache = enable_adms_llm(model, config)
    full = cache.config.expected_max_tokens
    with torch.no_grad():
        model(token_ids(full), past_key_values=cache)
        assert not cache.layers[0].stack.compacted
        with Temporaries() as made:
            logits = model(token_ids(1), past_key_values=cache).logits
    assert {row.compactions for stack in cache.stream.stacks for row in stack.rows} == {1}
    return cache.nbytes, made, logits


@pytest.mark.parametrize("name,dtype", [*((name, torch.float32) for name in CONFIGS), ("adm++", torch.bfloat16)])
def test_a_compaction_works_with_no_more_bytes_than_it_may_and_gives_the_same_to_the_bit(name, dtype):
    # What it gives is beside what there was until the pass has gone well: only what is given back counts.
    model = tiny_model(4096, num_hidden_layers=LAYERS).to(dtype)
    held, made, logits = compaction(model, CONFIGS[name])
    for limit in (made.working // 2, made.working // 4):
        limited = dataclasses.replace(CONFIGS[name], compaction_bytes=limit)
        _, less, same = compaction(model, limited)
        assert less.working <= limit
        assert torch.equal(logits, same)


def test_a_limit_that_no_layer_fits_lets_one_be_compacted_at_a_time():
    model = tiny_model(4096, num_hidden_layers=LAYERS)
    _, made, logits = compaction(model, CONFIGS["adm++"])
    _, less, same = compaction(model, dataclasses.replace(CONFIGS["adm++"], compaction_bytes=1))
    assert less.working <= made.working / LAYERS * 1.6
    assert torch.equal(logits, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [{}, {"compaction_bytes": 100_000}, {"compressor_type": "attention_matching"}], ids=str)
def test_a_cache_planned_for_some_bytes_stays_below_them_while_it_compacts(given, dtype):
    model, size = tiny_model(4096, num_hidden_layers=LAYERS).to(dtype), 3_000_000
    config = ADMSConfig.from_memory(model.config, size, dtype, rank=8, attention_window=32, **given)
    held, made, _ = compaction(model, config)
    assert held + made.peak <= size


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
