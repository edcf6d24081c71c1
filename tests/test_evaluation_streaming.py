"""The lockstep evaluation: its figures against figures worked out by hand, and that no chunk sees its own future."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from streaming_llm.evaluation import METHODS, EvaluationError, cache_factory, evaluate_streams, lockstep, plan_methods
from streaming_llm.evaluation.streaming import cache_bytes, default_score_from, held_tokens


class HalvedValues(DynamicCache):
    """A cache that spoils what it is given, so that its predictions differ from the full cache's in a known way."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states, value_states * 0.5, *args, **kwargs)


class Table(torch.nn.Module):
    """A model of two words whose next-word distribution depends on the cache alone: `cache.probabilities`."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(2, 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        probabilities = past_key_values.probabilities if past_key_values is not None else [0.5, 0.5]
        row = torch.tensor(probabilities).log()
        return SimpleNamespace(logits=row.expand(1, input_ids.shape[1], 2))


class TableCache:
    """What `Table` predicts with; says of itself what `evaluate_streams` asks of an ADMS cache."""

    def __init__(self, probabilities, seconds=None):
        self.probabilities = probabilities
        self.nbytes = 640
        self.held_tokens = 5
        if seconds is not None:
            self.compaction_seconds = seconds
            self.stats = {"total_compressions": 2}

    def memory_report(self):
        return {"attended": 600, "query_window": 40}


@pytest.fixture
def token_ids():
    return torch.randint(0, 128, (50,), generator=torch.Generator().manual_seed(1))


def full(model):
    return lambda: DynamicCache(config=model.config)


def spoiled(model):
    return lambda: HalvedValues(config=model.config)


def test_perplexity_kl_and_gap_are_those_worked_out_by_hand():
    stream = torch.tensor([0, 0, 0, 1, 0])
    methods = {
        "streaming": lambda: TableCache([0.25, 0.75]),
        "full": lambda: TableCache([0.5, 0.5]),
        "between": lambda: TableCache([0.4, 0.6]),
    }
    results = evaluate_streams(Table(), [stream], methods, chunk_size=2, score_from=2)
    assert list(results) == ["streaming", "full", "between"]
    # Scored: tokens 2, 3 and 4, which are 0, 1 and 0.
    streaming = (0.25 * 0.75 * 0.25) ** (-1 / 3)
    between = (0.4 * 0.6 * 0.4) ** (-1 / 3)
    assert results["full"].perplexity == pytest.approx(2)
    assert results["full"].kl == 0
    assert results["streaming"].scored_tokens == 3
    assert results["streaming"].perplexity == pytest.approx(streaming)
    assert results["streaming"].kl == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert results["between"].gap_recovered == pytest.approx((streaming - between) / (streaming - 2))
    assert results["streaming"].gap_recovered == 0
    assert results["full"].gap_recovered == 1


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 64])
@pytest.mark.parametrize("score_from", [1, 16, 49])
def test_chunks_of_any_size_give_the_figures_of_one_forward_pass(tiny_llama, token_ids, chunk_size, score_from):
    methods = {"full": full(tiny_llama), "streaming": spoiled(tiny_llama)}
    results = evaluate_streams(tiny_llama, [token_ids], methods, chunk_size=chunk_size, score_from=score_from)
    with torch.no_grad():
        log_p = {
            name: tiny_llama(token_ids[None], past_key_values=make()).logits[0, score_from - 1 : -1].log_softmax(-1)
            for name, make in methods.items()
        }
    targets = token_ids[score_from:, None]
    for name, result in results.items():
        assert result.scored_tokens == 50 - score_from
        assert result.nll == pytest.approx(-log_p[name].gather(1, targets).mean().item(), rel=1e-4)
        assert result.perplexity == pytest.approx(math.exp(result.nll))
    kl = (log_p["full"].exp() * (log_p["full"] - log_p["streaming"])).sum(-1).mean().item()
    assert results["streaming"].kl == pytest.approx(kl, rel=1e-3)
    assert kl > 0.01


def test_without_the_full_cache_there_is_no_kl_and_no_gap(tiny_llama, token_ids):
    result = evaluate_streams(tiny_llama, [token_ids], {"streaming": full(tiny_llama)})["streaming"]
    assert result.kl is None
    assert result.gap_recovered is None
    assert result.perplexity > 1


def test_each_stream_is_read_with_new_caches(tiny_llama, token_ids):
    methods = {"full": full(tiny_llama), "streaming": spoiled(tiny_llama)}
    first, second = token_ids[:20], token_ids[20:]
    both = evaluate_streams(tiny_llama, [first, second], methods, score_from=5, chunk_size=8)
    apart = [evaluate_streams(tiny_llama, [part], methods, score_from=5, chunk_size=8) for part in (first, second)]
    for name in methods:
        nll = sum(one[name].nll * one[name].scored_tokens for one in apart) / (15 + 25)
        assert both[name].nll == pytest.approx(nll)
        assert both[name].scored_tokens == 40
        assert both[name].held_tokens == 30
    assert both["full"].curve.tokens[-1] == 50


def test_a_stream_too_short_to_score_adds_nothing(tiny_llama, token_ids):
    methods = {"full": full(tiny_llama)}
    both = evaluate_streams(tiny_llama, [token_ids[:5], token_ids[5:]], methods, score_from=10)
    alone = evaluate_streams(tiny_llama, [token_ids[5:]], methods, score_from=10)
    assert both["full"].nll == alone["full"].nll


@pytest.mark.parametrize("length,chunk_size,changed", [(64, 1, 47), (128, 16, 24), (128, 16, 90)])
def test_no_method_sees_its_own_future(tiny_llama, length, chunk_size, changed):
    """Changing one token leaves the logits of all rows before it as they were, to the bit."""
    tokens = torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(2))
    other = tokens.clone()
    other[changed] = (other[changed] + 1) % 128
    settings = {"recent_size": 16, "compressed_budget": 16, "compression_interval": 8}
    settings |= {"min_middle_size_for_compress": 8, "rank": 4, "num_clusters": 8}
    plans = plan_methods(list(METHODS), settings)

    def logits(stream):
        torch.manual_seed(0)
        caches = {plan.method.name: cache_factory(tiny_llama, plan)() for plan in plans}
        found = {name: [] for name in caches}
        for chunk in lockstep(tiny_llama, stream, caches, chunk_size):
            found[chunk.method].append(chunk.logits)
        return {name: torch.cat(rows) for name, rows in found.items()}

    before, after = logits(tokens), logits(other)
    for name in METHODS:
        assert before[name].shape == (length, 128)
        assert torch.equal(before[name][:changed], after[name][:changed]), name
        assert not torch.equal(before[name][changed:], after[name][changed:]), name
    # Otherwise nothing was evicted, and the test proved nothing.
    assert not torch.allclose(before["streaming"], before["full"], atol=1e-3)


def test_logits_before_the_first_scored_token_are_not_computed(tiny_llama, token_ids):
    chunks = list(lockstep(tiny_llama, token_ids, {"full": full(tiny_llama)()}, 16, first_row=20))
    assert [chunk.logits.shape[0] for chunk in chunks] == [1, 12, 16, 2]
    assert [chunk.first_row for chunk in chunks] == [15, 20, 32, 48]
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(0, 16), (16, 32), (32, 48), (48, 50)]


def test_sizes_of_a_transformers_cache_are_counted_from_its_tensors(tiny_llama, token_ids):
    result = evaluate_streams(tiny_llama, [token_ids], {"full": full(tiny_llama)}, chunk_size=16)["full"]
    assert result.held_tokens == 50
    assert result.cache_bytes == 2 * 2 * 50 * 16 * 2 * 4  # layers, KV heads, tokens, dimensions, keys and values, bytes
    assert result.timing.compaction_share is None
    assert held_tokens(DynamicCache()) == cache_bytes(DynamicCache()) == 0


def test_what_a_cache_says_of_itself_is_reported():
    methods = {"adms": lambda: TableCache([0.5, 0.5], seconds=1e-9)}
    result = evaluate_streams(Table(), [torch.zeros(9, dtype=torch.int64)], methods, decode_tokens=4)["adms"]
    assert (result.cache_bytes, result.held_tokens) == (640, 5)
    assert result.memory == {"attended": 600, "query_window": 40}
    assert result.stats == {"total_compressions": 2}
    assert result.timing.compaction_seconds == pytest.approx(1e-9)
    assert 0 < result.timing.compaction_share < 1
    assert result.timing.decode_compaction_share == 0  # the counter did not move while decoding


def test_the_archive_of_a_recalling_cache_is_told_apart(tiny_llama):
    sizes = {"recent_size": 16, "compressed_budget": 16, "compression_interval": 8, "rank": 4, "recall_bits": 4}
    tokens = torch.randint(0, 128, (200,), generator=torch.Generator().manual_seed(4))
    methods = {plan.method.name: cache_factory(tiny_llama, plan) for plan in plan_methods(["adms", "adms_recall"], sizes)}
    results = evaluate_streams(tiny_llama, [tokens], methods, chunk_size=8)
    assert results["adms"].archive_bytes == 0
    found = results["adms_recall"]
    assert found.archive_bytes == found.memory["archive"] + found.memory["index"] > 0
    # Eight tokens fewer in the middle.
    assert 0 <= results["adms"].cache_bytes - (found.cache_bytes - found.archive_bytes) < 0.2 * results["adms"].cache_bytes


def test_the_compaction_share_counts_from_the_first_compaction_on():
    from streaming_llm.evaluation.streaming import Chunk, _Tally

    tally, cache = _Tally(), SimpleNamespace(compaction_seconds=0.0)
    for start, (forward, compaction) in enumerate([(9.0, 0.0), (3.0, 1.0), (3.0, 0.0), (3.0, 1.0)]):
        cache.compaction_seconds += compaction
        tally.time(Chunk("adms", start, start + 1, start, torch.empty(0), forward), cache)
    assert tally.timing.forward_seconds == 18
    assert tally.timing.compaction_seconds == 2
    assert tally.timing.compaction_share == pytest.approx(2 / 7)


def test_decoding_is_timed_and_leaves_the_figures_as_they_are(tiny_llama, token_ids):
    methods = {"full": full(tiny_llama)}
    timed = evaluate_streams(tiny_llama, [token_ids], methods, decode_tokens=60)["full"]
    plain = evaluate_streams(tiny_llama, [token_ids], methods)["full"]
    assert timed.timing.decode_tokens == 60
    assert timed.timing.decode_tokens_per_second > 0
    assert plain.timing.decode_tokens_per_second is None
    assert (timed.nll, timed.held_tokens, timed.curve) == (plain.nll, plain.held_tokens, plain.curve)


def test_the_curve_ends_with_the_stream_and_with_the_final_perplexity(tiny_llama):
    tokens = torch.randint(0, 128, (200,), generator=torch.Generator().manual_seed(3))
    seen = []
    result = evaluate_streams(
        tiny_llama, [tokens], {"full": full(tiny_llama)}, chunk_size=32, on_chunk=lambda *call: seen.append(call)
    )["full"]
    assert result.curve.tokens == [32, 96, 160, 200]
    assert result.curve.held_tokens == [32, 96, 160, 200]
    assert result.curve.perplexity[0] is None  # scored from 66 on
    assert result.curve.perplexity[-1] == result.perplexity
    assert [tokens for tokens, _ in seen] == [32, 64, 96, 128, 160, 192, 200]
    assert seen[0][1] == {}
    assert seen[-1][1] == {"full": result.perplexity}


def test_the_default_start_of_scoring_is_2048_or_a_third():
    assert [default_score_from(tokens) for tokens in (2, 300, 6144, 100_000)] == [1, 100, 2048, 2048]


def test_logits_that_are_no_numbers_are_reported_by_method(tiny_llama, token_ids):
    with torch.no_grad():
        tiny_llama.lm_head.weight[0] = float("nan")
    with pytest.raises(EvaluationError, match="method 'full' gives logits that are no numbers"):
        evaluate_streams(tiny_llama, [token_ids], {"full": full(tiny_llama)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"score_from": 50}, "score_from=50 .* between 1 and 49"),
        ({"score_from": 0}, "score_from=0"),
        ({"decode_tokens": -1}, "decode_tokens=-1"),
        ({"streams": []}, "at least 2 tokens"),
        ({"streams": [torch.tensor([1])]}, "at least 2 tokens"),
        ({"streams": [torch.tensor([1, 500])]}, "token 500; the model has 128"),
        ({"methods": {}}, "methods is empty"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tiny_llama, token_ids, changes, message):
    arguments = {"streams": [token_ids], "methods": {"full": full(tiny_llama)}} | changes
    with pytest.raises(ValueError, match=message):
        evaluate_streams(tiny_llama, **arguments)


def test_real_weights_predict_real_text(smol):
    """On the shipped novel the model is far from guessing: a wrong tokenizer, mask or position would show here."""
    from streaming_llm.evaluation import load_text

    model, tokenizer = smol
    text = load_text(tokenizer, num_eval_tokens=384)
    result = evaluate_streams(model, text.streams, {"full": full(model)}, score_from=128)["full"]
    assert 10 < result.perplexity < 30
