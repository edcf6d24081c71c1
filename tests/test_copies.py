"""Layers that share a stack: what is done to their rows, and what copies and pickles make of them, loses nothing."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from conftest import make_tiny_llama, token_ids
from test_controller import deep_llama
from test_families import make
from test_positions import small_window

from streaming_llm import ADMSConfig, enable_adms_llm
from streaming_llm.stream.upkeep import Upkeep

SMALL = {
    "start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8,
    "attention_window": 16, "num_clusters": 4, "min_middle_size_for_compress": 0,
}  # fmt: skip
SKETCHES = {"enable_dual_fidelity": True, "sketch_budget": 4, "sketch_originals": 16}
REPLAY = {"enable_residual_replay": True, "replay_budget": 4, "energy_replay_threshold": 1.0}
ALL = {**SKETCHES, **REPLAY, "calibration_window": 32}
tiny, deep, windowed = (functools.cache(build) for build in (make_tiny_llama, deep_llama, small_window))
# name: (model, settings, tokens before)
SETTINGS = {
    "base": (tiny, ADMSConfig(**SMALL), 50),
    "nothing compacted yet": (tiny, ADMSConfig(**SMALL), 20),
    "dual fidelity": (tiny, ADMSConfig(**SMALL, **SKETCHES), 60),
    "replay": (tiny, ADMSConfig(**SMALL, **REPLAY), 60),
    "calibration": (tiny, ADMSConfig(**SMALL, enable_position_calibration=True, anchor_mode="hybrid"), 50),
    "controller of the layer": (tiny, ADMSConfig(**SMALL, enable_adaptive_controller=True), 50),
    "all four": (deep, ADMSConfig.adm_plus_plus(**SMALL, **ALL), 80),
    "all four, controller of the layer": (tiny, ADMSConfig.adm_plus_plus(**SMALL, **ALL, controller_scope="layer"), 60),
    "vq": (tiny, ADMSConfig(**SMALL, compressor_type="vq"), 50),
    "attention matching": (tiny, ADMSConfig(**SMALL, compressor_type="attention_matching"), 50),
    "budgets by variance": (tiny, ADMSConfig(**SMALL, use_adaptive_budget=True), 70),
    "streaming": (tiny, ADMSConfig(**{**SMALL, "compressed_budget": 0, "min_importance_tokens": 0}), 50),
    "past the trained length": (windowed, ADMSConfig(**SMALL), 150),
    "half precision past it": (functools.cache(lambda: small_window().to(torch.bfloat16)), ADMSConfig(**SMALL), 150),
    "sliding layers": (functools.cache(lambda: make("gemma2")), ADMSConfig(**SMALL), 50),
}
CASES = [(name, False) for name in SETTINGS] + [(name, True) for name in ("base", "all four", "budgets by variance")]


@torch.no_grad()
def padded_stream(model, ids, mask, cache, start: int, stop: int, chunk: int = 5) -> torch.Tensor:
    """Logits of the tokens from `start` to `stop`; `mask` is None or covers them all."""
    parts = []
    for at in range(start, stop, chunk):
        given = {} if mask is None else {"attention_mask": mask[:, : at + chunk]}
        parts.append(model(ids[:, at : at + chunk], past_key_values=cache, **given).logits)
    return torch.cat(parts, 1)


def begun(name: str, padded: bool = False):
    """A model, its cache after so many tokens of three rows, and `run(cache, order)`: logits of the tokens after, the rows
    being in that order."""
    make_model, config, before = SETTINGS[name]
    model, ids = make_model(), token_ids(before + 20, 3)
    mask = torch.ones_like(ids)
    for row, missing in enumerate((0, 7, 3)):
        mask[row, :missing] = 0
    cache = enable_adms_llm(model, config)
    padded_stream(model, ids, mask if padded else None, cache, 0, before)

    def run(own, order=(0, 1, 2)):
        order = list(order)
        return padded_stream(model, ids[order], mask[order] if padded else None, own, before, before + 20)

    return model, cache, run


def layers_together(cache) -> list[tuple[int, ...]]:
    """The layers of each stack."""
    return [stack.layers for stack in cache.stream.stacks]


PERMUTED = torch.tensor([2, 0, 1])


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_a_change_of_rows_that_changes_nothing_loses_nothing(name, padded):
    _, cache, run = begun(name, padded)
    twin, together = copy.deepcopy(cache), layers_together(cache)
    twin.reorder_cache(torch.arange(3))
    twin.batch_repeat_interleave(1)
    twin.batch_select_indices(torch.arange(3))
    twin.batch_select_indices(torch.ones(3, dtype=torch.bool))
    twin.reorder_cache(PERMUTED)
    twin.reorder_cache(PERMUTED.argsort())
    twin.batch_repeat_interleave(2)
    twin.batch_select_indices(torch.tensor([0, 2, 4]))
    assert twin.stats == cache.stats and layers_together(twin) == together
    assert torch.equal(run(twin), run(cache))


@pytest.mark.parametrize("name", ["all four", "budgets by variance"])
def test_rearranged_rows_say_what_they_did_before(name):
    _, cache, run = begun(name)
    expected = run(copy.deepcopy(cache))
    cache.reorder_cache(PERMUTED)
    torch.testing.assert_close(run(cache, PERMUTED.tolist()), expected[PERMUTED], rtol=1e-3, atol=1e-3)


def test_layers_are_compacted_together_after_their_rows_changed(monkeypatch):
    _, cache, run = begun("budgets by variance")
    cache.reorder_cache(PERMUTED)
    assert layers_together(cache) == [(0, 1)]
    check_parts(cache)
    before, calls = cache.stats["total_compressions"], []
    compacted = Upkeep.compacted

    def watched(upkeep, stack, *args, **kwargs):
        calls.append(stack.layers)
        return compacted(upkeep, stack, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Upkeep, "compacted", watched)
        run(cache, PERMUTED.tolist())
    assert cache.stats["total_compressions"] > before and set(calls) == {(0, 1)}


def check_parts(cache) -> None:
    """Each layer shows its part of what its stack holds, and no tensor is held twice."""
    for stack in cache.stream.stacks:
        held = [
            *stack.tokens.tensors().values(),
            *(t for own in stack.memory.states().values() for t in own.tensors().values()),
        ]
        assert all(tensor.shape[0] == len(stack.layers) * stack.batch for tensor in held)
        for number in stack.layers:
            for name in ("keys", "values"):
                own, whole = getattr(cache.layers[number], name), getattr(stack.tokens, name)
                assert own.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                assert torch.equal(own, stack.of_layer(number, whole)[:, :, : stack.columns])


def test_rows_of_one_layer_can_not_be_changed_by_themselves():
    _, cache, run = begun("budgets by variance")
    twin = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="the cache decides itself what to keep"):
        cache.layers[0].reorder_cache(torch.arange(3))
    assert torch.equal(run(cache), run(twin))


# -- copies and pickles ----------------------------------------------------------------------------------------------------


def through(write, read):
    def copied(cache):
        file = io.BytesIO()
        write(cache, file)
        file.seek(0)
        return read(file)

    return copied


def joblib_copy(cache):
    joblib = pytest.importorskip("joblib")
    return through(joblib.dump, joblib.load)(cache)


def dill_copy(cache):
    dill = pytest.importorskip("dill")
    return dill.loads(dill.dumps(cache))


def cloudpickle_copy(cache):
    cloudpickle = pytest.importorskip("cloudpickle")
    return pickle.loads(cloudpickle.dumps(cache))


COPIES = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "oldest pickle with new classes": lambda cache: pickle.loads(pickle.dumps(cache, protocol=2)),
    "joblib": joblib_copy,
    "dill": dill_copy,
    "cloudpickle": cloudpickle_copy,
    "torch.save": through(torch.save, lambda file: torch.load(file, weights_only=False)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copied_cache_says_what_the_first_says(way):
    _, cache, run = begun("budgets by variance")
    twin = COPIES[way](cache)
    assert twin.config == cache.config and twin.stats == cache.stats and twin.nbytes == cache.nbytes
    assert layers_together(twin) == layers_together(cache) == [(0, 1)]
    check_parts(twin)
    assert torch.equal(run(twin), run(cache))


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_every_cache_goes_through_a_pickle_to_the_bit(name, padded):
    _, cache, run = begun(name, padded)
    twin = pickle.loads(pickle.dumps(cache))
    assert twin.stats == cache.stats and twin.nbytes == cache.nbytes
    assert torch.equal(run(twin), run(cache))


def test_a_pickle_takes_no_more_than_what_is_held():
    sizes = {"start_size": 2, "recent_size": 400, "compressed_budget": 64, "sketch_budget": 8, "replay_budget": 4}
    cache = enable_adms_llm(deep(), ADMSConfig.adm_plus_plus(**sizes))
    plans = []
    for tokens in (600, 200):
        padded_stream(deep(), token_ids(tokens), None, cache, 0, tokens, 50)
        plans.append(cache.layers[0].stack.rows[0].least > 0)
        assert len(pickle.dumps(cache)) < 1.05 * cache.nbytes + 100_000
    assert plans == [False, True]


def test_a_cache_is_pickled_before_its_first_token_and_without_a_model():
    model = make_tiny_llama()
    new = pickle.loads(pickle.dumps(enable_adms_llm(model, **SMALL)))
    ids = token_ids(80)
    expected = padded_stream(model, ids, None, enable_adms_llm(model, **SMALL), 0, 80)
    assert torch.equal(padded_stream(model, ids, None, new, 0, 80), expected)
    assert layers_together(new) == [(0, 1)]
