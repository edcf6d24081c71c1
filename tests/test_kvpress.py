"""kvpress's pipeline with this cache as its `cache=`. Needs kvpress, and with it a transformers below 5.3."""

from __future__ import annotations

import pytest
import torch

from streaming_llm import enable_adms_llm

kvpress = pytest.importorskip("kvpress", reason="kvpress (which needs transformers below 5.3) is not installed")

CONTEXT = "The lighthouse keeper is called Marta. The lighthouse stands on Gull Island. The boat comes on Tuesdays. " * 3
QUESTIONS = ["Where does the lighthouse stand?", "Who is the keeper?", "On which day does the boat come?"]
SMALL = {"recent_size": 48, "compressed_budget": 32, "compression_interval": 16}


@pytest.fixture(scope="module")
def ask(smol):
    """`ask(**arguments)` runs the pipeline over the context, 12 tokens an answer."""
    from transformers import pipeline

    model, tokenizer = smol
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")

    def run(**arguments):
        found = pipe(CONTEXT, max_new_tokens=12, **arguments)
        return found["answers"] if "answers" in found else found["answer"]

    yield run


def test_below_the_bound_all_questions_are_answered_as_with_the_pipelines_own_cache(smol, ask):
    cache = enable_adms_llm(smol[0])
    assert ask(questions=QUESTIONS, cache=cache) == ask(questions=QUESTIONS)
    # Every question and its answer left the cache again: what stays is the context.
    prepared = smol[1].apply_chat_template([{"role": "user", "content": CONTEXT}], tokenize=False).rstrip()
    assert cache.get_seq_length() <= len(smol[1](prepared).input_ids)
    assert len({layer.stack.columns for layer in cache.layers}) == 1


def test_past_the_bound_one_question_is_answered_as_by_generate_with_the_cache(smol, ask):
    model, tokenizer = smol
    cache = enable_adms_llm(model, **SMALL)
    answer = ask(question=QUESTIONS[0], cache=cache)
    assert cache.layers[0].compacted
    separator = "#" * 9
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": CONTEXT + separator}], add_generation_prompt=True, tokenize=False
    )
    context, rest = whole.split(separator)
    parts = [
        tokenizer.encode(text, return_tensors="pt", add_special_tokens=False) for text in (context, QUESTIONS[0] + rest)
    ]
    own, ids = enable_adms_llm(model, **SMALL), torch.cat(parts, dim=1)
    with torch.no_grad():
        model(parts[0], past_key_values=own)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, past_key_values=own)
    assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == answer


def test_past_the_bound_a_second_question_on_the_same_cache_is_refused(smol, ask):
    with pytest.raises(RuntimeError, match="one question"):
        ask(questions=QUESTIONS, cache=enable_adms_llm(smol[0], **SMALL))


def test_a_press_on_this_cache_is_refused_before_it_changes_anything(smol, ask):
    cache = enable_adms_llm(smol[0])
    with pytest.raises(ValueError, match="keys can't be assigned"):
        ask(question=QUESTIONS[0], press=kvpress.KnormPress(0.3), cache=cache)
    assert cache.get_seq_length() == 0 and ask(question=QUESTIONS[0], cache=cache) == ask(question=QUESTIONS[0])
