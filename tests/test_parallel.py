"""Tensor parallelism, layers on several devices, offloaded and quantised weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_run
import pytest
import torch
from conftest import make_tiny_llama, random_queries, random_states, stream, token_ids
from transformers import AutoModelForCausalLM, DynamicCache

from streaming_llm import ADMSConfig, enable_adms_llm
from streaming_llm.evaluation.lone_layer import LoneLayer
from streaming_llm.store.stack import Stack
from streaming_llm.stream.arrival import Arrival

SMALL, PLUS = parallel_run.SMALL, parallel_run.PLUS


def devices_of(stack: Stack) -> set[str]:
    """The kinds of devices that a stack's tensors are on."""
    tensors = [*stack.tokens.tensors().values(), stack.queries]
    tensors += [tensor for state in stack.memory.states().values() for tensor in state.tensors().values()]
    return {tensor.device.type for tensor in tensors}


def test_two_processes_with_half_the_heads_each_say_what_one_process_says(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path)
    script = Path(parallel_run.__file__)
    paths = [str(script.parent), str(script.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]
    expected = parallel_run.say(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
    assert len(found) == 1 and len(found[0]) == 2
    for process in found[0]:
        assert process["heads"] == 1 and process["said"] == expected
        adaptive, controller = process["refused"]
        assert "use_adaptive_budget=True" in adaptive and "controller_scope='layer'" in controller


# -- devices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where,config",
    [("cpu", PLUS), ("disk", ADMSConfig(**SMALL)), ("both", PLUS)],
    ids=["cpu-adm++", "disk-base", "both-adm++"],
)
def test_offloaded_layers_say_what_the_model_says(config, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_tiny_llama(), token_ids(120)
    expected = stream(model, ids, enable_adms_llm(model, config), 5)
    second = {"cpu": "cpu", "disk": "disk", "both": "disk"}[where]
    first = "disk" if where == "both" else "cpu"
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.layers.0": first, "model.layers.1": second}  # fmt: skip
    moved = accelerate.dispatch_model(
        make_tiny_llama(), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    cache = enable_adms_llm(moved, config)
    assert torch.equal(stream(moved, ids, cache, 5), expected)
    assert all(devices_of(layer.stack) == {"cpu"} for layer in cache.layers)


@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs an accelerator beside the CPU")
@pytest.mark.parametrize("config", [ADMSConfig(**SMALL), PLUS], ids=["base", "adm++"])
def test_each_layers_state_lives_with_its_layer(config):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_tiny_llama(), token_ids(120)
    expected = stream(model, ids, enable_adms_llm(model, config), 5)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": 0}  # fmt: skip
    moved = accelerate.dispatch_model(make_tiny_llama(), places, main_device="cpu")
    cache = enable_adms_llm(moved, config)
    torch.testing.assert_close(stream(moved, ids, cache, 5), expected, rtol=1e-2, atol=1e-2)
    assert [devices_of(layer.stack) for layer in cache.layers] == [{"cpu"}, {"cuda"}]


@pytest.mark.parametrize(
    "config,compressor",
    [(ADMSConfig(**SMALL), "attention_matching"), (PLUS, "low_rank"), (PLUS, "vq")],
    ids=["base-attention_matching", "adm++-low_rank", "adm++-vq"],
)
def test_all_a_layer_makes_is_on_the_device_of_its_keys(config, compressor):
    # The meta device has no numbers, and refuses to mix with any other: what is made elsewhere shows at once.
    config = dataclasses.replace(config, compressor_type=compressor)
    layer = LoneLayer(config)
    # Layers that trade budget ask the device what each lost: there is nothing to ask.
    layer.stream.next_trades = (1_000_000,) * 2
    for tokens in [4] * 20 + [60] + [1] * 20:
        keys, values = random_states(tokens, 2, dim=16)
        real = torch.ones(2, tokens, dtype=torch.bool)
        arrival = Arrival(tokens, (tokens, tokens), torch.arange(tokens)[None], real, tail=tokens)
        layer.update(keys.to("meta"), values.to("meta"), arrival=arrival)
        assert layer.attention_bias(tokens, 2, torch.float32).device.type == "meta"
        layer.observe(random_queries(tokens, 2, dim=16).to("meta"), 0.25)
    assert layer.row.compactions > 8
    assert devices_of(layer.stack) == {"meta"}


# -- quantised weights ---------------------------------------------------------------------------------------------------


def chosen(backend: str):
    """The quantisation config of a backend, or a skip where it is not installed."""
    import transformers

    if importlib.util.find_spec({"optimum-quanto": "optimum"}.get(backend, backend)) is None:
        pytest.skip(f"{backend} is not installed")
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if backend == "optimum-quanto":
        return transformers.QuantoConfig(weights="int8")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("backend", ["torchao", "optimum-quanto", "bitsandbytes"])
def test_quantised_weights_give_equal_logits_below_the_bound_and_finite_ones_past_it(backend, tmp_path):
    quantization = chosen(backend)
    make_tiny_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu").eval()
    weights = model.model.layers[0].self_attn.k_proj.weight
    assert type(weights) is not torch.nn.Parameter
    ids = token_ids(120)
    expected = stream(model, ids[:, :30], DynamicCache(config=model.config), 5)
    assert torch.equal(stream(model, ids[:, :30], enable_adms_llm(model, **SMALL), 5), expected)
    cache = enable_adms_llm(model, PLUS)
    assert stream(model, ids, cache, 5).isfinite().all() and cache.layers[0].stack.compacted
