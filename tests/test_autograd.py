"""Autocast, default dtypes and data types: the cache's own maths is the same in every one of them."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from conftest import make_tiny_llama, random_states, stream, token_ids
from test_families import make
from test_runtime import ADAPTIVE, BASE, PLUS, PLUS_PER_LAYER, SMALL, VQ, Broken, failing, kept
from transformers import DynamicCache

from streaming_llm import ADMSConfig, ADMSKVCache, NonFiniteError, enable_adms_llm
from streaming_llm.data.autograd import autocast_dtype, unrecorded
from streaming_llm.model.rope_reading import rope_layers
from streaming_llm.stream.positions import PositionWindow

HALVES = [torch.float16, torch.bfloat16]
CONFIGS = {
    "base": BASE,
    "adm++": PLUS,
    "adm++ per layer, vq": ADMSConfig.adm_plus_plus(
        **SMALL, sketch_budget=4, replay_budget=2, energy_replay_threshold=1.0, controller_scope="layer",
        compressor_type="vq", anchor_mode="hybrid", importance_metric="mixed",
    ),
    "adaptive, attention_matching": ADAPTIVE,
    "vq": VQ,
}  # fmt: skip
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
MODEL = make_tiny_llama()
ROPES = rope_layers(MODEL)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def both(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


# Each is two things at once: what is equal under both is so under either.
MODES = {
    "autocast float16, default bfloat16": lambda: both(default_dtype(torch.bfloat16), torch.autocast("cpu", torch.float16)),
    "autocast bfloat16 in inference mode, default float64": lambda: both(
        default_dtype(torch.float64), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)
    ),
}


def feed(cache: ADMSKVCache, batch: int, padded: bool, mode, tokens: int = 150, dtype=torch.float32) -> None:
    """Passes of seeded random states through all layers, as a model would bring them; each within `mode()`."""
    keys, values = random_states(tokens, batch * len(ROPES), dim=16, dtype=dtype)
    queries = torch.randn(len(ROPES) * batch, 4, tokens, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, :7] = 0 if padded else 1
    start = 0
    # Short passes, and a long one with its own compaction.
    for new in [20, *[4] * 15, 40, *[1] * (tokens - 120)]:
        part, stop = slice(start, start + new), start + new
        positions = (mask[:, :stop].cumsum(1) - 1).clamp_min(0)[:, part]
        with mode():
            cache.begin_forward(positions, mask[:, :stop], new, batch, torch.device("cpu"))
            for number in range(len(ROPES)):
                rows = slice(number * batch, (number + 1) * batch)
                cache.update(keys[rows, :, part], values[rows, :, part], number)
                cache.layers[number].observe(queries[rows, :, part], 0.25)
            cache.end_forward()
        start = stop


def fed(config: ADMSConfig, padded: bool, mode=contextlib.nullcontext, **kind) -> list[torch.Tensor]:
    """Every tensor of a cache that was fed past its bound and past a trained length of 96 positions."""
    window = PositionWindow("auto", 96)
    cache = ADMSKVCache(config, MODEL.config, wired=True, layers_at_once=2, ropes=ROPES, window=window)
    feed(cache, 2, padded, mode, **kind)
    assert any(cache.window.offsets) and cache.layers[0].compacted and cache.stats["total_compressions"] > 20
    return kept(cache)


# -- the cache's own maths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,padded", [*((name, False) for name in CONFIGS), ("adm++", True), ("adaptive, attention_matching", True)]
)
def test_everything_computed_of_equal_states_is_equal_to_the_bit_in_every_mode(name, padded):
    expected = fed(CONFIGS[name], padded)
    for mode in MODES.values():
        got = fed(CONFIGS[name], padded, mode)
        assert len(got) == len(expected)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "name,padded", [("base", True), ("adm++ per layer, vq", False), ("adaptive, attention_matching", False)]
)
def test_float64_states_are_held_as_such_and_scored_in_float32(name, padded):
    expected, got = fed(CONFIGS[name], padded), fed(CONFIGS[name], padded, dtype=torch.float64)
    for wide, own in zip(got, expected, strict=True):
        assert wide.dtype in (own.dtype, torch.float64)
        if wide.dtype == torch.float64 and own.dtype == torch.float32:
            torch.testing.assert_close(wide.float(), own, rtol=1e-3, atol=1e-4)


def test_outside_every_mode_unrecorded_changes_nothing_and_within_it_leaves_them_as_they_were():
    with torch.no_grad(), unrecorded():
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        with unrecorded():
            made = torch.ones(2, 2) @ torch.ones(2, 2)
            assert made.dtype == torch.float32 and not made.is_inference() and not torch.is_grad_enabled()
            assert autocast_dtype(torch.float32, "cpu") == torch.float32
        assert torch.is_inference_mode_enabled() and torch.get_autocast_dtype("cpu") == torch.float16
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16 == autocast_dtype(torch.float32, "cpu")
        assert autocast_dtype(torch.float64, "cpu") == torch.float64


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_what_is_done_by_hand_is_equal_in_every_mode(mode):
    def by_hand() -> list:
        cache = ADMSKVCache(PLUS)
        keys, values = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        where = torch.arange(12, dtype=torch.int64)
        found = [cache._compute_residual_energy(keys, values, keys[:5], values[:5])]
        found.append(cache._compute_spectral_energy(keys[:5], values[:5], keys, values))
        cache._update_sketch_bank(0, 0, keys, values, where)
        cache._update_replay_bank(0, 1, keys, values, where)
        cache._update_calibration_anchors(0, 0, where.float() * 1.5)
        cache._update_controller_state(0, 0, 0.7, 0.3)
        found += [cache._get_adaptive_budget(0, 0, 12), cache._scaled_budget(0, 0, keys, values)]
        found += [cache._calibrate_synthetic_positions(0, 0, where.float(), keys), *cache._trigger_replay(0, 1, 0.1)]
        found += cache._promote_sketches_to_precision(0, 0, 2)
        found += [tensor for pair in [(keys, values)] for tensor in cache._apply_sketch_reduction(*pair)]
        return found

    expected = by_hand()
    with mode():
        got = by_hand()
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


# -- models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,dtype", [("base", torch.float64), ("adm++", torch.bfloat16), ("vq", torch.float16)])
def test_a_model_enabled_and_streamed_under_another_default_dtype_says_the_same_to_the_bit(name, dtype):
    ids, config = token_ids(110, 2), CONFIGS[name]
    model = make_tiny_llama()
    expected = stream(model, ids, enable_adms_llm(model, config), 5)
    again = make_tiny_llama()
    with default_dtype(dtype):
        got = stream(again, ids, enable_adms_llm(again, config), 5)
    assert torch.equal(got, expected)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


# Pairs of what may differ: (settings, model's dtype, autocast, default dtype, padded, implementation).
PAIRS = [
    ("base", torch.float32, torch.float16, torch.float32, False, "sdpa"),
    ("base", torch.float64, torch.bfloat16, torch.bfloat16, True, "eager"),
    ("base", torch.float16, None, torch.float64, True, "sdpa"),
    ("adm++", torch.float32, torch.bfloat16, torch.float64, True, "eager"),
    ("adm++", torch.float64, None, torch.float32, False, "sdpa"),
    ("adm++", torch.bfloat16, torch.float16, torch.bfloat16, False, "sdpa"),
    ("adm++ per layer, vq", torch.float32, torch.float16, torch.bfloat16, True, "sdpa"),
    ("adm++ per layer, vq", torch.float16, torch.bfloat16, torch.float32, False, "eager"),
    ("adaptive, attention_matching", torch.float32, torch.bfloat16, torch.bfloat16, False, "sdpa"),
    ("adaptive, attention_matching", torch.float16, torch.float16, torch.float32, True, "eager"),
    ("adaptive, attention_matching", torch.float64, torch.float16, torch.float64, True, "sdpa"),
    ("vq", torch.float32, torch.float16, torch.float64, True, "eager"),
    ("vq", torch.bfloat16, None, torch.float32, False, "sdpa"),
]  # fmt: skip


@pytest.mark.parametrize("name,dtype,autocast,default,padded,implementation", PAIRS)
def test_a_stream_is_bounded_and_its_next_passes_are_within_the_rounding(
    name, dtype, autocast, default, padded, implementation
):
    model = make_tiny_llama().to(dtype)
    model.set_attn_implementation(implementation)
    cache, ids = enable_adms_llm(model, CONFIGS[name]), token_ids(120, 2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0 if padded else 1
    cast = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()

    def give(model, cache, start: int, stop: int) -> torch.Tensor:
        given = {"attention_mask": mask[:, :stop]} if padded else {}
        return model(ids[:, start:stop], past_key_values=cache, **given).logits

    with torch.no_grad():
        start = 0
        for new in [40, *[5] * 10, *[1] * 20]:
            with cast, default_dtype(default):
                assert give(model, cache, start, start + new).isfinite().all()
            start += new
        assert cache.layers[0].compacted and cache.held_tokens <= cache.config.expected_max_tokens
        # From here on in float32 as well, from the very same state.
        twin = copy.deepcopy(cache)
        model.float()
        expected, full = give(model, twin, start, start + 3), model(ids).logits
        model.to(dtype)
        with cast, default_dtype(default):
            got, rounded = give(model, cache, start, start + 3), model(ids).logits
    # What rounding costs any token of the same model without the cache.
    worst = ((rounded.float() - full).norm(dim=-1) / full.norm(dim=-1)).max()
    assert 0 < relative(got, expected) < worst < 0.3


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("family,name", [*(("llama", name) for name in CONFIGS), ("gemma2", "adm++"), ("falcon", "adm++")])
def test_autocast_and_the_models_dtype_may_change_at_any_pass(family, name, first):
    model, ids = make(family, "eager" if family == "gemma2" else "sdpa"), token_ids(90, 2)
    cache = enable_adms_llm(model, CONFIGS[name])
    with torch.no_grad():
        for number, part in enumerate(ids.split([30, *[4] * 10, *[1] * 20], dim=1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=(number % 3 == 0) == first):
                assert model(part, past_key_values=cache).logits.isfinite().all()
            if number == 0:
                full = next(layer for layer in cache.layers if hasattr(layer, "stack"))
                dtypes = full.stack.tokens.keys.dtype, full.stack.tokens.values.dtype
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            assert model.to(dtype)(ids[:, :9], past_key_values=cache).logits.isfinite().all()
        assert full.compacted and (full.stack.tokens.keys.dtype, full.stack.tokens.values.dtype) == dtypes


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", HALVES)
def test_an_unfilled_cache_under_autocast_gives_logits_equal_to_the_bit(implementation, dtype):
    model, ids = make("llama", implementation), token_ids(60, 2)
    with torch.autocast("cpu", dtype):
        expected = stream(model, ids, DynamicCache(config=model.config), 7)
        assert torch.equal(stream(model, ids, enable_adms_llm(model, rank=8), 7), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_of_padding_only_is_finite_under_autocast(implementation, dtype):
    model, ids = make("llama", implementation), token_ids(100, 2)
    cache = enable_adms_llm(model, BASE)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    with torch.no_grad(), torch.autocast("cpu", dtype):
        for start in range(0, 100, 5):
            logits = model(
                ids[:, start : start + 5], attention_mask=mask[:, : start + 5], past_key_values=cache
            ).logits  # fmt: skip
            assert logits.isfinite().all()
    assert cache.layers[0].compacted


@pytest.mark.parametrize("config,error", [(BASE, KeyboardInterrupt), (PLUS, Broken), (ADAPTIVE, Broken)])
def test_a_pass_that_fails_under_autocast_is_taken_back(config, error):
    model = make("llama", "sdpa")
    failed, never = enable_adms_llm(model, config), enable_adms_llm(model, config)
    for cache in (failed, never):
        stream(model, token_ids(60), cache, 4)
    with failing(model, 1, error), pytest.raises(error), torch.autocast("cpu", torch.float16):
        stream(model, token_ids(4, seed=1), failed, 4)
    with torch.autocast("cpu", torch.bfloat16):
        more = [stream(model, token_ids(44, seed=2), cache, 4) for cache in (failed, never)]
    assert torch.equal(*more)


@pytest.mark.parametrize(
    "config,dtype", [(BASE, torch.bfloat16), (PLUS_PER_LAYER, torch.float16), (ADAPTIVE, torch.float16)]
)
def test_a_model_is_trained_under_autocast_past_the_bound(config, dtype):
    model, ids = make("llama", "sdpa"), token_ids(90, 2)
    cache, scaler = enable_adms_llm(model, config), torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    for part in ids.split(6, dim=1):
        with torch.autocast("cpu", dtype):
            loss = model(part, labels=part, past_key_values=cache).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not any(tensor.requires_grad for tensor in kept(cache))
    # The scale falls where a gradient was not finite.
    assert scaler.get_scale() == 64.0 and cache.layers[0].compacted
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_beams_are_searched_under_autocast():
    ids = token_ids(40)
    with torch.autocast("cpu", torch.bfloat16):
        cache = enable_adms_llm(MODEL, PLUS)
        said = MODEL.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, min_new_tokens=30, num_beams=2,
            past_key_values=cache,
        )  # fmt: skip
    assert said.shape[1] == 70 and cache.layers[0].compacted


# -- what is too large ---------------------------------------------------------------------------------------------------


def test_what_is_too_large_for_the_dtype_held_is_refused_and_named_and_nothing_changed():
    model, ids = make("llama", "sdpa"), token_ids(60)
    cache, never = enable_adms_llm(model, BASE), enable_adms_llm(model, BASE)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        model(ids[:, :50], past_key_values=cache)
        model(ids[:, :50], past_key_values=never)
    weight = model.model.layers[1].self_attn.v_proj.weight
    with torch.no_grad():
        weight.mul_(1e6)
        with pytest.raises(NonFiniteError, match=r"value_states hold NaN or infinity in torch\.float16"):
            model(ids[:, 50:54], past_key_values=cache)
        weight.div_(1e6)
    assert torch.equal(*(stream(model, ids[:, :30], each, 3) for each in (cache, never)))


@EVERY
def test_values_near_the_largest_float16_stay_finite(config):
    window = PositionWindow("auto", 96)
    cache = ADMSKVCache(config, MODEL.config, wired=True, layers_at_once=2, ropes=ROPES, window=window)
    keys, values = random_states(160, 2 * len(ROPES), dim=16, dtype=torch.float16)
    values = (values.sign() * 65000 * (0.2 + 0.8 * values.abs().clamp_max(1))).to(torch.float16)
    for start in range(0, 160, 5):
        cache.begin_forward(None, None, 5, 2, torch.device("cpu"))
        for number in range(len(ROPES)):
            part = slice(2 * number, 2 * number + 2), slice(None), slice(start, start + 5)
            cache.update(keys[part], values[part], number)
            cache.layers[number].observe(keys[part].repeat_interleave(2, dim=1), 0.25)
        cache.end_forward()
    assert all(layer.values.isfinite().all() for layer in cache.layers) and cache.layers[0].compacted
