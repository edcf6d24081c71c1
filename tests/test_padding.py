"""Masks that change what was seen: honoured for what is still held one by one, refused in words for the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import make
from transformers import DynamicCache, StoppingCriteria

from streaming_llm import ADMSConfig, ADMSKVCache, ADMSLayer, enable_adms_llm
from streaming_llm.data.padding import known_figures, mask_figures, with_columns
from streaming_llm.evaluation.soak import tiny_model

SMALL = {
    "start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 24, "rank": 8,
    "min_middle_size_for_compress": 0,
}  # fmt: skip
# Slots in use before the first compaction, and right after one.
FULL, RESTING = 54, 30
MODEL = make_tiny_llama()
# Of one layer, whose keys know nothing of what their tokens saw: one that is taken out leaves no trace in the others.
SHALLOW = tiny_model(4096, seed=1, vocab_size=128, num_hidden_layers=1)


class StopsAt(StoppingCriteria):
    """Ends each row once the text has the row's own length."""

    def __init__(self, *lengths: int):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


@torch.no_grad()
def ask(model, cache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of `ids`, the newest tokens of a text as long as `mask`; positions as `generate` counts them."""
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def held_counts(cache) -> list[list[int]]:
    """Tokens that each row's first head stands for, layer by layer."""
    return [layer.held.count[:, 0].sum(-1).tolist() for layer in cache.layers if isinstance(layer, ADMSLayer)]


def past_the_bound(model, config=None, batch: int = 2, more: int = 10):
    """`(cache, ids, mask)`: a cache that compacted a prompt of 60 tokens a row, and read `more` one by one."""
    cache = enable_adms_llm(model, config or ADMSConfig(**SMALL))
    ids = token_ids(60 + more, batch)
    stream(model, ids[:, :60], cache, 60)
    stream(model, ids[:, 60:], cache, 1)
    return cache, ids, torch.ones_like(ids)


@given(
    passes=st.lists(st.tuples(st.integers(1, 12), st.floats(0.3, 1.0)), min_size=2, max_size=9),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=20)
def test_before_a_compaction_any_mask_of_the_past_counts_as_with_dynamic_cache(passes, batch, seed):
    torch.manual_seed(seed)
    cache, dynamic, seen = enable_adms_llm(MODEL, **SMALL), DynamicCache(), 0
    mask = torch.ones(batch, 0, dtype=torch.long)
    for new, share in passes:
        columns = seen + new
        drawn = (torch.rand(batch, columns) < share).long()
        # Once padding has lost its slots it can't be shown any more.
        drawn[:, :seen] *= mask if cache.stream.aligned else 1
        if drawn.sum(1).max() > FULL:
            break
        mask, ids = drawn, token_ids(new, batch, seed=seed + seen)
        got, expected = (ask(MODEL, own, ids, mask) for own in (cache, dynamic))
        if columns <= FULL:
            assert torch.equal(got, expected)
        real = mask[:, seen:].bool()
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-3)
        assert held_counts(cache) == [mask.sum(1).tolist()] * 2
        seen = columns


@pytest.mark.parametrize("modules", ["none", "attention_matching", "cache positions", "all"])
def test_a_row_equals_one_that_never_saw_what_a_mask_hides(modules):
    chosen = {"compressor_type": modules} if modules == "attention_matching" else {}
    chosen |= {"position_policy": "cache"} if modules == "cache positions" else {}
    config = ADMSConfig(**SMALL, **chosen)
    if modules == "all":
        config = ADMSConfig.adm_plus_plus(**SMALL, sketch_budget=4, replay_budget=2, energy_replay_threshold=1.0)
    cache, ids, mask = past_the_bound(SHALLOW, config, batch=3)
    ids = torch.cat([ids, token_ids(70, 3, seed=5)], 1)
    # Positions counted in the cache have no gaps, where the row alone has one.
    mask[0, range(65, 70) if modules == "cache positions" else [61, 64, 65]] = 0
    mask[2, 66:] = 0
    mask = torch.cat([mask, torch.ones(3, 70, dtype=torch.long)], 1)
    positions = mask.cumsum(-1) - 1
    positions[:, :70] = torch.arange(70)
    cuts = [0, 60, *range(61, 71), 75, *range(76, 141)]

    def read(row_ids, row_positions, keep, cache, first=0):
        parts = []
        for start, stop in zip(cuts[first:], cuts[first + 1 :], strict=False):
            own = keep[:, start:stop].bool()
            if own.any():
                at = own[0] if len(own) == 1 else slice(None)
                whole = {} if len(own) == 1 else {"attention_mask": keep[:, :stop]}
                with torch.no_grad():
                    parts.append(SHALLOW(
                        row_ids[:, start:stop][:, at], position_ids=row_positions[:, start:stop][:, at],
                        past_key_values=cache, **whole,
                    ).logits)  # fmt: skip
        return torch.cat(parts, 1)

    together = read(ids, positions, mask, cache, first=11)
    for row in range(3):
        own = slice(row, row + 1)
        alone = read(ids[own], positions[own], mask[own], enable_adms_llm(SHALLOW, config))[:, -70:]
        torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-3)
    assert cache.held_tokens <= config.expected_max_tokens


@pytest.mark.parametrize("columns", [range(69, 70), range(60, 70), range(45, 70, 3), (44, 50, 51), range(44, 70)])
def test_past_the_bound_a_hidden_token_is_attended_to_no_more(columns):
    cache, _, mask = past_the_bound(MODEL)
    by_hand = copy.deepcopy(cache)
    for stack in by_hand.stream.stacks:
        for column in columns:
            stack.tokens.beta[:, :, stack.columns - (70 - column)] = -torch.inf
    mask[:, list(columns)] = 0
    mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    ids = token_ids(3, 2, seed=7)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1)[:, -3:]
        expected = MODEL(ids, position_ids=positions, past_key_values=by_hand).logits
    torch.testing.assert_close(ask(MODEL, cache, ids, mask), expected, rtol=0, atol=1e-4)


REFUSED = {
    "merged": (range(20, 22), 0, "0 in row 1 for 2 of the columns 20 to 21, which are sinks or were merged"),
    "a sink": ([1], 0, "0 in row 1 for 1 of the columns 1 to 1, which are sinks or were merged"),
    "the last but one merged": (range(43, 50), 0, "0 in row 1 for 1 of the columns 43 to 43, .* the row's last 26 tokens"),
    "hidden before": ([65], 1, "1 in row 1 for 1 of the columns 65 to 65, which were padding until now"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mask_that_asks_for_what_is_not_held_is_refused_and_nothing_changed(case):
    columns, value, message = REFUSED[case]
    cache, ids, mask = past_the_bound(MODEL)
    if value:
        mask[1, 65] = 0
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        ask(MODEL, cache, token_ids(1, 2), mask)
    wrong = torch.nn.functional.pad(mask, (0, 1), value=1)
    right = wrong.clone()
    wrong[1, list(columns)] = value
    untouched = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=f"attention_mask has {message}.*cache.reset"):
        ask(MODEL, cache, token_ids(1, 2), wrong)
    assert cache.padding == untouched.padding and cache.stream.padded == bool(value)
    assert torch.equal(*(ask(MODEL, own, token_ids(1, 2), right) for own in (cache, untouched)))


def test_padding_whose_slots_are_gone_can_not_be_shown():
    cache = enable_adms_llm(MODEL, **SMALL)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    ask(MODEL, cache, token_ids(60, 2), mask)
    with pytest.raises(ValueError, match="1 in row 1 for 20 of the columns 0 to 19, which were padding until now"):
        ask(MODEL, cache, token_ids(1, 2), torch.ones(2, 61, dtype=torch.long))


def fail(module, args, kwargs):
    raise RuntimeError("on purpose")


def after_failing(cache, mask):
    """The cache after a pass that brought the mask and failed in the second layer."""
    handle = MODEL.model.layers[1].self_attn.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        ask(MODEL, cache, token_ids(3, 2, seed=8), mask)
    handle.remove()
    return cache


def after_cropping(cache, mask):
    """The cache after two passes of which all is taken back."""
    ask(MODEL, cache, token_ids(3, 2, seed=8), mask)
    ask(MODEL, cache, token_ids(2, 2, seed=9), torch.nn.functional.pad(mask, (0, 2), value=1))
    cache.crop(-5)
    return cache


def loaded(cache, folder):
    """The cache written to a file and read."""
    cache.save(folder / "session")
    return ADMSKVCache.load(folder / "session", MODEL)


@pytest.mark.parametrize("what", ["a failed pass", "a crop", "a copy", "a file", "new rows"])
def test_what_a_mask_hid_stays_hidden_after(what, tmp_path):
    cache, ids, mask = past_the_bound(MODEL)
    mask[1, 63:70] = 0
    mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    expected = copy.deepcopy(cache)
    rows = torch.tensor([1, 1, 0]) if what == "new rows" else torch.tensor([0, 1])
    if what == "a failed pass":
        cache = after_failing(cache, mask)
    elif what == "a crop":
        cache = after_cropping(cache, mask)
    else:
        for own in (cache, expected):
            ask(MODEL, own, token_ids(3, 2, seed=8), mask)
        mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    if what == "a copy":
        cache = copy.deepcopy(cache)
    elif what == "a file":
        cache = loaded(cache, tmp_path)
    elif what == "new rows":
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
    for step in range(12):
        new = token_ids(3, 2, seed=20 + step)
        got, wanted = ask(MODEL, cache, new[rows], mask[rows]), ask(MODEL, expected, new, mask)[rows]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
        mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    assert cache.padding == [expected.padding[row] for row in rows]
    wrong = mask.clone()
    wrong[1, 65] = 1
    with pytest.raises(ValueError, match="for 1 of the columns 65 to 65"):
        ask(MODEL, cache, new[rows], wrong[rows])


def test_a_mask_of_the_new_tokens_leaves_the_past_as_it_is():
    cache, ids, mask = past_the_bound(MODEL)
    mask[0, 62:66] = 0
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    ask(MODEL, cache, token_ids(1, 2), mask)
    caches = [cache, copy.deepcopy(cache), copy.deepcopy(cache)]
    for step in range(30):
        new = token_ids(1, 2, seed=step)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = (mask.cumsum(-1) - 1)[:, -1:]
        given_masks = (mask, torch.ones_like(new), None)
        with torch.no_grad():
            first, *others = (
                MODEL(new, attention_mask=own_mask, position_ids=positions, past_key_values=own).logits
                for own, own_mask in zip(caches, given_masks, strict=True)
            )
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=1e-4)


def test_beams_go_on_behind_what_a_mask_hid():
    cache, ids, mask = past_the_bound(MODEL)
    ids, mask = (torch.cat([x, y], 1) for x, y in ((ids, token_ids(4, 2, seed=3)), (mask, torch.ones(2, 4).long())))
    mask[0, 60:67] = 0
    options = {"num_beams": 2, "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    alone = []
    for row in range(2):
        own = copy.deepcopy(cache)
        own.batch_select_indices(torch.tensor([row, row]))
        alone.append(MODEL.generate(
            ids[row : row + 1], attention_mask=mask[row : row + 1], past_key_values=own, **options
        ))  # fmt: skip
    cache.batch_repeat_interleave(2)
    assert torch.equal(MODEL.generate(ids, attention_mask=mask, past_key_values=cache, **options), torch.cat(alone))


def test_layers_with_a_sliding_window_see_the_same_mask():
    model, ids = make("gemma2"), token_ids(50, 2)
    cache, dynamic, mask = enable_adms_llm(model, **SMALL), DynamicCache(config=model.config), torch.ones(2, 20).long()
    for stop in range(20, 51, 10):
        mask = torch.nn.functional.pad(mask, (0, stop - mask.shape[1]), value=1)
        mask[1, stop - 14 : stop - 11] = 0
        new = ids[:, 0 if stop == 20 else stop - 10 : stop]
        assert torch.equal(*(ask(model, own, new, mask) for own in (cache, dynamic)))
    single = copy.deepcopy(cache)
    single.batch_select_indices(torch.tensor([1]))
    for step in range(20):
        mask = torch.nn.functional.pad(mask, (0, 2), value=1)
        mask[1, -5] = 0
        new = token_ids(2, 2, seed=step)
        torch.testing.assert_close(
            ask(model, cache, new, mask)[1:], ask(model, single, new[1:], mask[1:]), rtol=0, atol=1e-3
        )
    assert sum(held_counts(cache)[0]) == int(mask.sum())


def test_a_mask_of_ones_leaves_an_unpadded_cache_as_it_is():
    cache, ids, mask = past_the_bound(MODEL)
    ask(MODEL, cache, ids[:, -1:], torch.nn.functional.pad(mask, (0, 1), value=1))
    assert cache.padding == [] and not cache.stream.padded


@given(data=st.data(), rows=st.integers(1, 3), columns=st.integers(1, 60))
@settings(deadline=None, max_examples=50)
def test_a_mask_is_told_from_the_one_remembered(data, rows, columns):
    bits = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
    mask, other = (torch.tensor(data.draw(bits)).view(rows, columns) for _ in range(2))
    # As many ones a row, so that the counts tell nothing.
    other = data.draw(st.sampled_from([other, mask.flip(1), mask.roll(1, 1)]))
    cut = data.draw(st.integers(0, columns))
    padding = with_columns(with_columns([], 0, mask[:, :cut]), cut, mask[:, cut:])
    assert padding == with_columns([], 0, mask)
    same = mask_figures(other.long(), padding).tolist() == known_figures(padding, rows)
    assert same == torch.equal(mask, other)


@pytest.mark.parametrize("prompt", [8, 60])
def test_fillers_behind_a_row_that_ended_leave_no_trace_once_a_mask_hides_them(prompt):
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    ids, more = token_ids(prompt, 2), token_ids(6, 2, seed=5)
    mask = torch.ones(2, prompt, dtype=torch.long)
    cache = enable_adms_llm(MODEL, **SMALL)
    first = MODEL.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=14, stopping_criteria=[StopsAt(99, prompt + 3)],
        eos_token_id=999, **options,
    ).sequences  # fmt: skip
    assert not first[1, prompt + 3 :].any() and cache.get_seq_length() == prompt + 13
    mask = torch.cat([torch.ones_like(first), torch.ones_like(more)], 1)
    mask[1, prompt + 3 : prompt + 14] = 0
    again = {**options, "max_new_tokens": 60, "min_new_tokens": 60, "eos_token_id": 999}
    said = MODEL.generate(torch.cat([first, more], 1), attention_mask=mask, past_key_values=cache, **again)
    for row in range(2):
        text = torch.cat([first[row], more[row]])[mask[row].bool()][None]
        alone = enable_adms_llm(MODEL, **SMALL)
        stream(MODEL, text[:, :prompt], alone, prompt)
        stream(MODEL, text[:, prompt:-7], alone, 1)
        expected = MODEL.generate(text, attention_mask=torch.ones_like(text), past_key_values=alone, **again)
        got = torch.stack(said.logits)[:, row]
        torch.testing.assert_close(got, torch.stack(expected.logits)[:, 0], rtol=0, atol=1e-3)
