"""What transformers' own tests ask of a cache, on the real SmolLM2: batches, beams, padding, going on from a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from streaming_llm import enable_adms_llm

PROMPTS = ["A sequence: 1, 2, 3, 4, 5", "A sequence: A, B, C"]
TIGHT = {
    "recent_size": 24,
    "compressed_budget": 16,
    "compression_interval": 8,
    "start_size": 2,
    "min_middle_size_for_compress": 0,
}


def encode(tokenizer, texts: list[str], more: int = 0) -> dict[str, torch.Tensor]:
    """The texts in one left-padded batch, `more` pads before the longest."""
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    length = max(map(len, rows)) + more
    ids = torch.full((len(rows), length), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def say(model, inputs: dict[str, torch.Tensor], cache, new: int = 10, **options) -> list[list[int]]:
    said = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
    )
    return said[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def expected(smol):
    """What the left-padded batch says with transformers' own cache."""
    model, tokenizer = smol
    return say(model, encode(tokenizer, PROMPTS), DynamicCache(config=model.config))


def test_a_left_padded_batch_says_what_it_says_with_transformers_own_cache(smol, expected):
    model, tokenizer = smol
    assert say(model, encode(tokenizer, PROMPTS), enable_adms_llm(model)) == expected
    text = tokenizer.batch_decode(expected)
    assert text[0].startswith(", 6, 7, 8") and text[1].startswith(", D, E")


@pytest.mark.slow
def test_two_beams_find_what_they_find_with_transformers_own_cache(smol):
    model, tokenizer = smol
    inputs = encode(tokenizer, PROMPTS)
    options = {"num_beams": 2, "num_return_sequences": 2}
    found = say(model, inputs, DynamicCache(config=model.config), 6, **options)
    assert say(model, inputs, enable_adms_llm(model), 6, **options) == found


def test_extra_left_padding_changes_nothing(smol, expected):
    model, tokenizer = smol
    assert say(model, encode(tokenizer, PROMPTS, 60), enable_adms_llm(model)) == expected


def test_generation_goes_on_from_a_cache(smol, expected):
    model, tokenizer = smol
    inputs = encode(tokenizer, PROMPTS)
    cache = enable_adms_llm(model)
    first = torch.tensor(say(model, inputs, cache, 5))
    further = {"input_ids": torch.cat([inputs["input_ids"], first], 1),
               "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(first)], 1)}  # fmt: skip
    second = torch.tensor(say(model, further, cache, 5))
    assert torch.cat([first, second], 1).tolist() == expected


def test_past_the_bound_a_padded_row_says_what_it_says_alone(smol):
    model, tokenizer = smol
    texts = ["A sequence: " + ", ".join(map(str, range(1, 20))), "A sequence: A, B, C, D, E, F, G, H, I, J, K, L, M"]
    cache = enable_adms_llm(model, **TIGHT)
    together = say(model, encode(tokenizer, texts, 13), cache, 9)
    assert cache.layers[0].compacted
    alone = [say(model, encode(tokenizer, [text]), enable_adms_llm(model, **TIGHT), 9)[0] for text in texts]
    assert together == alone
