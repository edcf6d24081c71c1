"""Padded batches: every row is what it would be alone, below the bound and above it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_llama, random_queries, random_states, stream, token_ids
from costs import operators
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import FAMILIES, make

import streaming_llm.baselines  # noqa: F401  registers the policies
from streaming_llm import ADMSConfig, ADMSLayer, enable_adms_llm
from streaming_llm.evaluation.lone_layer import LoneLayer
from streaming_llm.stream.arrival import Arrival

SMALL = {
    "start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8,
    "attention_window": 16, "num_clusters": 4, "min_middle_size_for_compress": 0,
}  # fmt: skip
MODEL = make_tiny_llama()


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(ids, mask, positions)` of rows of token ids, padded on the left."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def run_padded(model, cache, ids, mask, positions, chunks: list[int]) -> torch.Tensor:
    """Logits of the batch in passes of these lengths; the bound is checked after each."""
    parts, start = [], 0
    for chunk in chunks:
        stop = start + chunk
        own = {} if positions is None else {"position_ids": positions[:, start:stop]}
        parts.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **own).logits)
        assert cache.held_tokens <= cache.config.expected_max_tokens
        start = stop
    return torch.cat(parts, dim=1)


@torch.no_grad()
def run_alone(model, cache, row, mask, chunks: list[int]) -> torch.Tensor:
    """Logits of one row without its padding, in the passes its tokens had in the batch."""
    parts, start, done = [], 0, 0
    for chunk in chunks:
        real = int(mask[start : start + chunk].sum())
        start += chunk
        if real:
            parts.append(model(row[None, done : done + real], past_key_values=cache).logits)
            done += real
    return torch.cat(parts, dim=1)[0]


def assert_rows_equal(model, new_cache, lengths, more, chunks, tolerance=1e-4, given_positions=True):
    rows = [token_ids(length + more, seed=number)[0] for number, length in enumerate(lengths)]
    ids, mask, positions = left_padded(rows)
    cache = new_cache()
    together = run_padded(model, cache, ids, mask, positions if given_positions else None, chunks)
    for number, row in enumerate(rows):
        other = new_cache()
        alone = run_alone(model, other, row, mask[number], chunks)
        scale = alone.abs().max().clamp_min(1.0)
        torch.testing.assert_close(together[number][mask[number].bool()] / scale, alone / scale, rtol=0, atol=tolerance)
        for layer, single in zip(cache.layers, other.layers, strict=True):
            if isinstance(layer, ADMSLayer):
                assert layer.held.count[number].sum(-1).tolist() == single.held.count[0].sum(-1).tolist()
    return cache


def passes(total: int, *chunks: int) -> list[int]:
    """The chunks, the last one repeated, until `total` tokens are reached."""
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(chunks[min(len(sizes), len(chunks) - 1)], total - sum(sizes)))
    return sizes


ROWS = ([30, 11], [70, 20, 37, 3])
CHUNKS = ((1,), (7,), (None, 1), (None, 5), (20, 3))
GRID = [("low_rank", lengths, chunks) for lengths in ROWS for chunks in CHUNKS]
GRID += [("attention_matching", ROWS[number % 2], chunks) for number, chunks in enumerate(CHUNKS)]
GRID += [(name, ROWS[1], (None, 5)) for name in ("vq", "h2o", "snapkv", "tova")] + [("vq", ROWS[0], (7,))]


@pytest.mark.parametrize("compressor,lengths,chunks", GRID)
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(compressor, lengths, chunks):
    chunks = [max(lengths) if chunk is None else chunk for chunk in chunks]
    assert_rows_equal(
        MODEL, lambda: enable_adms_llm(MODEL, **{**SMALL, "compressor_type": compressor}), lengths, 24,
        passes(max(lengths) + 24, *chunks),
    )  # fmt: skip


@given(
    lengths=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    recent=st.integers(4, 20),
    budget=st.integers(0, 16),
    interval=st.integers(1, 16),
    start=st.integers(0, 4),
    policy=st.sampled_from(["auto", "cache", "absolute"]),
)
@settings(deadline=None, max_examples=8)
def test_rows_stay_themselves_whatever_the_settings(lengths, sizes, recent, budget, interval, start, policy):
    chosen = {**SMALL, "recent_size": recent, "compressed_budget": budget, "compression_interval": interval,
              "start_size": start, "min_importance_tokens": 0, "position_policy": policy}  # fmt: skip
    assert_rows_equal(
        MODEL, lambda: enable_adms_llm(MODEL, **chosen), lengths, 40, passes(max(lengths) + 40, *sizes), tolerance=2e-4
    )


@pytest.mark.parametrize("scope,chunks", [("layer", (7,)), ("model", (70, 1)), ("model", (7,))])
def test_a_row_stays_itself_with_all_four_modules(scope, chunks):
    config = ADMSConfig.adm_plus_plus(
        **SMALL, sketch_budget=4, replay_budget=2, energy_replay_threshold=1.0, controller_scope=scope
    )
    cache = assert_rows_equal(
        MODEL, lambda: enable_adms_llm(MODEL, config), [70, 20, 37, 7], 60, passes(130, *chunks), tolerance=1e-4
    )
    stats = cache.stats
    assert stats["total_replay_tokens"] and stats["total_sketch_tokens"] and stats["total_calibrations"]


@pytest.mark.parametrize("name,given_positions", [(name, False) for name in FAMILIES] + [("llama", True), ("gpt2", True)])
def test_every_family_takes_padded_batches(name, given_positions):
    model = make(name)
    assert_rows_equal(
        model, lambda: enable_adms_llm(model, **SMALL), [36, 3, 20], 12, passes(48, 36, 1), given_positions=given_positions
    )


def test_padding_may_come_between_two_turns():
    first = [token_ids(40, seed=1)[0], token_ids(12, seed=2)[0]]
    second = [token_ids(5, seed=3)[0], token_ids(30, seed=4)[0]]
    ids, mask, _ = left_padded(first)
    more, more_mask, _ = left_padded(second)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = enable_adms_llm(MODEL, **SMALL)
    together = run_padded(MODEL, cache, ids, mask, positions, [40, 30])
    for number in range(2):
        row = torch.cat([first[number], second[number]])
        alone = run_alone(MODEL, enable_adms_llm(MODEL, **SMALL), row, mask[number], [40, 30])
        torch.testing.assert_close(together[number][mask[number].bool()], alone, rtol=0, atol=1e-3)


def test_a_mask_of_the_new_tokens_alone_is_enough():
    rows = [token_ids(50, seed=1)[0], token_ids(17, seed=2)[0]]
    ids, mask, positions = left_padded(rows)
    whole, short, none = (enable_adms_llm(MODEL, **SMALL) for _ in range(3))
    more = token_ids(30, 2, seed=5)
    expected = run_padded(MODEL, whole, torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1),
                          torch.cat([positions, positions[:, -1:] + 1 + torch.arange(30)], 1), [50, *[3] * 10])  # fmt: skip
    for cache, given_mask in ((short, True), (none, False)):
        run_padded(MODEL, cache, ids, mask, positions, [50])
        extra = {"attention_mask": torch.ones(2, 3, dtype=torch.int64)} if given_mask else {}
        got = stream(MODEL, more, cache, 3, **extra)
        torch.testing.assert_close(got, expected[:, 50:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("tokens", [12, 60])
def test_generate_says_for_each_row_what_it_says_alone(tokens):
    rows = [token_ids(tokens, seed=1)[0], token_ids(5, seed=2)[0], token_ids(tokens // 2, seed=3)[0]]
    ids, mask, _ = left_padded(rows)
    options = {"max_new_tokens": 36, "min_new_tokens": 36, "do_sample": False}
    cache = enable_adms_llm(MODEL, **SMALL)
    together = MODEL.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for number, row in enumerate(rows):
        alone = MODEL.generate(
            row[None], attention_mask=torch.ones_like(row[None]), past_key_values=enable_adms_llm(MODEL, **SMALL), **options
        )
        assert torch.equal(together[number, ids.shape[1] :], alone[0, len(row) :])


@pytest.mark.parametrize("tokens", [20, 90])
def test_more_padding_changes_nothing(tokens):
    rows = [token_ids(tokens, seed=1)[0], token_ids(tokens // 3, seed=2)[0]]
    ids, mask, _ = left_padded(rows)
    wider = torch.nn.functional.pad(ids, (13, 0)), torch.nn.functional.pad(mask, (13, 0))
    said = [
        MODEL.generate(i, attention_mask=m, max_new_tokens=30, past_key_values=enable_adms_llm(MODEL, **SMALL))
        for i, m in ((ids, mask), wider)
    ]
    assert torch.equal(said[0][:, -30:], said[1][:, -30:])


@pytest.mark.parametrize("after", [0, 40])
def test_rows_of_a_padded_batch_can_be_reordered_repeated_and_selected(after):
    rows = [token_ids(40, seed=1)[0], token_ids(9, seed=2)[0], token_ids(25, seed=3)[0]]
    more = token_ids(after + 30, 3, seed=9)
    ids, mask, positions = left_padded([torch.cat([row, extra]) for row, extra in zip(rows, more, strict=True)])
    cache = enable_adms_llm(MODEL, **SMALL)
    split = 40 + after
    run_padded(MODEL, cache, ids[:, :split], mask[:, :split], positions[:, :split], passes(split, 40, 1))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert cache.batch_size == 2
    with torch.no_grad():
        got = [
            MODEL(ids[[1, 2], at : at + 1], attention_mask=mask[[1, 2], : at + 1],
                  position_ids=positions[[1, 2], at : at + 1], past_key_values=cache).logits
            for at in range(split, ids.shape[1])
        ]  # fmt: skip
    for place, number in enumerate((1, 2)):
        row = torch.cat([rows[number], more[number]])
        alone = run_alone(MODEL, enable_adms_llm(MODEL, **SMALL), row, mask[number], passes(ids.shape[1], 40, 1))
        torch.testing.assert_close(torch.cat(got, 1)[place], alone[-30:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("at,layer", [(40, 0), (41, 1), (75, 0), (75, 1)])
def test_a_failed_pass_of_a_padded_batch_is_taken_back(at, layer):
    rows = [token_ids(100, seed=1)[0], token_ids(70, seed=2)[0]]
    ids, mask, positions = left_padded(rows)
    caches = [enable_adms_llm(MODEL, **SMALL) for _ in range(2)]
    for cache in caches:
        run_padded(MODEL, cache, ids[:, :at], mask[:, :at], positions[:, :at], passes(at, 40, 1))

    def fail(module, args, kwargs):
        raise RuntimeError("on purpose")

    handle = MODEL.model.layers[layer].self_attn.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        MODEL(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=caches[0])
    handle.remove()
    assert caches[0].get_seq_length() == at
    got = []
    for cache in caches:
        with torch.no_grad():
            got.append(torch.cat([
                MODEL(ids[:, s : s + 1], attention_mask=mask[:, : s + 1], position_ids=positions[:, s : s + 1],
                      past_key_values=cache).logits
                for s in range(at, 100)
            ], 1))  # fmt: skip
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("tokens", [20, 90])
def test_tokens_of_a_padded_batch_can_be_taken_back_but_not_past_the_padding(tokens):
    rows = [token_ids(tokens, seed=1)[0], token_ids(tokens - 7, seed=2)[0]]
    ids, mask, positions = left_padded(rows)
    cropped, never = (enable_adms_llm(MODEL, **SMALL) for _ in range(2))
    for cache in (cropped, never):
        run_padded(MODEL, cache, ids, mask, positions, passes(tokens, 1))
    wrong, right = token_ids(2, 2, seed=5), token_ids(20, 2, seed=6)
    while not all(row.length + 2 <= row.capacity(cropped.config) for row in cropped.layers[0].stack.rows):
        for cache in (cropped, never):
            stream(MODEL, right[:, :1], cache, 1)
    stream(MODEL, wrong, cropped, 2)
    cropped.crop(-2)
    assert torch.equal(stream(MODEL, right[:, :2], cropped, 1), stream(MODEL, right[:, :2], never, 1))
    with pytest.raises(ValueError, match="crop"):
        cropped.crop(-tokens - 8)


def test_a_reset_cache_knows_nothing_of_padding():
    rows = [token_ids(60, seed=1)[0], token_ids(20, seed=2)[0]]
    ids, mask, positions = left_padded(rows)
    cache = enable_adms_llm(MODEL, **SMALL)
    run_padded(MODEL, cache, ids, mask, positions, passes(60, 1))
    assert cache.stream.padded and len({row.length for row in cache.layers[0].stack.rows}) == 2
    cache.reset()
    assert not cache.stream.padded and not cache.stream.stacks
    plain = token_ids(80)
    assert torch.equal(stream(MODEL, plain, cache, 5), stream(MODEL, plain, enable_adms_llm(MODEL, **SMALL), 5))


def test_right_padding_is_refused_where_the_next_token_would_be_predicted_from_it():
    ids, mask = token_ids(20, 2), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 15:] = 0
    cache = enable_adms_llm(MODEL, **SMALL)
    with pytest.raises(ValueError, match="attention_mask has padding after the last token"):
        MODEL.generate(ids, attention_mask=mask, max_new_tokens=2, past_key_values=cache)
    assert cache.get_seq_length() == 0
    # To score a text it is as good as any other.
    with torch.no_grad():
        together = MODEL(ids, attention_mask=mask, past_key_values=cache).logits
    alone = stream(MODEL, ids[1:, :15], enable_adms_llm(MODEL, **SMALL), 15)
    torch.testing.assert_close(together[1:, :15], alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 19), (2, 25), (1, 20)])
def test_a_mask_that_can_not_be_right_is_refused_and_nothing_changed(shape):
    cache = enable_adms_llm(MODEL, **SMALL)
    stream(MODEL, token_ids(10, 2), cache, 10)
    with pytest.raises(ValueError, match=r"attention_mask of shape \[\d, \d+\] must be \[2, 20\]"):
        MODEL(token_ids(10, 2), attention_mask=torch.ones(shape, dtype=torch.int64), past_key_values=cache)
    assert cache.get_seq_length() == 10


def test_a_four_dimensional_mask_is_refused_once_tokens_are_compacted():
    cache = enable_adms_llm(MODEL, **SMALL)
    stream(MODEL, token_ids(60), cache, 5)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        MODEL(token_ids(1), attention_mask=torch.zeros(1, 1, 1, 61), past_key_values=cache)


@pytest.mark.parametrize(
    "dtype,implementation", [(torch.bfloat16, "sdpa"), (torch.float16, "sdpa"), (torch.float16, "eager")]
)
def test_half_precision_rows_are_finite(dtype, implementation):
    model = make_tiny_llama().to(dtype)
    model.set_attn_implementation(implementation)
    rows = [token_ids(90, seed=1)[0], token_ids(2, seed=2)[0]]
    ids, mask, positions = left_padded(rows)
    for chunks in (passes(90, 1), passes(90, 40, 7)):
        assert run_padded(model, enable_adms_llm(model, **SMALL), ids, mask, positions, chunks).isfinite().all()


def test_the_sinks_of_a_row_are_its_first_real_tokens():
    keys, values = random_states(60, 2, 2, 8)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[0, :9] = False
    layer = LoneLayer(ADMSConfig(**SMALL))
    for start in range(0, 60, 5):
        part = slice(start, start + 5)
        positions = (real.cumsum(-1) - 1).clamp_min(0)[:, part]
        counts, tail = tuple(real[:, part].sum(-1).tolist()), min(5, max(0, start + 5 - 9))
        arrival = Arrival(5, counts, positions, real[:, part], masked=True, tail=tail)
        layer.update(keys[:, :, part], values[:, :, part], arrival=arrival)
        layer.observe(random_queries(5, 2, seed=start), 0.4)
        expected = real[:, : start + 5].sum(-1)
        assert torch.equal(layer.held.count.sum(-1), expected[:, None].expand(2, 2).int())
        assert layer.held_tokens().max() <= layer.config.expected_max_tokens
    assert layer.row.compactions
    assert torch.equal(layer.keys[0, :, :2], keys[0, :, 9:11]) and torch.equal(layer.keys[1, :, :2], keys[1, :, :2])


def test_each_rows_state_can_be_read():
    config = ADMSConfig.adm_plus_plus(**SMALL, sketch_budget=4, replay_budget=2, energy_replay_threshold=1.0)
    rows = [token_ids(150, seed=1)[0], token_ids(90, seed=2)[0], token_ids(150, seed=3)[0]]
    ids, mask, positions = left_padded(rows)
    cache = enable_adms_llm(MODEL, config)
    run_padded(MODEL, cache, ids, mask, positions, passes(150, 60, 1))
    for number, row in enumerate(rows):
        alone = enable_adms_llm(MODEL, config)
        run_alone(MODEL, alone, row, mask[number], passes(150, 60, 1))
        for name in ("sketch_bank", "replay_bank"):
            view, single = getattr(cache, name).row(number), getattr(alone, name)
            assert list(view) == list(single) and len(view) == 4
            for key in view:
                for field, tensor in view[key].items():
                    torch.testing.assert_close(tensor, single[key][field], rtol=1e-3, atol=1e-3)
        for name in ("controller_budgets", "controller_energy_ema", "calibration_offsets"):
            assert set(getattr(cache, name).row(number)) == set(getattr(alone, name))
    with pytest.raises(ValueError, match="row=3 must be a row of the batch"):
        list(cache.replay_bank.row(3))


@pytest.mark.parametrize("make_config", [ADMSConfig, ADMSConfig.adm_plus_plus], ids=["base", "adm++"])
@torch.no_grad()
def test_rows_of_different_length_cost_hardly_more_than_equal_rows(make_config):
    found = []
    for shorter in (0, 1):
        ids, mask, _ = left_padded([token_ids(100 - shorter * row, seed=row)[0] for row in range(8)])
        cache = enable_adms_llm(MODEL, make_config(**SMALL))
        MODEL(ids, attention_mask=mask, past_key_values=cache)
        costs = []
        for number in range(SMALL["compression_interval"] + 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = {"input_ids": token_ids(1, 8, seed=number), "attention_mask": mask, "past_key_values": cache}
            costs.append(operators(lambda step=step: MODEL(**step)))
        assert all(row.compactions > 1 for row in cache.layers[0].stack.rows)
        found.append((max(costs), sum(costs)))
    (equal_step, equal_total), (step, total) = found
    assert step <= 1.3 * equal_step and total <= 1.3 * equal_total
