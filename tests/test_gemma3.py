"""The second real model, Gemma 3 270M: what was converted is the model, and its sliding layers work beside ours."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from streaming_llm import disable_adms_llm, enable_adms_llm
from streaming_llm.evaluation import load_text, shipped_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def novel(gemma):
    """The first 3,072 tokens of the shipped novel, behind the beginning-of-sequence token."""
    _, tokenizer = gemma
    return load_text(tokenizer, num_eval_tokens=3072).streams[0]


def test_the_tokenizer_gives_the_whole_novel_back_and_begins_it_with_bos(gemma, novel):
    _, tokenizer = gemma
    text = shipped_text() + "  naïve — “quoted” ½ 日本\n\n\t1,813 🙂"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert ids[:3072] == novel.tolist()
    assert ids[0] == tokenizer.bos_token_id == 2
    # SentencePiece, given the same pieces and scores, makes as many.
    assert len(tokenizer(shipped_text(), add_special_tokens=False)["input_ids"]) == 161_111


def test_the_weights_read_the_novel_as_the_model_does(gemma, novel):
    model, _ = gemma
    config = model.config
    assert config.layer_types.count("sliding_attention") == 15 and config.sliding_window == 512
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (1, 256, 32768)
    with torch.no_grad():
        # 262,144 logits a token: those of the scored ones alone.
        logits = model(novel[None], logits_to_keep=novel.numel() - 1023).logits[0, :-1]
    surprise = torch.nn.functional.cross_entropy(logits, novel[1024:], reduction="none")
    assert 19.5 < surprise.mean().exp() < 20.3


def test_below_the_bound_logits_are_the_full_caches_to_the_bit_with_sliding_layers_beside(gemma, novel):
    model, _ = gemma

    def read(cache):
        with torch.no_grad():
            parts = [model(part[None], past_key_values=cache).logits for part in novel[:704].split(64)]
        return torch.cat(parts, dim=1)

    expected = read(DynamicCache(config=model.config))
    try:
        cache = enable_adms_llm(model, recent_size=512, compressed_budget=256)
        found = read(cache)
    finally:
        disable_adms_llm(model)
    # Longer than a sliding layer's window, shorter than what ours may hold.
    assert cache.get_seq_length() == 704 and not any(getattr(layer, "compacted", False) for layer in cache.layers)
    assert torch.equal(found, expected)
