"""What the numbers are for: on real weights and real text the default settings stay nearer to the full cache."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from conftest import token_ids  # noqa: F401  keeps the folder's helpers importable when run alone
from transformers import DynamicCache

from streaming_llm import disable_adms_llm, enable_adms_llm
from streaming_llm.baselines import enable_baseline
from streaming_llm.evaluation import evaluate_streams, load_text

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def divergences(model, tokens, methods: list[str], recent: int, middle: int, **options) -> dict[str, float]:
    """KL to the full cache of each method, all with the same number of tokens a head, in nats a token."""
    settings = {"recent_size": recent, "compressed_budget": middle}

    def factory(name: str):
        if name == "adms":
            return lambda: enable_adms_llm(model, **settings)
        return lambda: enable_baseline(model, name, **settings)

    caches = {"full": lambda: DynamicCache(config=model.config), **{name: factory(name) for name in methods}}
    try:
        results = evaluate_streams(model, [tokens], caches, **options)
    finally:
        disable_adms_llm(model)
    bound = 4 + recent + middle
    for name in methods:
        assert results[name].held_tokens <= bound + 64
    return {name: results[name].kl for name in methods}


@pytest.fixture(scope="module")
def short(smol):
    """KL of the methods at 132 tokens a head on 1,536 tokens of the shipped novel."""
    model, tokenizer = smol
    tokens = load_text(tokenizer, num_eval_tokens=1536).streams[0]
    return divergences(model, tokens, ["streaming", "h2o", "snapkv", "tova", "adms"], 64, 64, score_from=512)


def test_the_default_stays_nearer_to_the_full_cache_than_streaming(short):
    assert short["adms"] < 0.75 * short["streaming"], short


@pytest.mark.parametrize("name", ["h2o", "snapkv", "tova"])
def test_the_default_stays_nearer_to_the_full_cache_than_eviction_of_equal_memory(short, name):
    assert short["adms"] < short[name], short


@pytest.mark.slow
def test_the_default_reaches_the_figure_of_the_documentation_on_a_novel(smol):
    model, tokenizer = smol
    tokens = load_text(tokenizer, num_eval_tokens=6144).streams[0]
    kl = divergences(model, tokens, ["streaming", "adms"], 256, 256, score_from=2048)
    assert kl["adms"] <= 0.040, kl
    assert kl["adms"] <= 0.6 * kl["streaming"], kl


@pytest.mark.slow
def test_the_default_reaches_the_figure_of_the_documentation_on_an_encyclopaedia(smol, tmp_path):
    packed = SHARED / "wikitext-2-raw-test.txt.gz"
    if not packed.exists():
        pytest.skip("the WikiText-2 test split is not here")
    model, tokenizer = smol
    path = tmp_path / "wikitext.txt"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    tokens = load_text(tokenizer, str(path), num_eval_tokens=6144).streams[0]
    kl = divergences(model, tokens, ["streaming", "adms"], 256, 256, score_from=2048)
    assert kl["adms"] <= 0.6 * kl["streaming"], kl
