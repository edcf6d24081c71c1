"""Recall: a cache that recalls everything is the full cache; otherwise it is bounded, and a row is the row alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import make_tiny_llama, padded_passes, stream, token_ids
from transformers import DynamicCache

from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm
from streaming_llm.data.tokens import WeightedTokens
from streaming_llm.store import shelves
from streaming_llm.store.archive import Archive
from streaming_llm.store.codec import Codec

SIZES = {
    "start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 4, "num_clusters": 4,
    "attention_window": 16, "min_middle_size_for_compress": 0, "recall_rank": 8, "enable_recall": True,
}  # fmt: skip
PLUS = (
    ADMSConfig.adm_plus_plus().to_dict() | SIZES | {"sketch_budget": 6, "replay_budget": 4, "energy_replay_threshold": 1.0}
)
EVERYTHING = {"recall_budget": 512, "recall_chunk_budget": 512}
KINDS = {
    "base": SIZES,
    "vq": SIZES | {"compressor_type": "vq"},
    "attention matching": SIZES | {"compressor_type": "attention_matching"},
    "no middle": SIZES | {"compressed_budget": 0, "min_importance_tokens": 0},
    "all four": PLUS,
    "all four, by layer": PLUS | {"controller_scope": "layer"},
    "grid anchors": PLUS | {"anchor_mode": "grid"},
    "by variance": SIZES | {"use_adaptive_budget": True},
}


def full(model, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    return stream(model, ids, DynamicCache(config=model.config), chunk)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_what_recalls_all_that_left_is_the_full_cache(settings, chunk):
    model, ids = make_tiny_llama(), token_ids(200)
    cache = enable_adms_llm(model, **settings | EVERYTHING)
    logits = stream(model, ids, cache, chunk)
    assert cache.held_tokens < 200
    torch.testing.assert_close(logits, full(model, ids, chunk), atol=2e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 24])
def test_a_recalled_token_counts_once(chunk):
    """Without taking its mass off what stands for it the same stream is far from the full cache."""
    model, ids = make_tiny_llama(), token_ids(160)
    cache = enable_adms_llm(model, **SIZES | EVERYTHING)
    right = stream(model, ids, cache, chunk)
    cache = enable_adms_llm(model, **SIZES | EVERYTHING)
    cache.stream.upkeep._archived = _shares_lost(cache.stream.upkeep._archived)
    wrong = stream(model, ids, cache, chunk)
    wanted = full(model, ids, chunk)
    assert (wrong - wanted).abs().max() > 20 * (right - wanted).abs().max()


def _shares_lost(archived):
    def lost(*args):
        links = archived(*args)
        return type(links)(**links.tensors() | {"share": links.share * 0})

    return lost


@pytest.mark.parametrize("settings", [SIZES, PLUS], ids=["base", "all four"])
def test_attended_tokens_and_the_archive_are_bounded_after_every_pass(settings):
    model, cap = make_tiny_llama(), 50
    config = ADMSConfig(**settings | {"recall_tokens": cap, "recall_budget": 6, "recall_chunk_budget": 10})
    cache, heads = enable_adms_llm(model, config), 2 * model.config.num_hidden_layers
    sizes, start = [1] * 90 + [13] * 6 + [120, 3, 1, 70] + [1] * 80, 0
    ids = token_ids(sum(sizes))
    for size in sizes:
        with torch.no_grad():
            logits = model(ids[:, start : start + size], past_key_values=cache).logits
        start += size
        assert logits.isfinite().all()
        assert cache.held_tokens <= config.expected_max_tokens
        archived = cache.stats["archived_tokens"]
        assert archived <= cap * heads
        for stack in cache.stream.stacks:
            assert int(stack.archive.links.open.sum(-1).max()) <= cap
            for layer in stack.layers:
                assert cache.stream.read.get(layer) is None or cache.stream.read[layer].slots.shape[2] <= 10
    assert archived == cap * heads
    assert cache.nbytes <= config.memory_bytes(model.config)
    assert stack.archive.slots == config.archive_slots


def test_past_the_cap_the_newest_are_what_can_be_recalled():
    model = make_tiny_llama()
    cache = enable_adms_llm(model, **SIZES | EVERYTHING | {"recall_tokens": 32})
    stream(model, token_ids(150), cache, 1)
    positions, weights = cache.recalled(0, 0)
    assert positions.min() >= 150 - 16 - 8 - 32 and positions.max() < 150 - 16
    assert (weights[:-1] >= weights[1:]).all() and 0 < weights.sum() < 1


def test_recalled_tells_what_was_read_and_how_strongly():
    model, ids = make_tiny_llama(), token_ids(120)
    model.set_attn_implementation("eager")
    cache = enable_adms_llm(model, **SIZES | {"recall_budget": 5})
    assert len(cache.recalled.__self__.stream.read) == 0
    stream(model, ids[:, :-1], cache, 1)
    with torch.no_grad():
        attentions = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
    for layer, head in ((0, 0), (1, 1)):
        positions, weights = cache.recalled(layer, head)
        groups = attentions[layer].shape[1] // 2
        own = attentions[layer][0, head * groups : (head + 1) * groups, -1, -5:].mean(0)
        torch.testing.assert_close(weights, own.sort(descending=True).values, atol=1e-6, rtol=1e-4)
        assert positions.dtype == torch.int64 and len(set(positions.tolist())) == 5
    with pytest.raises(IndexError, match="head_idx=9"):
        cache.recalled(0, 9)


@pytest.mark.parametrize("settings", [SIZES, PLUS], ids=["base", "all four"])
def test_a_padded_row_is_the_row_alone(settings, monkeypatch):
    # Between tokens that a query asks for equally rounding decides: none is there twice, and codes are not rounded.
    monkeypatch.setitem(shelves._CODE_DTYPES, 16, torch.float32)
    model = make_tiny_llama(vocab_size=512)
    settings = settings | {"recall_budget": 6, "recall_chunk_budget": 12, "recall_rank": 16}
    lengths = [[3, 20, 75], *[[1, 1, 1]] * 20, [25, 2, 40], *[[1, 1, 1]] * 10]
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0)) + 3
    rows = [order[50 * row : 50 * row + sum(own)][None] for row, own in enumerate(zip(*lengths, strict=True))]
    cache = enable_adms_llm(model, **settings)
    together = [[] for _ in rows]
    for logits, real in padded_passes(model, rows, lengths, cache):
        for row in range(3):
            together[row].append(logits[row][real[row]])
    for row, ids in enumerate(rows):
        alone, start = [], 0
        cache = enable_adms_llm(model, **settings)
        for sizes in lengths:
            with torch.no_grad():
                alone.append(model(ids[:, start : start + sizes[row]], past_key_values=cache).logits[0])
            start += sizes[row]
        torch.testing.assert_close(torch.cat(together[row]), torch.cat(alone), atol=5e-5, rtol=0)


@pytest.mark.parametrize("settings", [SIZES, PLUS], ids=["base", "all four"])
@pytest.mark.parametrize("store", ["device", "host", "disk"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save", "beams"])
def test_a_cache_that_was_copied_goes_on_to_the_bit(settings, store, way, tmp_path):
    model, ids = make_tiny_llama(), token_ids(140)
    cache = enable_adms_llm(model, **settings | {"recall_store": store, "recall_tokens": 64, "recall_budget": 6})
    stream(model, ids[:, :100], cache, 1)
    if way == "save":
        cache.save(tmp_path / "chat.adms")
        other = ADMSKVCache.load(tmp_path / "chat.adms", model)
    elif way == "beams":
        other = copy.deepcopy(cache)
        other.batch_repeat_interleave(2)
        other.reorder_cache(torch.tensor([1, 0]))
        other.batch_select_indices(torch.tensor([1]))
    else:
        other = copy.deepcopy(cache) if way == "deepcopy" else pickle.loads(pickle.dumps(cache))
    wanted = stream(model, ids[:, 100:], cache, 1)
    assert torch.equal(stream(model, ids[:, 100:], other, 1), wanted)
    assert other.stats == cache.stats


def test_where_the_archive_lies_changes_nothing():
    model, ids = make_tiny_llama(), token_ids(300)
    settings = SIZES | {"recall_tokens": 100, "recall_budget": 6}
    logits = [stream(model, ids, enable_adms_llm(model, **settings, recall_store=store), 9) for store in ("device", "disk")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("bits,error", [(16, 0.0), (8, 0.02), (4, 0.25)])
@pytest.mark.parametrize("dim", [64, 80, 6])
def test_a_codec_gives_back_what_it_was_given(bits, error, dim):
    states = torch.randn(2, 3, 50, dim, generator=torch.Generator().manual_seed(0))
    states[..., 0] *= 20
    codec = Codec(bits, dim, torch.float32)
    coded = codec.encode(states)
    assert [(own.shape[-1], own.dtype) for own in coded] == codec.fields()
    back = codec.decode(coded)
    assert ((back - states).norm(dim=-1) / states.norm(dim=-1)).mean() <= error
    assert torch.equal(back, states) == (bits == 16)
    assert codec.decode(codec.encode(torch.zeros(1, dim))).abs().max() == 0


def test_fewer_bits_recall_nearly_the_same():
    model, ids = make_tiny_llama(), token_ids(200)
    exact, eight, four = (
        stream(model, ids, enable_adms_llm(model, **SIZES | EVERYTHING | {"recall_bits": bits}), 1) for bits in (16, 8, 4)
    )
    none = stream(model, ids, enable_adms_llm(model, **SIZES | {"enable_recall": False}), 1)
    errors = [(own - exact).abs().mean() for own in (eight, four, none)]
    assert errors[0] < 0.2 * errors[1] and errors[1] < 0.5 * errors[2]


def test_a_full_disk_is_told_once_and_the_cache_goes_on(monkeypatch, caplog):
    model, ids = make_tiny_llama(), token_ids(3000)
    allocated, free = shelves._allocated, [1400]

    def limited(shape, dtype, place, device):
        if place == "disk" and shape[2] > free[0]:
            raise shelves.OutOfRoom(28, "no space left on device")
        return allocated(shape, dtype, place, device)

    monkeypatch.setattr(shelves, "_allocated", limited)
    cache = enable_adms_llm(model, **SIZES | {"recall_store": "disk", "recall_budget": 6})
    logits = stream(model, ids, cache, 8)
    assert logits.isfinite().all()
    told = {record.getMessage() for record in caplog.records if "no more room" in record.getMessage()}
    assert len(told) == 1 and "recall_store='disk'" in told.pop()
    assert 900 < cache.stats["archived_tokens"] / 4 < 1024


def test_a_pass_that_fails_leaves_the_archive_as_it_was():
    model, ids = make_tiny_llama(), token_ids(200)
    cache = enable_adms_llm(model, **PLUS | {"recall_tokens": 40, "recall_budget": 6})
    stream(model, ids[:, :120], cache, 1)
    other = copy.deepcopy(cache)
    hook = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    for new in (1, 9, 60):
        with pytest.raises(KeyError, match="stop"), torch.no_grad():
            model(ids[:, 120 : 120 + new], past_key_values=cache)
    hook.remove()
    assert torch.equal(stream(model, ids[:, 120:], cache, 1), stream(model, ids[:, 120:], other, 1))


def test_past_the_trained_length_what_is_recalled_stands_within_it():
    from streaming_llm.evaluation.soak import tiny_model

    model = tiny_model(128, vocab_size=128)
    cache = enable_adms_llm(model, **SIZES | {"recall_budget": 6})
    logits = stream(model, token_ids(700), cache, 1)
    assert logits.isfinite().all() and cache.window.offsets[0] > 0
    found = cache.stream.read[0]
    archive = cache.stream.stack_of(0).archive_of(0)
    pos, _ = archive.positions(found.slots, [cache.stream.stack_of(0).rows[0].moved])
    assert pos.min() < 0 and cache.recalled(0, 0)[0].min() >= 0


def test_settings_of_recall_are_checked():
    with pytest.raises(ValueError, match="recall_bits=3 must be one of 16, 8, 4"):
        ADMSConfig(recall_bits=3)
    with pytest.raises(ValueError, match="recall_store='tape' must be one of device, host, disk"):
        ADMSConfig(recall_store="tape")
    with pytest.raises(ValueError, match="recall_tokens=0 is out of range"):
        ADMSConfig(recall_tokens=0)
    with pytest.raises(ValueError, match="recall_rank=99 must not exceed the model's head_dim=16"):
        enable_adms_llm(make_tiny_llama(), enable_recall=True, recall_rank=99)


def test_tokens_are_found_where_their_positions_say():
    config = ADMSConfig(**SIZES | {"recall_tokens": 6, "compression_interval": 1})
    keys = torch.randn(1, 2, 4, 8)
    archive = Archive.empty(config, keys, keys, 1).with_room([0], 4)
    tokens = WeightedTokens.new(keys, keys, torch.tensor([3.0, 4.0, 5.0, 9.0])[None, None])
    archive.shelves.write(slice(0, 1), [0], torch.arange(4), tokens, torch.zeros(1, 2, 4, 8), 10)
    wanted = torch.tensor([19.0, 14.0, 12.0]).expand(1, 2, 3)
    slots, found = archive.shelves.slots_of([0], torch.arange(4), wanted)
    assert found[0, 0].tolist() == [True, True, False] and slots[0, 0, :2].tolist() == [3, 1]
