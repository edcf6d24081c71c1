"""What is around a model: wrappers that hold one are opened, what spreads it over devices is refused by name."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids
from test_enable import SMALL, hooks_of
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import DynamicCache

from streaming_llm import ADMSKVCache, disable_adms_llm, enable_adms_llm
from streaming_llm.model.enable import is_enabled
from streaming_llm.model.wrappers import open_model


class Wrapper(torch.nn.Module):
    """A user's own module around a model."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inner, self.same, self.head = model, model, torch.nn.Linear(2, 2)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


def accelerated(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model)


WRAPPERS = {
    "a user's module": Wrapper,
    "two of them": lambda model: Wrapper(Wrapper(model)),
    "torch.compile": compiled,
    "torch.compile of its decoder": lambda model: setattr(model, "model", compiled(model.model)) or model,
    "accelerate": accelerated,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_that_holds_one_model_is_enabled_and_disabled_like_the_model(name):
    model = make_tiny_llama()
    wrapped = WRAPPERS[name](model)
    hooks = hooks_of(wrapped)
    cache = enable_adms_llm(wrapped, **SMALL)
    assert is_enabled(wrapped) and is_enabled(model) and open_model(wrapped) is model
    other = make_tiny_llama()
    ids = token_ids(30)
    inputs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    expected = other.generate(ids, past_key_values=enable_adms_llm(other, **SMALL), **inputs)
    if not name.startswith("torch.compile"):  # compiling takes long; see below
        assert torch.equal(model.generate(ids, past_key_values=cache, **inputs), expected)
        assert cache.stats["total_compressions"] > 0
    disable_adms_llm(wrapped)
    assert not is_enabled(wrapped) and not is_enabled(model) and hooks_of(wrapped) == hooks


@pytest.mark.slow
def test_a_compiled_model_is_enabled_and_disabled_after_it_was_compiled():
    model, ids = make_tiny_llama(), token_ids(12)
    fast = compiled(model)
    expected = stream(fast, ids, DynamicCache(config=model.config), 12)
    cache = enable_adms_llm(fast)
    assert torch.equal(stream(fast, ids, cache, 12), expected)
    assert cache.get_seq_length() == 12 and cache.layers[0].stack.queries is not None
    disable_adms_llm(fast)
    assert torch.equal(stream(fast, ids, DynamicCache(config=model.config), 12), expected)
    with pytest.raises(RuntimeError, match="enable_adms_llm"):
        stream(fast, ids, cache, 12)


def test_a_saved_conversation_goes_on_with_a_wrapper_too(tmp_path):
    wrapped = Wrapper(make_tiny_llama())
    cache = enable_adms_llm(wrapped, **SMALL)
    ids = token_ids(60)
    stream(wrapped, ids[:, :50], cache, 5)
    cache.save(tmp_path / "talk")
    expected = stream(wrapped, ids[:, 50:], cache, 5)
    other = Wrapper(make_tiny_llama())
    assert torch.equal(stream(other, ids[:, 50:], ADMSKVCache.load(tmp_path / "talk", other), 5), expected)


def spread(kind: type) -> torch.nn.Module:
    """A wrapper of this class, without the processes or devices it would need."""
    wrapper = kind.__new__(kind)
    torch.nn.Module.__init__(wrapper)
    wrapper.module = make_tiny_llama()
    return wrapper


def sharded() -> torch.nn.Module:
    model = make_tiny_llama()
    model.__class__ = type("FSDPLlamaForCausalLM", (FSDPModule, type(model)), {})
    return model


REFUSED = {
    "DataParallel": (lambda: torch.nn.DataParallel(make_tiny_llama()), r"\.module"),
    "DistributedDataParallel": (lambda: spread(torch.nn.parallel.DistributedDataParallel), r"\.module"),
    "FullyShardedDataParallel": (lambda: Wrapper(spread(FullyShardedDataParallel)), "tp_plan='auto'"),
    "FSDPModule": (sharded, "device_map='auto'"),
    "DeepSpeedEngine": (lambda: type("DeepSpeedEngine", (Wrapper,), {})(make_tiny_llama()), r"\.module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_spreads_a_model_is_refused_by_name_with_the_way_out(name):
    make, way_out = REFUSED[name]
    wrapper = make()
    before = hooks_of(wrapper)
    for call in (enable_adms_llm, disable_adms_llm):
        with pytest.raises(ValueError, match=f"{name} can't be enabled.*{way_out}"):
            call(wrapper)
    assert hooks_of(wrapper) == before


def test_threads_of_data_parallel_do_not_fill_one_cache():
    model = make_tiny_llama()
    cache = enable_adms_llm(model)
    model.model._is_replica = True
    with pytest.raises(ValueError, match=r"DataParallel.*\.module"):
        stream(model, token_ids(8), cache, 4)
    del model.model._is_replica
    assert stream(model, token_ids(8), cache, 4).isfinite().all()


@pytest.mark.parametrize("call", [enable_adms_llm, disable_adms_llm, is_enabled])
def test_what_is_no_model_or_holds_two_is_a_type_error_that_says_so(call):
    pipeline = types.SimpleNamespace(model=make_tiny_llama())
    for wrong in (None, "llama", pipeline, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"model={type(wrong).__name__} must be a transformers PreTrainedModel"):
            call(wrong)
    two = torch.nn.ModuleList([make_tiny_llama(), make_tiny_llama()])
    with pytest.raises(TypeError, match=r"2 \(LlamaForCausalLM, LlamaForCausalLM\); pass one"):
        call(two)
