"""Texts that no longer begin with the tokens a cache has seen: it goes back where it can, and says so where it can't."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids
from test_generate import OLDEST, ROOMY, SMALL, assistant, loop, models, say
from transformers import DynamicCache

from streaming_llm import ADMSKVCache, enable_adms_llm
from streaming_llm.seen import UNKNOWN, WAITING, SeenTokens

ONES = (1,) * 7


@pytest.fixture(scope="module")
def llama():
    return models("llama")[1]


def roomy(model, **changed):
    return enable_adms_llm(model, **{**ROOMY, **changed})


def joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def other(tokens: int, batch: int = 1, seed: int = 9) -> torch.Tensor:
    return token_ids(tokens, batch, seed)


# -- one row -------------------------------------------------------------------------------------------------------------

# What becomes of a conversation of 20 tokens and 8 said: (text given next, tokens of it that need not be read again).
CHANGES = {
    "an edited answer": lambda said: (joined(said[:, :23], other(6)), 23),
    "an answer made again": lambda said: (said[:, :20], 19),
    "a shortened turn": lambda said: (joined(said[:, :20], said[:, 25:], other(3)), 20),
    "a shorter text": lambda said: (joined(said[:, :12], other(3)), 12),
    "a text as long as what was seen": lambda said: (joined(said[:, :26], other(1)), 26),
    "another of one token": lambda said: (said[:, :1], 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_generate_goes_on_from_where_a_changed_text_parts_from_what_was_seen(llama, change):
    cache = roomy(llama)
    said = say(llama, token_ids(20), cache)["sequences"][0]
    text, kept = CHANGES[change](said)
    got = say(llama, text, cache)
    fresh, read = roomy(llama), []
    pieces = (20, *(1,) * (kept - 20)) if kept > 20 else ((20,) if kept else ())
    if kept:
        loop(llama, fresh, said, *pieces)
        fresh.crop(-(fresh.get_seq_length() - kept)) if kept < 20 else None
    read = loop(llama, fresh, got["sequences"][0][:, kept:], text.shape[1] - kept, *ONES)
    assert all(torch.equal(one, another) for one, another in zip(got["logits"], read, strict=True))
    plain = say(llama, text, DynamicCache(config=llama.config))
    assert torch.equal(got["sequences"][0], plain["sequences"][0])
    torch.testing.assert_close(got["logits"], plain["logits"], atol=1e-5, rtol=1e-5)


MODES = {
    "in chunks": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True},
    "assisted": {"assistant": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_a_changed_text_gives_in_every_mode_what_a_new_cache_gives(name, mode):
    model, options = models(name)[1], dict(MODES[mode])
    if options.pop("assistant", None):
        options["assistant_model"] = assistant(name)
    if OLDEST and name == "gemma2":
        pytest.skip("sliding layers can't be cropped there")
    cache, beams = roomy(model), {"num_beams": options.get("num_beams", 1)}
    said = say(model, token_ids(12), cache, new=3, **beams)["sequences"][0]
    # The second text brings fewer tokens than were seen, the third none at all.
    for text in (joined(said[:, :13], other(7)), joined(said[:, :10], other(4)), said[:, :10]):
        got = say(model, text, cache, new=4, **options)
        if OLDEST:  # generate gives every chunk the positions of the last there
            options.pop("prefill_chunk_size", None)
        expected = say(model, text, DynamicCache(config=model.config), new=4, **options)
        assert torch.equal(got["sequences"][0], expected["sequences"][0])


def test_a_text_of_new_tokens_only_goes_on_as_before(llama):
    if OLDEST:
        pytest.skip("generate takes whole texts only there")
    cache = roomy(llama)
    said = say(llama, token_ids(12), cache, new=4)["sequences"][0]
    for chunked in ({}, {"prefill_chunk_size": 2}):
        own = copy.deepcopy(cache)
        text = joined(said[:, 15:], other(4))
        got = say(llama, text, own, mask=torch.ones(1, 19 + 1), new=4, **chunked)
        assert own.get_seq_length() == 20 + 3 and torch.equal(got["sequences"][0][:, :5], text)


def test_past_the_bound_a_text_goes_back_within_the_recent_window(llama):
    cache = enable_adms_llm(llama, **SMALL)
    ids = token_ids(70)
    stream(llama, ids[:, :64], cache, 8)
    before = copy.deepcopy(cache)
    stream(llama, ids[:, 64:], cache, 1)
    text = joined(ids[:, :64], other(4))
    got = say(llama, text, cache)
    expected = loop(llama, before, got["sequences"][0][:, 64:], 4, *ONES)
    torch.testing.assert_close(got["logits"], expected, atol=1e-5, rtol=1e-5)


def test_past_the_bound_a_text_that_parts_too_early_is_refused_in_one_sentence_and_nothing_changes(llama):
    cache = enable_adms_llm(llama, **SMALL)
    ids = token_ids(70)
    stream(llama, ids, cache, 8)
    text = joined(ids[:, :9], other(70))
    logits = loop(llama, copy.deepcopy(cache), other(2), 2)
    words = rf"conversation of 70.*differs from token 9 of row 0 on: seen {ids[0, 9]}, given {text[0, 9]}.*reset.*deepcopy"
    for options in ({}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=words):
            say(llama, text, cache, **options)
    for given in (text, ids[:, :9], ids[:, :1]):
        with pytest.raises(ValueError, match="are held one by one"):
            cache.rewind_to(given)
    assert cache.get_seq_length() == 70
    assert torch.equal(loop(llama, cache, other(2), 2)[0], logits[0])


def test_a_text_with_nothing_in_common_is_refused(llama):
    cache = roomy(llama)
    say(llama, token_ids(20), cache)
    with pytest.raises(ValueError, match=r"differs from token 0 .* no beginning in common .*reset"):
        say(llama, other(40), cache)
    assert cache.get_seq_length() == 27


def test_going_back_is_told_once(llama, caplog):
    cache = roomy(llama)
    said = say(llama, token_ids(20), cache)["sequences"][0]
    caplog.clear()
    with caplog.at_level(logging.INFO, "streaming_llm"):
        say(llama, said, cache)
        assert not caplog.records
        for seed in (1, 2):
            say(llama, joined(said[:, :25], other(2, seed=seed)), cache)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "differs from token 25 of row 0" in caplog.text


# -- a cell run twice, a document asked twice, another model -------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}])
def test_a_cell_that_is_run_twice_says_the_same(llama, options):
    cache = roomy(llama)
    first, second = (say(llama, token_ids(20), cache, **options)["sequences"][0] for _ in range(2))
    assert torch.equal(first, second) and cache.get_seq_length() == 27


def test_a_cell_that_is_run_twice_past_the_bound_says_that_the_cache_holds_a_conversation(llama):
    cache = enable_adms_llm(llama, **SMALL)
    text = token_ids(40)
    say(llama, text, cache, new=20)
    for options in ({}, {"prefill_chunk_size": 4}):
        with pytest.raises(ValueError, match=r"holds a conversation of 59.*ends after token 39.*reset.*new cache.*deepcopy"):
            say(llama, text, cache, **options)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}])
def test_a_second_question_about_a_document_is_read_behind_the_document(llama, options):
    document, questions = token_ids(24), [other(4, seed=seed) for seed in (1, 2)]
    cache = roomy(llama)
    for question in questions:
        text = joined(document, question)
        got = say(llama, text, cache, **options)["sequences"][0]
        assert torch.equal(got, say(llama, text, DynamicCache(config=llama.config))["sequences"][0])


def test_a_conversation_another_model_has_read_is_refused():
    one, another = make_tiny_llama(), make_tiny_llama()
    cache = enable_adms_llm(one, **ROOMY)
    enable_adms_llm(another, **ROOMY)
    stream(one, token_ids(10), cache, 10)
    for own in (cache, copy.deepcopy(cache)):
        for text in (token_ids(10), token_ids(14)):
            with pytest.raises(ValueError, match="conversation of .* that another model has read.*reset"):
                another.generate(text, past_key_values=own, max_new_tokens=2)
        own.reset()
        assert another.generate(token_ids(10), past_key_values=own, max_new_tokens=2).shape[1] <= 12


# -- rows ----------------------------------------------------------------------------------------------------------------


def left_padded(*rows: torch.Tensor, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[tokens]` of any length as one batch, with `more` columns of padding than needed."""
    width = max(len(row) for row in rows) + more
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return ids, torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])


def real_tokens(cache) -> list[list[int]]:
    hidden = [{column for first, last in stretches for column in range(first, last)} for stretches in cache.padding]
    rows = enumerate(cache.seen_tokens.whole().tolist())
    return [[token for column, token in enumerate(row) if column not in hidden[number]] for number, row in rows]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("lengths", [(3, 8), (8, 3), (5, 5)])
@pytest.mark.parametrize("edit", [0, 2])
def test_rows_tokenised_anew_with_other_padding_go_on_as_in_a_new_cache(name, lengths, edit):
    model = models(name)[1]
    rows = [token_ids(6)[0], token_ids(11, seed=1)[0]]
    ids, mask = left_padded(*rows)
    cache = roomy(model)
    said = say(model, ids, cache, mask, new=5)["sequences"][0][:, ids.shape[1] :]
    rows = [torch.cat([row, own]) for row, own in zip(rows, said, strict=True)]
    rows[0] = rows[0][: len(rows[0]) - edit]
    rows = [torch.cat([row, other(n, seed=n)[0]]) for row, n in zip(rows, lengths, strict=True)]
    ids, mask = left_padded(*rows, more=2)
    got = say(model, ids, cache, mask, new=5)
    expected = say(model, ids, DynamicCache(config=model.config), mask, new=5)
    torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-4, rtol=1e-4)
    assert torch.equal(got["sequences"][0], expected["sequences"][0])
    whole = [
        [*row.tolist(), *own[:-1].tolist()] for row, own in zip(rows, got["sequences"][0][:, ids.shape[1] :], strict=True)
    ]
    assert real_tokens(cache) == whole
    # And once more, from what was padded in its middle.
    rows = [torch.cat([torch.tensor(row), other(2, seed=3)[0]]) for row in whole]
    ids, mask = left_padded(*rows)
    got, expected = (say(model, ids, own, mask, new=3) for own in (cache, DynamicCache(config=model.config)))
    torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-4, rtol=1e-4)


def test_all_rows_go_back_by_what_one_of_them_needs(llama):
    cache, ids = roomy(llama), token_ids(20, 3)
    stream(llama, ids, cache, 20)
    text = joined(ids, other(4, 3))
    text[1, 15] = ids[1, 15] - 1
    rest, mask = cache.rewind_to(text)
    assert mask is None and torch.equal(rest, text[:, 15:]) and cache.get_seq_length() == 15
    got = stream(llama, rest, cache, 9)
    expected = roomy(llama)
    stream(llama, text[:, :15], expected, 15)
    torch.testing.assert_close(got, stream(llama, text[:, 15:], expected, 9), atol=1e-5, rtol=1e-5)


def test_fillers_behind_a_row_that_had_ended_are_taken_back(llama):
    rows, cache = [token_ids(6)[0], token_ids(9, seed=1)[0]], roomy(llama)
    ids, mask = left_padded(*rows)
    end = int(say(llama, ids, copy.deepcopy(cache), mask)["sequences"][0][0, 11])
    said = say(llama, ids, cache, mask, eos_token_id=end, new=8)["sequences"][0][:, 9:]
    assert (said[0, 3:] == 0).all()
    rows = [torch.cat([rows[0], said[0, :3], other(5)[0]]), torch.cat([rows[1], said[1], other(2)[0]])]
    ids, mask = left_padded(*rows)
    got, expected = (say(llama, ids, own, mask) for own in (cache, DynamicCache(config=llama.config)))
    torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("edit", [0, 1, 3])
def test_every_row_of_a_beam_search_goes_back_to_its_own_beginning(llama, edit):
    cache = roomy(llama)
    said = say(llama, token_ids(12), cache, num_beams=3, new=6)["sequences"][0]
    text = joined(said[:, : said.shape[1] - edit], other(3))
    got, expected = (say(llama, text, own, num_beams=3) for own in (cache, DynamicCache(config=llama.config)))
    assert torch.equal(got["sequences"][0], expected["sequences"][0])


def test_rows_that_are_not_as_many_as_were_seen_are_refused(llama):
    cache = roomy(llama)
    stream(llama, token_ids(10, 2), cache, 10)
    with pytest.raises(ValueError, match=r"of 1 rows do not fit the cache, which holds a conversation of 2"):
        cache.rewind_to(token_ids(12))


# -- plain forwards ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_plain_forwards_go_on_with_what_is_to_be_read(llama):
    cache, ids = roomy(llama), token_ids(20)
    stream(llama, ids, cache, 20)
    texts = [joined(ids, other(4)), ids[:, :8], joined(ids[:, :5], other(9)), joined(ids[:, :5], other(9))]
    for text, kept in zip(texts, (20, 7, 5, 13), strict=True):
        rest, mask = cache.rewind_to(text)
        assert torch.equal(rest, text[:, kept:]) and mask is None
        logits = llama(rest, past_key_values=cache).logits
        torch.testing.assert_close(logits, llama(text).logits[:, kept:], atol=1e-5, rtol=1e-5)
    new = roomy(llama)
    assert new.rewind_to(ids)[0] is ids


@pytest.mark.parametrize("given", [torch.zeros(1, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)])
def test_what_is_no_whole_text_is_refused(llama, given):
    with pytest.raises(ValueError, match=r"must both be \[batch, tokens\]"):
        roomy(llama).rewind_to(given)
    with pytest.raises(ValueError, match=r"must both be \[batch, tokens\]"):
        roomy(llama).rewind_to(token_ids(4), torch.ones(1, 5))


@torch.no_grad()
def test_tokens_that_came_as_embeddings_equal_any(llama):
    cache, ids = roomy(llama), token_ids(20)
    embed = llama.get_input_embeddings()
    llama(inputs_embeds=embed(ids[:, :12]), past_key_values=cache)
    llama(ids[:, 12:], past_key_values=cache)
    assert cache.seen_tokens.whole().tolist() == [[UNKNOWN] * 12 + ids[0, 12:].tolist()]
    assert cache.rewind_to(joined(other(12), ids[:, 12:], other(3)))[0].shape[1] == 3
    assert cache.rewind_to(joined(other(12), ids[:, 12:15], other(3)))[0].shape[1] == 3
    assert cache.get_seq_length() == 15
    text = embed(ids[:, :12])
    with pytest.raises(
        ValueError, match="inputs_embeds of 12 tokens bring nothing new: this cache holds a conversation of 15"
    ):
        say(llama, None, cache, inputs_embeds=text, attention_mask=torch.ones(1, 12))


@torch.no_grad()
def test_tokens_no_hook_told_of_are_unknown(llama):
    cache, ids = roomy(llama), token_ids(12)
    stream(llama, ids[:, :5], cache, 5)
    states = torch.zeros(1, 2, 3, llama.config.hidden_size // llama.config.num_attention_heads)
    cache.begin_forward(None, None, 3, 1, states.device)
    for number, layer in enumerate(cache.layers):
        cache.update(states, states, number)
        layer.observe(states, 1.0)
    cache.end_forward()
    llama(ids[:, 8:10], past_key_values=cache)
    assert cache.seen_tokens.whole().tolist() == [[*ids[0, :5].tolist(), *[UNKNOWN] * 3, *ids[0, 8:10].tolist()]]
    cache.stream.crop(1)
    assert cache.rewind_to(ids)[0].shape[1] == 3


# -- what is kept --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_ids_follow_every_change_of_columns_and_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    seen, plain = SeenTokens(), torch.zeros(3, 0, dtype=torch.int32)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    for _ in range(400):
        what = draw(8)
        if what < 5:
            new = torch.randint(100, (plain.shape[0], 1 + (draw(90) if what == 4 else draw(3))), generator=generator).int()
            seen.append(new, plain.shape[1])
            plain = joined(plain, new)
        elif what == 5:
            gone = min(draw(9), plain.shape[1])
            seen.remove(gone)
            plain = plain[:, : plain.shape[1] - gone]
        elif what == 6 and plain.shape[1]:
            rows = torch.randint(plain.shape[0], (2 + draw(3),), generator=generator)
            seen.pick(rows)
            plain = plain[rows]
        elif what == 7:
            seen, old = copy.deepcopy(seen), seen
            old.append(plain[:, :0].new_ones(plain.shape[0], 2), plain.shape[1])
        assert seen.length == plain.shape[1] and len(seen.waiting) < WAITING
        if draw(20) == 0:
            assert torch.equal(seen.whole(), plain)
    assert torch.equal(seen.whole(), plain) and seen.whole().dtype == torch.int32


def test_ids_on_the_device_do_not_grow_with_the_stream(llama):
    cache, counts = enable_adms_llm(llama, **SMALL), set()
    stream(llama, token_ids(100), cache, 100)
    for start in range(0, 200, 2):
        given = token_ids(1000)[:, start : start + 2]
        stream(llama, given, cache, 2)
        assert all(entry.untyped_storage().nbytes() == 8 for entry in cache.seen_tokens.waiting)
        counts.add(len(cache.seen_tokens.waiting))
    assert max(counts) == WAITING - 1 and cache.seen_tokens.length == 300


@pytest.mark.parametrize("new", [1, 5, 64, 100])
def test_ids_on_the_host_are_few_tensors_that_grow_with_the_logarithm_of_the_stream(new):
    seen, ids = SeenTokens(), token_ids(6000).int()
    for start in range(0, 6000, new):
        seen.append(ids[:, start : start + new], start)
        assert len(seen.chunks) <= max(1, start // WAITING).bit_length()
        if start % 1000 == 0 and start:
            seen.remove(3)
            seen.append(ids[:, start + new - 3 : start + new], start + new - 3)
    twin = copy.deepcopy(seen)
    assert all(own is other for own, other in zip(seen.chunks, twin.chunks, strict=True))
    assert torch.equal(twin.whole(), ids)


def test_rows_of_the_cache_that_move_take_their_ids_along(llama):
    cache, ids = roomy(llama), token_ids(10, 2)
    stream(llama, ids, cache, 10)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
    assert torch.equal(cache.seen_tokens.whole(), ids[[1, 0, 0, 1]].int())
    cache.batch_select_indices(torch.tensor([0, 2]))
    stream(llama, ids[:, :1], cache, 1)
    assert torch.equal(cache.seen_tokens.whole(), joined(ids[[1, 0]], ids[:, :1]).int())
    cache.crop(-3)
    assert torch.equal(cache.seen_tokens.whole(), ids[[1, 0], :8].int())
    cache.reset()
    assert cache.seen_tokens.whole().shape[1] == 0


def test_a_failed_pass_leaves_the_ids(llama):
    cache, ids = roomy(llama), token_ids(10)
    stream(llama, ids, cache, 10)

    def fail(*_):
        raise KeyboardInterrupt

    handle = llama.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        stream(llama, other(3), cache, 3)
    handle.remove()
    got, fresh = say(llama, joined(ids, other(2)), cache), roomy(llama)
    assert cache.seen_tokens.whole()[0, :12].tolist() == [*ids[0].tolist(), *other(2)[0].tolist()]
    expected = loop(llama, fresh, got["sequences"][0], 10, 2, *ONES)[1:]
    assert all(torch.equal(one, another) for one, another in zip(got["logits"], expected, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_saved_conversation_keeps_the_ids(llama, batch, tmp_path):
    cache, ids = roomy(llama), token_ids(14, batch)
    mask = torch.ones_like(ids)
    mask[0, : 3 * (batch - 1)] = 0
    say(llama, ids, cache, mask, new=3)
    cache.save(tmp_path / "talk.adms")
    loaded = ADMSKVCache.load(tmp_path / "talk.adms", llama)
    assert torch.equal(loaded.seen_tokens.whole(), cache.seen_tokens.whole()) and loaded.seen_tokens.length == 16
    text = joined(ids, other(4, batch))
    masks = torch.cat([mask, torch.ones(batch, 4, dtype=torch.long)], dim=1)
    one, another = (say(llama, text, own, masks) for own in (cache, loaded))
    assert all(torch.equal(a, b) for a, b in zip(one["logits"], another["logits"], strict=True))
