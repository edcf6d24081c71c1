"""Tensor parallelism, layers on several devices, offloaded and quantised weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_run
import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids
from transformers import AutoModelForCausalLM

from streaming_llm import ADMSConfig, enable_adms_llm

SMALL, PLUS = parallel_run.SMALL, parallel_run.PLUS


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


@pytest.mark.parametrize("config", [ADMSConfig(**SMALL), PLUS], ids=["base", "adm++"])
@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
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
    assert all(layer.buffer.keys.device.type == "cpu" for layer in cache.layers)


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
    for layer, kind in zip(cache.layers, ("cpu", "cuda"), strict=True):
        held = [*layer.buffer.tensors().values(), layer.query_buffer]
        held += [tensor for name in ("originals", "replay_state", "calibration", "controller")
                 if getattr(layer, name) is not None for tensor in getattr(layer, name).tensors().values()]  # fmt: skip
        assert {tensor.device.type for tensor in held} == {kind}


# -- quantised weights ---------------------------------------------------------------------------------------------------


def quantised(backend: str):
    """The tiny Llama with its weights quantised, or a skip where the backend is missing."""
    import transformers

    if importlib.util.find_spec(backend.replace("-", ".")) is None:
        pytest.skip(f"{backend} is not installed")
    model = make_tiny_llama()
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    elif backend == "optimum-quanto":
        from optimum.quanto import freeze, qint8, quantize

        quantize(model, weights=qint8)
        freeze(model)
    else:
        chosen = transformers.BitsAndBytesConfig(load_in_8bit=True)
        folder = Path(pytest.importorskip("tempfile").mkdtemp())
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=chosen, device_map="cpu")
    return model.eval()
