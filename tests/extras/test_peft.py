"""Models inside peft: enabled, adapted and merged in whatever order."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids
from test_enable import SMALL, traces_of

from streaming_llm import disable_adms_llm, enable_adms_llm
from streaming_llm.model.enable import is_enabled

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.extras


def adapted(model):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def said(model, ids, cache):
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    return model.generate(input_ids=ids, past_key_values=cache, **given)


@pytest.mark.parametrize("through", ["wrapper", "base model"])
def test_a_peft_model_is_enabled_generates_and_is_disabled_like_its_base_model(through):
    wrapped, ids = adapted(make_tiny_llama()), token_ids(30)
    base = wrapped.get_base_model()
    target = wrapped if through == "wrapper" else base
    before = traces_of(base)
    cache = enable_adms_llm(target, **SMALL)
    expected = said(base, ids, cache)
    assert cache.stats["total_compressions"] > 0
    cache = enable_adms_llm(target, **SMALL)
    assert torch.equal(said(wrapped, ids, cache), expected)
    assert torch.equal(
        stream(wrapped, ids, enable_adms_llm(target, **SMALL), 5), stream(base, ids, enable_adms_llm(target, **SMALL), 5)
    )
    disable_adms_llm(target)
    assert not is_enabled(wrapped) and traces_of(base) == before


def test_adapters_may_come_and_be_merged_while_the_model_is_enabled():
    model, ids = make_tiny_llama(), token_ids(60)
    cache = enable_adms_llm(model, **SMALL)
    stream(model, ids[:, :30], cache, 5)
    wrapped = adapted(model)
    assert is_enabled(wrapped)
    assert stream(wrapped, ids[:, 30:], cache, 5).isfinite().all() and cache.get_seq_length() == 60
    with_adapter = stream(wrapped, ids, enable_adms_llm(wrapped, **SMALL), 5)
    merged = wrapped.merge_and_unload()
    assert is_enabled(merged)
    torch.testing.assert_close(stream(merged, ids, enable_adms_llm(merged, **SMALL), 5), with_adapter, rtol=1e-3, atol=1e-3)
    disable_adms_llm(merged)
    assert not is_enabled(merged) and merged.model.layers[0].self_attn.config is merged.config


def test_prompt_learning_is_refused_by_name():
    wrapped = peft.get_peft_model(make_tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    before = traces_of(wrapped)
    with pytest.raises(ValueError, match="prompt learning can't be enabled.*LoRA"):
        enable_adms_llm(wrapped)
    assert traces_of(wrapped) == before
