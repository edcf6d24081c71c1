"""Every model type of the table in every mode: what holds for a Llama holds for each of them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from conftest import stream, token_ids
from family_models import TYPES, shared
from transformers import DynamicCache

from streaming_llm import SUPPORTED_MODEL_TYPES, ADMSKVCache, ADMSLayer, disable_adms_llm, enable_adms_llm
from streaming_llm.model.enable import is_enabled
from streaming_llm.model.families import FAMILIES
from streaming_llm.model.rope_reading import rope_layers

SMALL = {"start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8}
ROOMY = {**SMALL, "recent_size": 40}
IDS = token_ids(120, 2)


@pytest.fixture
def model(model_type):
    own = shared(model_type)
    if FAMILIES[model_type].varies:
        try:
            enable_adms_llm(own, **SMALL)
        except ValueError as error:
            assert "of its probe the check 'queries' failed" in str(error)
            pytest.skip(f"this transformers computes the attention of {model_type} itself")
        disable_adms_llm(own)
    yield own
    disable_adms_llm(own)


def equal_below_the_bound(model):
    def run(cache):
        return torch.cat([stream(model, IDS[:, :30], cache, 15), stream(model, IDS[:, 30:36], cache, 1)], dim=1)

    expected = run(DynamicCache(config=model.config))
    assert torch.equal(run(enable_adms_llm(model, **ROOMY)), expected)
    disable_adms_llm(model)
    assert torch.equal(run(DynamicCache(config=model.config)), expected)


def bounded_past_it(model):
    cache = enable_adms_llm(model, **SMALL)
    for start, stop, chunk in ((0, 50, 50), (50, 70, 7), (70, 75, 1)):
        assert stream(model, IDS[:, start:stop], cache, chunk).isfinite().all()
        assert cache.held_tokens <= cache.config.expected_max_tokens and cache.get_seq_length() == stop
    layers = [layer for layer in cache.layers if isinstance(layer, ADMSLayer)]
    assert layers and all(layer.compacted and layer.stack.queries is not None for layer in layers)
    assert any((layer.held.beta > 0).any() for layer in layers)


def positions_read(model):
    family, ropes = FAMILIES[model.config.model_type], rope_layers(model)
    kinds = getattr(model.config, "layer_types", None)
    if family.rotates_sliding_only:
        assert [rope.rotates for rope in ropes] == [kind == "sliding_attention" for kind in kinds]
    elif model.config.model_type != "smollm3":
        assert all(rope.rotates != family.learned_positions for rope in ropes)


def past_the_trained_length(model):
    cache = enable_adms_llm(model, **SMALL)
    if FAMILIES[model.config.model_type].learned_positions:
        with pytest.raises(ValueError, match="past the 80 positions .* has no RoPE"):
            stream(model, IDS, cache, 5)
        return
    logits = stream(model, IDS, cache, 5)
    assert logits.isfinite().all() and cache.window.offsets[0] > 0
    # Where a stream begins makes no difference: positions are those of the window.
    far, parts = enable_adms_llm(model, **SMALL), []
    for start in range(0, IDS.shape[1], 5):
        places = torch.arange(9_000 + start, 9_005 + start)[None]
        parts.append(stream(model, IDS[:, start : start + 5], far, 5, position_ids=places))
    assert torch.equal(torch.cat(parts, dim=1), logits)


def padded_rows(model):
    ids, mask = IDS[:, :30].clone(), torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = ids[0, :9] = 0

    def said(rows: slice, start: int) -> torch.Tensor:
        output = model.generate(
            ids[rows, start:], attention_mask=mask[rows, start:], max_new_tokens=12, min_new_tokens=12, do_sample=False,
            return_dict_in_generate=True, output_logits=True, past_key_values=enable_adms_llm(model, **SMALL),
        )  # fmt: skip
        return torch.stack(output.logits, dim=1)

    torch.testing.assert_close(said(slice(0, 2), 0)[:1], said(slice(0, 1), 9), atol=1e-3, rtol=0)


def beams(model):
    ids = IDS[:, :30]
    given = {"num_beams": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, max_new_tokens=5, **given)
    said = model.generate(ids, max_new_tokens=5, past_key_values=enable_adms_llm(model, **ROOMY), **given)
    assert torch.equal(said, expected)
    cache = enable_adms_llm(model, **SMALL)
    assert model.generate(ids, max_new_tokens=20, past_key_values=cache, **given).shape[1] == 50
    assert cache.held_tokens <= cache.config.expected_max_tokens


def saved_and_loaded(model, folder):
    cache = enable_adms_llm(model, **SMALL)
    stream(model, IDS[:, :60], cache, 6)
    cache.save(folder / "talk")
    expected = stream(model, IDS[:, 60:75], cache, 5)
    assert torch.equal(stream(model, IDS[:, 60:75], ADMSKVCache.load(folder / "talk", model), 5), expected)


def a_failed_pass(model):
    cache = enable_adms_llm(model, **SMALL)
    stream(model, IDS[:, :40], cache, 8)
    untouched = copy.deepcopy(cache)
    layers = next(part for part in model.get_decoder().modules() if isinstance(part, torch.nn.ModuleList))

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = layers[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        stream(model, IDS[:, 40:48], cache, 8)
    handle.remove()
    assert torch.equal(stream(model, IDS[:, 40:60], cache, 8), stream(model, IDS[:, 40:60], untouched, 8))


def recall(model):
    everything = {"enable_recall": True, "recall_budget": 512, "recall_chunk_budget": 512, "recall_rank": 8}
    cache = enable_adms_llm(model, **SMALL, **everything)
    logits, full = (stream(model, IDS[:, :75], own, 5) for own in (cache, DynamicCache(config=model.config)))
    assert cache.held_tokens < 75
    torch.testing.assert_close(logits, full, atol=2e-4, rtol=0)


ALWAYS = (equal_below_the_bound, bounded_past_it, positions_read, past_the_trained_length)
IN_TURN = (padded_rows, beams, saved_and_loaded, a_failed_pass, recall)
# Families that differ in kind have every mode among the quick tests; the others have two of those in turn.
EVERY_MODE = ("cohere2", "glm", "gpt_oss", "opt", "qwen3_moe", "stablelm")


def cases():
    for number, name in enumerate(SUPPORTED_MODEL_TYPES):
        for mode in (*ALWAYS, *IN_TURN):
            quick = mode in ALWAYS or name in EVERY_MODE or mode in (IN_TURN[number % 5], IN_TURN[(number + 2) % 5])
            yield pytest.param(name, mode, id=f"{name}-{mode.__name__}", marks=[] if quick else pytest.mark.slow)


def test_every_type_of_the_table_is_tried_and_there_are_fifty():
    assert sorted(TYPES) == sorted(SUPPORTED_MODEL_TYPES) and len(TYPES) >= 50


@pytest.mark.parametrize("model_type,mode", cases())
def test_a_type_does_in_every_mode_what_a_llama_does(model, mode, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "streaming_llm")
    mode(model, tmp_path) if mode is saved_and_loaded else mode(model)
    assert "probed" not in caplog.text
    assert is_enabled(model) or mode in (equal_below_the_bound, positions_read)
