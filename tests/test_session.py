"""A saved conversation goes on to the bit, in another process too; what does not belong together is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids
from safetensors import safe_open
from safetensors.torch import save_file
from test_controller import deep_llama
from test_families import make
from test_positions import small_window
from test_rows import SMALL as ROWS
from test_rows import left_padded, run_padded

from streaming_llm import ADMSConfig, ADMSKVCache, ADMSLayer, disable_adms_llm, enable_adms_llm, session
from streaming_llm.compressors import get_compressor
from streaming_llm.model.enable import is_enabled
from streaming_llm.model.facts import describe_model, layer_devices, model_differences
from streaming_llm.store.row import Row
from streaming_llm.store.stack import Stack
from streaming_llm.stream.ranks import Ranks

SMALL = {
    "start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8,
    "attention_window": 16, "num_clusters": 4, "min_middle_size_for_compress": 0,
}  # fmt: skip
MODULES = {"sketch_budget": 4, "replay_budget": 4, "sketch_originals": 16, "calibration_window": 32,
           "energy_replay_threshold": 1.0}  # fmt: skip
STREAMING = {**SMALL, "compressed_budget": 0, "min_importance_tokens": 0}
llama = functools.cache(make_tiny_llama)
deep = functools.cache(deep_llama)
# What a stream and a cache hold that is not saved.
STREAM_TRANSIENT = ("read", "config", "wired", "ranks", "layers_at_once", "upkeep", "clock", "ropes", "open", "committed")
CACHE_TRANSIENT = ("_config", "used_model", "ropes", "keys_as", "outer_mask", "_told_rewound", "_told_unwired")
gemma2 = functools.cache(functools.partial(make, "gemma2"))


@functools.cache
def half():
    return make_tiny_llama().to(torch.bfloat16)


@functools.cache
def lopsided():
    # Flat attention loses little: after a plan layers differ in their budgets.
    model = deep_llama()
    model.model.layers[1].self_attn.q_proj.weight.data.mul_(0.1)
    return model


def all_on(**chosen) -> ADMSConfig:
    return ADMSConfig.adm_plus_plus(**{**SMALL, **MODULES, **chosen})


# name: (model, settings, rows, tokens before the conversation is saved, tokens a forward pass)
CASES = {
    "empty": (llama, ADMSConfig(**SMALL), 1, 0, 5),
    "unfilled": (llama, ADMSConfig(**SMALL), 1, 20, 5),
    "one long prefill": (llama, ADMSConfig(**SMALL), 1, 150, 150),
    "base": (llama, ADMSConfig(**SMALL), 1, 150, 5),
    "base, token by token": (llama, ADMSConfig(**SMALL), 1, 60, 1),
    "two rows": (llama, ADMSConfig(**SMALL), 2, 150, 5),
    "vq": (llama, ADMSConfig(**SMALL, compressor_type="vq"), 1, 150, 5),
    "attention matching": (llama, ADMSConfig(**SMALL, compressor_type="attention_matching"), 2, 150, 5),
    "streaming": (llama, ADMSConfig(**STREAMING), 1, 150, 5),
    "budgets by variance": (deep, ADMSConfig(**SMALL, use_adaptive_budget=True), 2, 150, 5),
    "all modules before a plan": (deep, all_on(), 1, 50, 5),
    "all modules after a plan": (lopsided, all_on(), 1, 250, 4),
    "all modules, controller of the layer": (deep, all_on(controller_scope="layer", anchor_mode="hybrid"), 2, 150, 5),
    "gemma 2": (gemma2, ADMSConfig(**SMALL), 1, 150, 5),
    "gemma 2, all modules": (gemma2, all_on(), 2, 150, 5),
    "bfloat16": (half, all_on(), 1, 150, 5),
}  # fmt: skip


AFTER = (10, 30, 50)


@functools.cache
def begun_once(name: str) -> tuple:
    make_model, config, rows, before, chunk = CASES[name]
    model, ids = make_model(), token_ids(before + sum(AFTER), rows)
    cache = enable_adms_llm(model, config)
    if before:
        stream(model, ids[:, :before], cache, chunk)
    return model, cache, ids[:, before:]


def begun(name: str) -> tuple:
    """A case's model, its cache after the tokens before saving, and those that come after, `[rows, sum(AFTER)]`."""
    model, cache, ids = begun_once(name)
    return model, copy.deepcopy(cache), ids


@functools.cache
def never_saved(name: str) -> tuple:
    """A case's logits, and its cache after them, where nothing is saved."""
    model, cache, ids = begun(name)
    return went_on(model, ids, cache), cache


def went_on(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """Logits of a continuation: token by token, then in chunks, then in one pass longer than the buffer has room for."""
    parts = zip(ids.split(AFTER, 1), (1, 3, 50), strict=True)
    return torch.cat([stream(model, part, cache, chunk) for part, chunk in parts], 1)


def values_of(thing) -> list:
    """All that makes up a kept value, in one order: plain values and copies of tensors."""
    if isinstance(thing, torch.Tensor):
        return [thing.clone()]
    if isinstance(thing, (list, tuple)):
        return [value for item in thing for value in values_of(item)]
    if isinstance(thing, dict):
        return [value for key, item in thing.items() for value in [key, *values_of(item)]]
    if dataclasses.is_dataclass(thing):
        return values_of({item.name: getattr(thing, item.name) for item in dataclasses.fields(thing)})
    return [thing]


def state_of(cache) -> list:
    """Everything that is kept of a cache; of buffers the slots in use."""
    own = cache.stream
    state = values_of([cache.window, *(getattr(own, name) for name in session._STREAM_KEPT)])
    state += values_of([own.compressor.fallbacks, *(getattr(cache, name) for name in session._KEPT)])
    for stack in own.stacks:
        fields = {item.name: getattr(stack, item.name) for item in dataclasses.fields(stack)}
        fields["tokens"] = [stack.tokens.length, stack.tokens.slice(0, stack.columns)]
        if stack.queries is not None:
            stored = max(row.queries for row in stack.rows)
            fields["queries"] = [stack.queries.shape, stack.queries[:, :, :, :stored]]
        state += values_of(fields)
    for layer in cache.layers:
        if not isinstance(layer, ADMSLayer) and layer.is_initialized:
            state += values_of([layer.cumulative_length, layer.keys, layer.values])
    return state


def same(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


# -- going on --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_conversation_goes_on_to_the_bit(name, tmp_path):
    model, cache, ids = begun(name)
    before = state_of(cache)
    cache.save(tmp_path / "talk.adms")
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", model)
    assert same(state_of(loaded), before) and same(state_of(cache), before)
    assert loaded.config == cache.config and loaded.stats == cache.stats and loaded.nbytes == cache.nbytes
    expected, after = never_saved(name)
    assert torch.equal(went_on(model, ids, loaded), expected)
    assert same(state_of(loaded), state_of(after)) and loaded.stats == after.stats


def test_the_cases_cover_what_they_are_made_for():
    after = begun("all modules after a plan")[1]
    rows = [layer.stack.rows[0] for layer in after.layers]
    assert all(row.least for row in rows) and len({row.width for row in rows}) > 1
    assert after.stream.next_trades[0] > 2
    assert after.stats["total_sketch_promotions"] and after.stats["total_replay_triggers"]
    assert not any(layer.stack.rows[0].least for layer in begun("all modules before a plan")[1].layers)
    (varied,) = begun("budgets by variance")[1].stream.stacks
    assert len(varied.layers) == 4 and varied.memory.variance.measured.gt(0).all()
    assert not begun("unfilled")[1].layers[0].stack.compacted


@functools.cache
def elsewhere() -> dict[str, torch.Tensor]:
    """Each case's logits as another process gives them, from the file alone."""
    import tempfile

    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(CASES):
            begun(name)[1].save(os.path.join(folder, f"{number}.adms"))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
        command = [sys.executable, "-c", f"import test_session; test_session.go_on_in({folder!r})"]
        ran = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr[-3000:]
        logits = torch.load(os.path.join(folder, "logits.pt"))
    assert logits.pop("process") != os.getpid()
    return logits


def go_on_in(folder: str) -> None:
    """What the other process does."""
    logits = {"process": os.getpid()}
    for number, name in enumerate(CASES):
        make_model, _, rows, before, _ = CASES[name]
        model, ids = make_model(), token_ids(before + sum(AFTER), rows)[:, before:]
        logits[name] = went_on(model, ids, ADMSKVCache.load(f"{folder}/{number}.adms", model))
    torch.save(logits, f"{folder}/logits.pt")


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_goes_on_to_the_bit_in_another_process(name):
    assert torch.equal(elsewhere()[name], never_saved(name)[0])


def test_padded_rows_go_on_to_the_bit(tmp_path):
    model, ids = llama(), token_ids(150, 2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0

    def run(cache, first, last):
        parts = []
        for start in range(first, last, 5):
            given = {"attention_mask": mask[:, : start + 5], "past_key_values": cache}
            with torch.no_grad():
                parts.append(model(ids[:, start : start + 5], **given).logits)
        return torch.cat(parts, 1)

    for before in (20, 80):
        cache = enable_adms_llm(model, **SMALL)
        run(cache, 0, before)
        cache.save(tmp_path / "talk.adms")
        loaded = ADMSKVCache.load(tmp_path / "talk.adms", model)
        assert torch.equal(run(loaded, before, 150), run(cache, before, 150))


def test_generate_goes_on_with_the_whole_conversation(tmp_path):
    model, ids = llama(), token_ids(90)
    said = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
    cache = enable_adms_llm(model, **SMALL)
    stream(model, ids[:, :70], cache, 10)
    cache.save(tmp_path / "talk.adms")
    expected = model.generate(ids, past_key_values=cache, **said)
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", model)
    assert torch.equal(model.generate(ids, past_key_values=loaded, **said), expected)


def test_what_parts_were_called_by_hand_for_is_kept(tmp_path):
    cache = enable_adms_llm(llama(), all_on(controller_scope="layer"))
    keys, values = torch.randn(2, 24, 8)
    cache.current_length = 1000
    cache._update_sketch_bank(3, 0, keys, values, torch.arange(100, 124))
    cache._update_replay_bank(0, 1, keys, values, torch.arange(100, 124))
    cache._promote_sketches_to_precision(3, 0, 1)
    cache._update_calibration_anchors(0, 0, torch.arange(968, 1000) - 50)
    cache._update_controller_state(1, 0, 0.4, 0.6)
    cache.save(tmp_path / "talk.adms")
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", llama())
    assert same(state_of(loaded), state_of(cache)) and loaded.stats == cache.stats and loaded.current_length == 1000
    assert cache.stats["total_sketch_promotions"] == 1
    assert torch.equal(loaded.sketch_bank[3, 0]["keys"], cache.sketch_bank[3, 0]["keys"])

    spread = enable_adms_llm(llama(), **SMALL, use_adaptive_budget=True)
    spread._scaled_budget(0, 1, keys, values)
    spread.save(tmp_path / "talk.adms")
    assert list(spread._variances[0]) == [1]
    assert ADMSKVCache.load(tmp_path / "talk.adms", llama())._variances == spread._variances


def test_a_loaded_cache_can_be_reset_and_rearranged(tmp_path):
    model, cache, ids = begun("all modules after a plan")
    cache.save(tmp_path / "talk.adms")
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", model)
    for own in (cache, loaded):
        own.batch_repeat_interleave(2)
    assert torch.equal(went_on(model, ids.repeat(2, 1), loaded), went_on(model, ids.repeat(2, 1), cache))
    for own in (cache, loaded):
        own.reset()
    assert same(state_of(loaded), state_of(cache))
    assert torch.equal(went_on(model, ids, loaded), went_on(model, ids, cache))


@pytest.mark.parametrize("made_in,loaded_in", [(True, True), (True, False), (False, True)])
def test_inference_mode_makes_no_difference(made_in, loaded_in, tmp_path):
    model, config, ids = llama(), all_on(), token_ids(200)
    cache = enable_adms_llm(model, config)
    expected = stream(model, ids, enable_adms_llm(model, config), 5)[:, 150:]
    with torch.inference_mode(made_in):
        stream(model, ids[:, :150], cache, 5)
    cache.save(tmp_path / "talk.adms")
    with torch.inference_mode(loaded_in):
        loaded = ADMSKVCache.load(tmp_path / "talk.adms", model)
    with torch.inference_mode(not loaded_in):
        assert torch.equal(stream(model, ids[:, 150:], loaded, 5), expected)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_be_text_or_a_path_and_a_link_is_followed(kind, tmp_path):
    cache = enable_adms_llm(llama(), **SMALL)
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.adms"
    link.symlink_to(tmp_path / "real" / "talk.adms")
    for _ in range(2):
        cache.save(kind(link))
        assert ADMSKVCache.load(kind(link), llama()).config == cache.config
    assert link.is_symlink() and os.listdir(tmp_path / "real") == ["talk.adms"]


# -- devices ---------------------------------------------------------------------------------------------------------------


def test_layers_that_are_on_several_devices_now_go_on_by_themselves(tmp_path):
    model, cache, ids = begun("budgets by variance")
    cache.save(tmp_path / "talk.adms")
    apart = deep_llama()
    apart.hf_device_map = {"": "cpu"}
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", apart)
    assert [stack.layers for stack in loaded.stream.stacks] == [(0,), (1,), (2,), (3,)]
    (whole,) = cache.stream.stacks
    for name, tensor in whole.memory.variance.tensors().items():
        parts = [getattr(stack.memory.variance, name) for stack in loaded.stream.stacks]
        assert torch.equal(torch.cat(parts), tensor)
    torch.testing.assert_close(went_on(apart, ids, loaded), went_on(model, ids, cache), rtol=1e-3, atol=1e-3)


def test_offloaded_layers_get_their_tensors_where_they_are_computed(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, cache, ids = begun("base")
    cache.save(tmp_path / "talk.adms")
    expected = went_on(model, ids, cache)
    away = accelerate.cpu_offload(make_tiny_llama(), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in away.parameters()} == {"meta"}
    assert layer_devices(away) == [torch.device("cpu")] * 2
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", away)
    assert torch.equal(went_on(away, ids, loaded), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_layer_goes_to_its_device(tmp_path):
    from accelerate import dispatch_model

    model, cache, ids = begun("all modules before a plan")
    cache.save(tmp_path / "talk.adms")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    split = dispatch_model(deep_llama(), {**places, **{f"model.layers.{i}": 0 if i % 2 else "cpu" for i in range(4)}}, 0)
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", split)
    assert [layer.keys.device for layer in loaded.layers] == layer_devices(split)
    assert stream(split, ids.to("cuda"), loaded, 5).isfinite().all()


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A saved conversation of `llama()`."""
    cache = enable_adms_llm(llama(), **SMALL)
    stream(llama(), token_ids(60), cache, 5)
    cache.save(tmp_path / "talk.adms")
    return tmp_path / "talk.adms"


def touched(change) -> torch.nn.Module:
    """A tiny Llama after `change(model)`."""
    model = make_tiny_llama()
    with torch.no_grad():
        change(model)
    return model


OTHERS = {
    "model_type is 'llama' there and 'gemma2' here": lambda: make("gemma2"),
    "num_hidden_layers is 2 there and 4 here": deep_llama,
    "vocab_size is 128 there and 64 here": lambda: make_tiny_llama(64),
    "dtype is 'float32' there and 'bfloat16' here": lambda: make_tiny_llama().bfloat16(),
    "rope_parameters.rope_theta is 10000.0 there and 50000.0 here": lambda: touched(
        lambda model: model.config.rope_parameters.update(rope_theta=50000.0)
    ),
    "the weights differ, first model.layers.1.mlp.up_proj.weight (1 of ": lambda: touched(
        lambda model: model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    ),
    "the weights differ, first model.norm.weight (1 of ": lambda: touched(lambda model: model.model.norm.weight.add_(0.01)),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_model_is_refused_with_what_differs(difference, saved):
    model = OTHERS[difference]()
    with pytest.raises(ValueError, match="was saved from another model: ") as refused:
        ADMSKVCache.load(saved, model)
    assert difference in str(refused.value)
    assert not is_enabled(model)


def test_a_model_is_described_by_its_weights_in_every_dtype_and_not_by_its_attention():
    described = describe_model(llama())
    assert describe_model(make_tiny_llama()) == described
    eager = make_tiny_llama()
    eager.set_attn_implementation("eager")
    assert describe_model(eager) == described
    assert len({json.dumps(describe_model(make_tiny_llama().to(kind))) for kind in (torch.half, torch.bfloat16)}) == 2
    assert all(isinstance(number, int) for number in described["weights"].values())


def test_other_settings_are_refused_and_each_is_named(saved):
    model = make_tiny_llama()
    same_settings = ADMSConfig(**SMALL)
    assert ADMSKVCache.load(saved, llama(), same_settings).config == same_settings
    other = ADMSConfig(**{**SMALL, "rank": 4, "recent_size": 20})
    with pytest.raises(ValueError, match="was saved with other settings: ") as refused:
        ADMSKVCache.load(saved, model, other)
    assert "recent_size is 16 there and 20 here, rank is 8 there and 4 here" in str(refused.value)
    assert not is_enabled(model)
    with pytest.raises(TypeError, match="config="):
        ADMSKVCache.load(saved, model, SMALL)


def test_a_truncated_file_is_refused_wherever_it_ends(saved):
    whole = saved.read_bytes()
    for length in (0, 4, 8, 9, 200, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no saved conversation, or damaged"):
            ADMSKVCache.load(saved, llama())
    saved.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is no saved conversation, or damaged"):
        ADMSKVCache.load(saved, llama())


def test_a_flipped_bit_is_refused_wherever_it_is(saved):
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    at = torch.cat([torch.randint(8, header, (150,), generator=generator), torch.randint(header, len(whole), (50,))])
    for place in [*range(8), header - 1, header, len(whole) - 1, *at.tolist()]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        saved.write_bytes(flipped)
        with pytest.raises(ValueError, match="no saved conversation, or damaged|is of version"):
            ADMSKVCache.load(saved, llama())
    saved.write_bytes(whole)
    ADMSKVCache.load(saved, llama())


def test_what_is_no_saved_conversation_is_refused(tmp_path):
    (tmp_path / "text").write_text("It is a truth universally acknowledged")
    save_file({"keys": torch.zeros(3)}, tmp_path / "weights.safetensors")
    for path in (tmp_path, tmp_path / "text", tmp_path / "weights.safetensors"):
        with pytest.raises(ValueError, match="is no saved conversation, or damaged"):
            ADMSKVCache.load(path, llama())
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ADMSKVCache.load(tmp_path / "nothing", llama())
    with pytest.raises(TypeError, match="path=3 must be a str or a Path"):
        ADMSKVCache.load(3, llama())


def rewritten(path: Path, **changed: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {**metadata, **changed})


def test_another_version_is_refused_by_name(saved, monkeypatch):
    # Of the cache, of a stack, of a row, and of what a module remembers: this release knows more than the file, or less.
    kinds = session._kinds()
    row = namedtuple("Row", (*Row._fields, "taste"))
    counts = dataclasses.make_dataclass("Counts", [("taste", int, 0)], bases=(kinds["Counts"],))
    for name, other, strange in (
        ("_KEPT", (*session._KEPT, "taste"), "taste"),
        ("_TOLD_ANEW", (*session._TOLD_ANEW, "tail"), "tail"),
        ("_kinds", lambda: kinds | {"Row": row}, "taste"),
        ("_kinds", lambda: kinds | {"Counts": counts}, "taste"),
    ):
        monkeypatch.setattr(session, name, other)
        with pytest.raises(ValueError, match=f"saved by another release of this package: only one of them knows {strange}"):
            ADMSKVCache.load(saved, llama())
        monkeypatch.undo()
    rewritten(saved)
    ADMSKVCache.load(saved, llama())
    rewritten(saved, version="1")
    with pytest.raises(ValueError, match="is of version '1'; this release reads version '3'"):
        ADMSKVCache.load(saved, llama())


def test_a_model_that_cannot_be_enabled_is_refused(saved):
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel"):
        ADMSKVCache.load(saved, torch.nn.Linear(2, 2))


def test_a_cache_that_cannot_go_on_is_not_saved(tmp_path):
    path, model = tmp_path / "talk.adms", llama()
    for cache in (ADMSKVCache(ADMSConfig(**SMALL), model_config=model.config), ADMSKVCache(wired=True)):
        with pytest.raises(ValueError, match="it knows of no model"):
            cache.save(path)
    cache = enable_adms_llm(model, **SMALL)
    stream(model, token_ids(60), cache, 5)
    before = state_of(cache)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    for tokens in (1, 50):
        with pytest.raises(KeyboardInterrupt):
            stream(model, token_ids(tokens), cache, tokens)
        # Python calls no hook after an interrupt: only the next pass, or a reset, tells that this one is over.
        with pytest.raises(RuntimeError, match="in the middle of a forward pass"):
            cache.save(path)
    handle.remove()
    cache.crop(0)
    assert same(state_of(cache), before)
    cache.save(path)
    assert same(state_of(ADMSKVCache.load(path, model)), before)
    path.unlink()

    def too_early(*_):
        with pytest.raises(RuntimeError, match="in the middle of a forward pass"):
            cache.save(path)

    handle = model.model.layers[1].register_forward_hook(too_early)
    stream(model, token_ids(60), cache, 60)
    handle.remove()
    assert os.listdir(tmp_path) == []


# -- the file --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_saving_that_fails_leaves_the_old_file_and_nothing_else(step, saved, monkeypatch):
    old = saved.read_bytes()
    cache = enable_adms_llm(llama(), **SMALL)
    stream(llama(), token_ids(90, seed=1), cache, 5)

    def fail(*_):
        assert len(os.listdir(saved.parent)) == 2  # written aside, in the same folder
        raise OSError("no space left on device")

    if step == "write":
        import builtins

        real = open

        def half_written(path, mode="r", **options):
            file = real(path, mode, **options)
            if "x" in mode:
                file.write(b"half")
                file.flush()
                monkeypatch.setattr(os, "fsync", fail)
            return file

        monkeypatch.setattr(builtins, "open", half_written)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        cache.save(saved)
    monkeypatch.undo()
    assert os.listdir(saved.parent) == [saved.name] and saved.read_bytes() == old
    cache.save(saved)
    assert saved.read_bytes() != old and os.listdir(saved.parent) == [saved.name]


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    cache = enable_adms_llm(llama(), **SMALL)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cache.save(tmp_path / "missing" / "talk.adms")
    with pytest.raises(ValueError, match="must be a file, or nothing yet"):
        cache.save(tmp_path)
    with pytest.raises(TypeError, match="path=None must be a str or a Path"):
        cache.save(None)
    assert os.listdir(tmp_path) == []


def test_only_what_is_held_is_stored(tmp_path):
    config = ADMSConfig(**{**SMALL, "recent_size": 2000})
    cache = enable_adms_llm(llama(), config)
    stream(llama(), token_ids(10), cache, 10)
    cache.save(tmp_path / "talk.adms")
    assert (tmp_path / "talk.adms").stat().st_size < cache.nbytes / 20
    assert ADMSKVCache.load(tmp_path / "talk.adms", llama()).nbytes == cache.nbytes


# -- what is kept ----------------------------------------------------------------------------------------------------------


def test_all_that_a_stream_has_is_either_kept_or_transient():
    own = begun("all modules after a plan")[1].stream
    assert sorted(vars(own)) == sorted(("stacks", "window", "compressor", *session._STREAM_KEPT, *STREAM_TRANSIENT))
    for stack in own.stacks:
        # Beside its fields, which are all kept, only what is computed from them.
        computed = {name for name, value in vars(Stack).items() if isinstance(value, functools.cached_property)}
        assert set(vars(stack)) <= {item.name for item in dataclasses.fields(stack)} | computed
    for name in ("low_rank", "vq", "attention_matching"):
        assert sorted(vars(get_compressor(name)(own.config))) == ["config", "fallbacks"]
    for layer in begun("base")[1].layers:
        assert sorted(vars(layer)) == ["number", "stream"]


def test_all_that_a_cache_has_beside_its_stream_is_either_kept_or_transient():
    own = set(vars(ADMSKVCache())) - {"layers", "layer_class_to_replicate", "offloading", "stream"}
    assert sorted(own) == sorted((*session._KEPT, *CACHE_TRANSIENT))


def test_every_kind_of_value_comes_back_as_it_was():
    from streaming_llm.compaction.controller import ControllerState
    from streaming_llm.session import _decode, _encode

    state = ControllerState.empty(1, 2, "cpu")
    state.mass = None
    value = [None, True, -3, 0.1, float("inf"), "word", {2: {"a": (torch.tensor(4), [1.5])}}, (), state]
    tensors = {}
    node = json.loads(json.dumps(_encode(value, "x", tensors)))
    back = _decode(node, tensors, torch.device("cpu"))
    assert [type(item) for item in back] == [type(item) for item in value]
    assert same(values_of(back[:-1]), values_of(value[:-1])) and back[-2] == ()
    assert back[-1].mass is None and torch.equal(back[-1].energy, state.energy) and back[-1].energy is not state.energy
    with pytest.raises(TypeError, match="x.0 of type object has no place in a saved conversation"):
        _encode([object()], "x", {})


def test_a_disabled_model_is_enabled_by_loading(saved):
    model = make_tiny_llama()
    cache = ADMSKVCache.load(saved, model)
    assert is_enabled(model)
    stream(model, token_ids(60), cache, 5)
    assert cache.layers[0].stack.queries is not None
    disable_adms_llm(model)
    assert not is_enabled(model)


@pytest.mark.parametrize("tokens", [20, 90])
@pytest.mark.parametrize("modules", [False, True])
def test_a_padded_batch_goes_on_to_the_bit(tmp_path, tokens, modules):
    model = small_window()
    config = ADMSConfig(**ROWS)
    if modules:
        config = ADMSConfig.adm_plus_plus(**ROWS, sketch_budget=4, replay_budget=2, energy_replay_threshold=1.0)
    rows = [token_ids(tokens + 60, seed=1)[0], token_ids(tokens // 2 + 60, seed=2)[0]]
    ids, mask, positions = left_padded(rows)
    cache = enable_adms_llm(model, config)
    run_padded(model, cache, ids[:, :tokens], mask[:, :tokens], positions[:, :tokens], [tokens])
    run_padded_from(model, cache, ids, mask, positions, tokens, tokens + 20)
    cache.save(tmp_path / "chat")
    expected = run_padded_from(model, cache, ids, mask, positions, tokens + 20, tokens + 60)
    again = ADMSKVCache.load(tmp_path / "chat", model)
    assert torch.equal(run_padded_from(model, again, ids, mask, positions, tokens + 20, tokens + 60), expected)


@torch.no_grad()
def run_padded_from(model, cache, ids, mask, positions, start, stop):
    parts = [
        model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], position_ids=positions[:, at : at + 1],
              past_key_values=cache).logits
        for at in range(start, stop)
    ]  # fmt: skip
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_past_the_trained_length_goes_on_to_the_bit(tmp_path, dtype):
    model = small_window().to(dtype)
    cache = enable_adms_llm(model, **ROWS)
    stream(model, token_ids(400), cache, 8)
    assert cache.window.offsets[0] > 0
    cache.save(tmp_path / "chat")
    again = ADMSKVCache.load(tmp_path / "chat", model)
    assert again.window == cache.window
    more = token_ids(80, seed=4)
    assert torch.equal(stream(model, more, again, 5), stream(model, more, cache, 5))


def test_what_was_tried_out_can_be_taken_back_after_loading(tmp_path):
    model, ids = llama(), token_ids(90)
    cache = enable_adms_llm(model, **SMALL)
    stream(model, ids[:, :60], cache, 5)
    cache.activate_past_recording()
    cache.save(tmp_path / "talk.adms")
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", model)
    # More than the recent window: only what does not count yet can be taken back so far.
    for own in (cache, loaded):
        stream(model, ids[:, 60:85], own, 25)
        own.crop(-20)
    assert same(state_of(loaded), state_of(cache))
    assert torch.equal(stream(model, ids[:, 65:], loaded, 5), stream(model, ids[:, 65:], cache, 5))


def test_a_loaded_cache_refuses_to_go_on_where_the_saved_one_does(tmp_path):
    model = llama()
    cache = enable_adms_llm(model, **SMALL)
    stream(model, token_ids(60), cache, 5)
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, :-3]
    cache.save(tmp_path / "talk.adms")
    for own in (cache, ADMSKVCache.load(tmp_path / "talk.adms", model)):
        with pytest.raises(RuntimeError, match="tokens were compacted already: the cache can't go on"):
            stream(model, token_ids(1), own, 1)


# -- the model as it is when the conversation is saved ----------------------------------------------------------------------


def trained(model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = token_ids(12)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def with_lora(model, name: str = "default"):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config, adapter_name=name)


CHANGES = {
    "another dtype": lambda model: model.to(torch.bfloat16),
    "a training step": trained,
    "other weights": lambda model: model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()}),
    "an adapter": with_lora,
    "an adapter merged": lambda model: with_lora(model).merge_and_unload(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("talked_after", [True, False])
def test_a_model_changed_since_loads_what_was_saved_with_it(change, talked_after, tmp_path):
    model = make_tiny_llama()
    cache, ids = enable_adms_llm(model, **SMALL), token_ids(70)
    if talked_after:
        CHANGES[change](model)
    stream(model, ids[:, :50], cache, 5)
    if not talked_after:
        CHANGES[change](model)
    cache.save(tmp_path / "talk.adms")
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", model)
    assert same(state_of(loaded), state_of(cache))
    if loaded.layers[0].dtype == model.dtype:
        assert torch.equal(stream(model, ids[:, 50:], loaded, 5), stream(model, ids[:, 50:], cache, 5))
    with pytest.raises(ValueError, match="was saved from another model"):
        ADMSKVCache.load(tmp_path / "talk.adms", make_tiny_llama())


def test_an_adapter_is_known_by_what_it_adds_and_not_by_its_name():
    plain = describe_model(make_tiny_llama())
    first, again, other = make_tiny_llama(), make_tiny_llama(), make_tiny_llama()
    wrapped = with_lora(first)
    with_lora(again, "by another name")
    with_lora(other)
    other.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data.mul_(2)
    facts = describe_model(first)
    assert facts == describe_model(again) and set(plain["weights"]) < set(facts["weights"])
    assert all(facts["weights"][name] == checksum for name, checksum in plain["weights"].items())
    assert model_differences(facts, describe_model(other)).startswith("the weights differ, first model.layers.0")
    assert model_differences(plain, facts)
    with wrapped.disable_adapter():
        assert describe_model(first) == plain
    assert describe_model(wrapped.unload()) == plain


def test_the_model_saved_for_is_the_one_that_was_used_last_and_a_lost_one_is_remembered(tmp_path):
    first, second, ids = make_tiny_llama(), make_tiny_llama(), token_ids(60)
    second.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    cache = enable_adms_llm(first, **SMALL)
    enable_adms_llm(second, **SMALL)
    stream(second, ids[:, :40], cache, 5)
    facts = describe_model(second)
    for kept in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert kept.used_model.describe() == facts
    del second
    gc.collect()
    cache.save(tmp_path / "talk.adms")
    same_weights = make_tiny_llama()
    same_weights.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert ADMSKVCache.load(tmp_path / "talk.adms", same_weights).get_seq_length() == 40
    with pytest.raises(ValueError, match="the weights differ, first model.layers.0.mlp.up_proj.weight"):
        ADMSKVCache.load(tmp_path / "talk.adms", first)


@pytest.mark.slow
def test_a_pickled_cache_goes_on_and_is_saved_in_another_process(tmp_path):
    model, cache, ids = begun("budgets by variance")
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps(cache))
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, "-c", f"import test_session; test_session.unpickle_in({str(tmp_path)!r})"]
    ran = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = stream(model, ids[:, :40], cache, 5)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    back = ADMSKVCache.load(tmp_path / "talk.adms", model)
    assert torch.equal(stream(model, ids[:, 40:60], back, 5), stream(model, ids[:, 40:60], cache, 5))


def unpickle_in(folder: str) -> None:
    """What the other process does."""
    make_model, config, rows, before, _ = CASES["budgets by variance"]
    model, ids = make_model(), token_ids(before + sum(AFTER), rows)[:, before:]
    enable_adms_llm(model, config)
    cache = pickle.loads(Path(folder, "cache.pkl").read_bytes())
    torch.save(stream(model, ids[:, :40], cache, 5), f"{folder}/logits.pt")
    cache.save(f"{folder}/talk.adms")


def test_a_cache_of_many_processes_is_not_pickled():
    cache = enable_adms_llm(llama(), **SMALL)
    cache.stream.ranks = Ranks.__new__(Ranks)
    with pytest.raises(TypeError, match="tensor-parallel model can't be pickled.* cache.save"):
        pickle.dumps(cache)
    assert copy.deepcopy(cache).stream.ranks is cache.stream.ranks
