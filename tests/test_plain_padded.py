"""Left-padded batches and the position window against the plain reference: each row is what it would be alone."""

from __future__ import annotations

import plain
import pytest
import torch
from conftest import make_tiny_llama, padded_passes
from test_plain import SMALL, assert_same_state, distinct

from streaming_llm import enable_adms_llm
from streaming_llm.stream import positions

MODEL = make_tiny_llama()
NEW = 48
WINDOWS = {
    "absolute": {},
    "auto": {"window": 80, "target": int(80 * positions.TARGET)},
    "cache": {"at_compaction": True, "limit": 80},
}
SHORT = {
    "one of 3 beside one of 140": [3, 140],
    "3, 20, 75 and 140": [3, 20, 75, 140],
    "all below the bound": [3, 9, 20],
    "all above the bound": [75, 140, 90],
    "equal": [60, 60],
}


def long_row(seed: int, tokens: int) -> torch.Tensor:
    return torch.cat([distinct(seed, 125), distinct(seed + 100, 125)], dim=1)[:, :tokens]


def padded_stream(model, rows: list[torch.Tensor], passes: list[list[int]], cache) -> list[torch.Tensor]:
    """The rows' logits `[1, tokens, vocab]` each, streamed as one; `passes[n][row]`: tokens of the row in pass `n`."""
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    for logits, real in padded_passes(model, rows, passes, cache):
        for row, part in enumerate(parts):
            part.append(logits[row : row + 1, real[row]])
    return [torch.cat(part, dim=1) for part in parts]


def rows_are_alone(lengths: list[int], passes: list[list[int]], **chosen) -> None:
    rows = [long_row(seed, sum(sizes[seed] for sizes in passes)) for seed in range(len(lengths))]
    cache = enable_adms_llm(MODEL, **{**SMALL, **chosen})
    together = padded_stream(MODEL, rows, passes, cache)
    for number, row in enumerate(rows):
        own = [sizes[number] for sizes in passes if sizes[number]]
        alone, reference = plain.plain_stream(MODEL, row, cache.config, own)
        steady = reference.steady
        assert steady > lengths[number] + 20, f"row {number}: a choice too close to compare, take another seed"
        torch.testing.assert_close(together[number][:, :steady], alone[:, :steady], rtol=1e-4, atol=1e-4)
        if steady == row.shape[1]:
            assert_same_state(cache, reference, number)


@pytest.mark.parametrize("lengths", SHORT.values(), ids=SHORT)
def test_a_row_of_a_left_padded_batch_is_the_row_alone(lengths):
    rows_are_alone(lengths, [lengths] + [[1] * len(lengths)] * NEW)


def test_a_padded_second_turn_leaves_each_row_what_it_is_alone():
    ones = [[1] * 4]
    rows_are_alone([3, 20, 75, 90], [[3, 20, 75, 90], *ones * 12, [25, 2, 40, 9], *ones * 24])


def test_a_row_that_has_nothing_new_in_a_pass_is_not_touched():
    rows_are_alone([8, 30], [[8, 30], *[[1, 1]] * 9, [0, 20], *[[1, 1]] * 25])


@pytest.mark.parametrize("chosen", [{"compressed_budget": 0, "min_importance_tokens": 0}, {"protect_exact": True},
                                    {"importance_ratio": 1.0}, {"compression_interval": 1}])  # fmt: skip
def test_rows_are_alone_with_other_settings_too(chosen):
    rows_are_alone([3, 20, 75], [[3, 20, 75]] + [[1] * 3] * 30, **chosen)


@pytest.mark.parametrize(
    "policy,chunks",
    [("absolute", 5), ("auto", 5), ("auto", [40, 1]), ("auto", [30, 5, 5, 25]), ("cache", 5), ("cache", [70, 3, 3, 18, 1])],
)
def test_the_position_window_is_the_references(policy, chunks):
    """A model trained on 80 positions, streamed over 180: `auto` moves back when it gets there, `cache` at a compaction."""
    model = make_tiny_llama()
    model.config.max_position_embeddings = 80
    ids = long_row(2, 180)
    cache = enable_adms_llm(model, **SMALL, position_policy=policy)
    window = WINDOWS[policy]
    expected, reference = plain.plain_stream(model, ids, cache.config, chunks, **window)
    assert (reference.rebases > 0) == (policy != "absolute")
    with torch.no_grad():
        parts = torch.split(ids, plain.chunk_sizes(180, chunks), dim=1)
        got = torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], dim=1)
    steady = reference.steady
    assert steady >= 100
    torch.testing.assert_close(got[:, :steady], expected[:, :steady], rtol=1e-4, atol=1e-4)
    if steady == 180:
        assert_same_state(cache, reference)


@pytest.mark.parametrize("policy", ["auto", "cache"])
def test_each_row_has_a_position_window_of_its_own(policy):
    model = make_tiny_llama()
    model.config.max_position_embeddings = 80
    lengths = [3, 20, 60]
    rows = [long_row(seed, length + NEW) for seed, length in enumerate(lengths)]
    cache = enable_adms_llm(model, **SMALL, position_policy=policy)
    together = padded_stream(model, rows, [lengths] + [[1] * 3] * NEW, cache)
    window = WINDOWS[policy]
    for number, row in enumerate(rows):
        alone, reference = plain.plain_stream(model, row, cache.config, [lengths[number], 1], **window)
        steady = reference.steady
        assert steady > lengths[number] + 20
        torch.testing.assert_close(together[number][:, :steady], alone[:, :steady], rtol=1e-4, atol=1e-4)
