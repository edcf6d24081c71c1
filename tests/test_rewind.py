"""Going back as far as the archive reaches: what was taken back has never been, in the cache and in a conversation."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import make_tiny_llama, padded_passes, stream, token_ids
from test_archive import EVERYTHING, KINDS, PLUS, SIZES, full
from test_chat import arguments, chat_folder, program, run_script, talk  # noqa: F401

from streaming_llm import ADMSKVCache, enable_adms_llm


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("chunk,gone", [(1, 120), (7, 30), (7, 198), (40, 100)])
def test_what_recalls_all_that_left_and_goes_back_is_the_full_cache_of_what_is_left(settings, chunk, gone):
    model, ids, more = make_tiny_llama(), token_ids(200), token_ids(120, seed=1)
    cache = enable_adms_llm(model, **settings | EVERYTHING)
    stream(model, ids, cache, chunk)
    assert cache.stream.exact_lengths()[0] < gone
    cache.crop(-gone)
    assert cache.get_seq_length() == cache.seen_tokens.length == 200 - gone
    logits = stream(model, more, cache, chunk)
    wanted = full(model, torch.cat([ids[:, : 200 - gone], more], dim=1), chunk)[:, 200 - gone :]
    torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("settings", [SIZES, PLUS], ids=["base", "all four"])
def test_it_can_go_back_again_and_again(settings):
    model, told = make_tiny_llama(), token_ids(150)
    cache = enable_adms_llm(model, **settings | EVERYTHING)
    stream(model, told, cache, 9)
    for seed, gone in enumerate((100, 20, 70, 45, 110), start=1):
        cache.crop(-gone)
        more = token_ids(65, seed=seed)
        told = torch.cat([told[:, : told.shape[1] - gone], more], dim=1)
        logits = stream(model, more, cache, 9)
        torch.testing.assert_close(logits, full(model, told, 9)[:, -65:], atol=2e-4, rtol=0)


@pytest.mark.parametrize("settings", [SIZES, PLUS], ids=["base", "all four"])
def test_bounds_hold_and_nothing_later_is_left_after_going_back(settings):
    model = make_tiny_llama()
    cache = enable_adms_llm(model, **settings | {"recall_tokens": 60, "recall_budget": 6, "recall_chunk_budget": 10})
    reach = []
    stream(model, token_ids(180), cache, 5)
    for gone, seed in ((50, 1), (30, 2), (70, 3)):
        reach.append(cache.held_one_by_one)
        cache.crop(-gone)
        seen = cache.get_seq_length()
        for stack in cache.stream.stacks:
            tokens, archive = stack.attended(), stack.archive
            assert (tokens.pos.masked_fill(~tokens.valid, 0) < seen).all() and tokens.beta.masked_fill(
                ~tokens.valid, 0
            ).isfinite().all()
            assert (archive.shelves.pos[:, None].expand(archive.links.open.shape)[archive.links.open] < seen).all()
            assert (tokens.count * tokens.valid).sum(-1).max() <= seen
            if stack.memory.originals is not None:
                assert (stack.memory.originals.pos[stack.memory.originals.valid] < seen).all()
        for token in token_ids(40, seed=seed).split(1, dim=1):
            assert stream(model, token, cache, 1).isfinite().all()
            assert cache.held_tokens <= cache.config.expected_max_tokens
            assert cache.stats["archived_tokens"] <= 60 * 2 * model.config.num_hidden_layers
            assert (cache.recalled(0, 1)[0] < cache.get_seq_length() - 16).all()
    # What came in place of the tokens taken back has overwritten what was older than the cap.
    assert reach[0] >= 60 + 16 and all(16 <= own <= 60 + 24 for own in reach)


def test_shares_add_up_however_long_the_stream():
    """Roundings of hundreds of compactions, under a large log-mass, were once as large as what was to be recalled."""
    model, ids = make_tiny_llama(), token_ids(400, seed=2)
    logits = stream(model, ids, enable_adms_llm(model, **KINDS["grid anchors"] | EVERYTHING), 7)
    torch.testing.assert_close(logits, full(model, ids, 7), atol=2e-4, rtol=0)


@pytest.mark.parametrize("settings", [SIZES, PLUS], ids=["base", "all four"])
def test_rows_of_different_length_go_back_as_each_alone(settings):
    model = make_tiny_llama()
    lengths = [[10, 30, 75], *[[1, 1, 1]] * 30, [25, 2, 40], [40, 70, 30]]
    rows = [token_ids(sum(own), seed=seed) for seed, own in enumerate(zip(*lengths, strict=True))]
    cache, more = enable_adms_llm(model, **settings | EVERYTHING), token_ids(60, batch=3, seed=9)
    for _ in padded_passes(model, rows, lengths, cache):
        pass
    cache.crop(-28)
    logits = stream(model, more, cache, 6)
    for row, ids in enumerate(rows):
        told = torch.cat([ids[:, :-28], more[row : row + 1]], dim=1)
        torch.testing.assert_close(logits[row : row + 1], full(model, told, 6)[:, -60:], atol=2e-4, rtol=0)


def test_past_the_trained_length_it_goes_back_to_where_positions_fit():
    from streaming_llm.evaluation.soak import tiny_model

    model = tiny_model(128, vocab_size=128)
    ids = token_ids(400)
    cache = enable_adms_llm(model, **SIZES | EVERYTHING)
    stream(model, ids, cache, 1)
    assert cache.window.offsets[0] > 250
    cache.crop(-340)
    assert cache.window.offsets == [0]
    logits = stream(model, token_ids(40, seed=1), cache, 1)
    told = torch.cat([ids[:, :60], token_ids(40, seed=1)], dim=1)
    torch.testing.assert_close(logits, full(model, told, 1)[:, -40:], atol=2e-4, rtol=0)
    stream(model, token_ids(300, seed=2), cache, 1)
    assert cache.window.offsets[0] > 200
    cache.crop(-150)
    assert cache.window.following == [250] and cache.window.offsets[0] > 100
    assert stream(model, token_ids(200, seed=3), cache, 5).isfinite().all()


@pytest.mark.parametrize("settings", [SIZES, PLUS], ids=["base", "all four"])
def test_what_reaches_too_far_is_refused_and_changes_nothing(settings):
    model, ids = make_tiny_llama(), token_ids(200)
    cache = enable_adms_llm(model, **settings | {"recall_tokens": 40, "recall_budget": 6})
    stream(model, ids[:, :150], cache, 1)
    held, other = cache.held_one_by_one, copy.deepcopy(cache)
    assert held == 40 + cache.stream.exact_lengths()[0]
    for gone in (held + 1, 149):
        with pytest.raises(ValueError, match=rf"crop\(-{gone}\) asks for more than the last {held} tokens"):
            cache.crop(-gone)
    with pytest.raises(ValueError, match=f"the last {held} are held one by one or archived"):
        cache.rewind_to(torch.cat([ids[:, :60], ids[:, :1] + 1], dim=1))
    assert torch.equal(stream(model, ids[:, 150:], cache, 1), stream(model, ids[:, 150:], other, 1))
    other.crop(-other.held_one_by_one)
    assert other.stats["archived_tokens"] == 0
    assert stream(model, ids[:, :60], other, 3).isfinite().all()


def test_sinks_and_padding_are_not_reached():
    model = make_tiny_llama()
    cache = enable_adms_llm(model, **SIZES | EVERYTHING)
    stream(model, token_ids(90), cache, 1)
    assert cache.held_one_by_one == 90 - 2
    with pytest.raises(ValueError, match="asks for more than the last 88 tokens"):
        cache.crop(-89)
    cache = enable_adms_llm(model, **SIZES | EVERYTHING)
    rows = [token_ids(80), token_ids(100, seed=1)]
    for _ in padded_passes(model, rows, [[60, 80], [20, 20]], cache):
        pass
    assert cache.held_one_by_one == 80 - 2
    with pytest.raises(ValueError, match="crop\\(-81\\) reaches back to padding: of this batch only the last 80"):
        cache.crop(-81)


@pytest.mark.parametrize("settings", [SIZES, PLUS], ids=["base", "all four"])
def test_a_crop_that_fails_changes_nothing(settings, monkeypatch):
    model, ids = make_tiny_llama(), token_ids(200)
    cache = enable_adms_llm(model, **settings | {"recall_budget": 6})
    stream(model, ids[:, :150], cache, 1)
    other = copy.deepcopy(cache)
    monkeypatch.setattr("streaming_llm.stream.rewind.cropped", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        cache.crop(-100)
    monkeypatch.undo()
    assert cache.get_seq_length() == 150 and cache.seen_tokens.length == 150
    assert torch.equal(stream(model, ids[:, 150:], cache, 1), stream(model, ids[:, 150:], other, 1))


def test_what_a_snapshot_holds_is_not_changed_by_going_back():
    model, ids = make_tiny_llama(), token_ids(300)
    cache = enable_adms_llm(model, **PLUS | {"recall_budget": 6})
    stream(model, ids[:, :150], cache, 1)
    other, before = copy.deepcopy(cache), cache.stream.stacks
    cache.crop(-100)
    after, cache.stream.stacks = cache.stream.stacks, before
    for stack, own, kept in zip(before, other.stream.stacks, after, strict=True):
        assert all(torch.equal(getattr(own.tokens, name), new) for name, new in stack.tokens.tensors().items())
        assert all(torch.equal(getattr(own.archive.links, name), new) for name, new in stack.archive.links.tensors().items())
        assert torch.equal(own.memory.originals.order, stack.memory.originals.order)
        assert kept.rows[0].archived < own.rows[0].archived


@pytest.mark.parametrize("way", ["deepcopy", "save", "beams"])
def test_a_cache_that_went_back_can_be_copied_and_saved(way, tmp_path):
    model, ids = make_tiny_llama(), token_ids(140)
    cache = enable_adms_llm(model, **PLUS | {"recall_tokens": 64, "recall_budget": 6})
    stream(model, ids, cache, 1)
    cache.crop(-50)
    if way == "save":
        cache.save(tmp_path / "chat.adms")
        other = ADMSKVCache.load(tmp_path / "chat.adms", model)
    else:
        other = copy.deepcopy(cache)
    if way == "beams":
        other.batch_repeat_interleave(2)
        other.batch_select_indices(torch.tensor([1]))
    assert torch.equal(stream(model, ids, cache, 1), stream(model, ids, other, 1))
    assert other.stats == cache.stats


def test_a_text_that_was_changed_far_back_is_read_from_there():
    model, ids = make_tiny_llama(), token_ids(200)
    cache = enable_adms_llm(model, **PLUS | EVERYTHING)
    stream(model, ids, cache, 8)
    text = torch.cat([ids[:, :50], token_ids(60, seed=5)], dim=1)
    said = model.generate(text, past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert torch.equal(said, model.generate(text, max_new_tokens=8, do_sample=False, eos_token_id=-1))
    assert cache.get_seq_length() == 50 + 60 + 7


# -- a conversation ------------------------------------------------------------------------------------------------------

RECALLS = {"enable_recall": True, "recall_rank": 8, "recall_budget": 4096, "recall_chunk_budget": 4096}
SAID = ["Hello there, how are you?", "What is the river called?", "And where does it rise?", "How long is it, then?"]


def test_an_early_turn_said_otherwise_is_a_new_conversation_told_so(talk):  # noqa: F811
    here = talk(cache=RECALLS, max_new_tokens=12, system="Be brief.")
    for text in SAID:
        here.say(text)
    assert here.chat.turns == dict(enumerate(SAID))
    assert here.chat.cache.get_seq_length() > 2 * here.chat.cache.stream.exact_lengths()[0]
    for turn, text in ((1, "What is the mountain called?"), (0, "Good evening."), (-1, "Well?")):
        answer = "".join(here.chat.edit(turn, text))
        new = talk(cache=RECALLS, max_new_tokens=12, system="Be brief.")
        turns = list(here.chat.turns.values())
        answers = [new.say(told) for told in turns]
        assert turns[-1] == text and answer == answers[-1]
        assert new.chat.cache.seen_tokens.whole().tolist() == here.chat.cache.seen_tokens.whole().tolist()
        assert here.say("Go on.") == new.say("Go on.")
        here.say("And on.")


def test_an_answer_made_again_is_that_of_the_next_seed(talk):  # noqa: F811
    here = talk(cache=RECALLS, max_new_tokens=12, temperature=1.0)
    answers = [here.say(text) for text in SAID]
    again = "".join(here.chat.regenerate(1))
    assert here.chat.turns == dict(enumerate(SAID[:2])) and again != answers[1]
    here.chat.seed = -1
    assert "".join(here.chat.regenerate()) == answers[1]


def test_a_turn_after_one_that_was_cut_is_said_otherwise_with_what_was_owed(talk):  # noqa: F811
    here, new = talk(cache=RECALLS, max_new_tokens=4), talk(cache=RECALLS, max_new_tokens=4)
    for own in (here, new):
        own.say("Hello")
        own.chat.stop()
        assert own.say("A turn that nobody reads") == ""
        pieces = own.chat.say("A turn that is stopped while the model reads it, it is so long")
        own.model.register_forward_hook(lambda *_, chat=own.chat: chat.stop() if len(chat.turns) == 2 else None)
        assert "".join(pieces) == ""
    assert here.chat.turns[1] == "A turn that is stopped while the model reads it, it is so long"
    owed = list(here.chat._owed)
    here.say("What?")
    assert "".join(here.chat.edit(-1, "So?")) == new.say("So?")
    assert owed and here.chat.cache.seen_tokens.whole().tolist() == new.chat.cache.seen_tokens.whole().tolist()


def test_a_turn_too_far_back_is_refused_and_the_conversation_goes_on(talk):  # noqa: F811
    here, new = (talk(cache={"enable_recall": False}, max_new_tokens=12) for _ in range(2))
    for text in SAID:
        assert here.say(text) == new.say(text)
    for turn in (1, -1, 4, -5):
        with pytest.raises(ValueError, match=f"turn={turn} can't be said otherwise: of 4 turns the cache can go back to 0"):
            here.chat.edit(turn, "No.")
        with pytest.raises(ValueError, match=f"turn={turn} can't"):
            here.chat.regenerate(turn)
    assert here.chat.turns == {0: SAID[0]} and here.chat.seed == new.chat.seed
    assert here.say("Go on.") == new.say("Go on.")


def test_what_was_recalled_is_shown_as_text(talk):  # noqa: F811
    here = talk(cache=RECALLS | {"recall_budget": 4}, max_new_tokens=12)
    here.say(SAID[0])
    assert here.chat.recalled() == []
    for text in SAID[1:]:
        here.say(text)
    found, whole = here.chat.recalled(most=3), here.tokenizer.decode(here.chat.cache.seen_tokens.whole()[0])
    assert 0 < len(found) <= 3 and all(text in whole for _, text in found)
    weights = [weight for weight, _ in found]
    assert weights == sorted(weights, reverse=True) and 0 < sum(weights) < 1
    every = here.chat.cache.recalled_passages(most=999)
    cache = here.chat.cache
    heads = [cache.recalled(layer, head)[1].sum() for layer in range(len(cache.layers)) for head in range(2)]
    assert sum(weight for weight, _, _ in every) == pytest.approx(float(sum(heads)) / len(heads), rel=1e-4)
    assert all(last - first <= 12 for _, first, last in every)


def test_the_script_says_turns_otherwise_and_shows_what_was_recalled(run_script, talk, capsys):  # noqa: F811
    options = [f"--{name}={value}" for name, value in RECALLS.items() if name != "enable_recall"] + ["--enable_recall"]
    assert run_script("/recall", *SAID, "/edit 2 No, wait.", "/again 1", "/again", "Go on.", "/recall", options=options) == 0
    printed = capsys.readouterr().out
    here = talk(cache=RECALLS, max_new_tokens=8)
    first, *_ = [here.say(text) for text in SAID]
    edited = "".join(here.chat.edit(1, "No, wait."))
    cut = "\n(cut: max_new_tokens)\n"
    assert printed.startswith("> /recall\nnothing was recalled")
    assert f"> /edit 2 No, wait.\n{edited}{cut}> /again 1\n{first}{cut}> /again\n{first}{cut}> Go on.\n" in printed
    last = printed.partition("Go on.")[2].partition("> /recall\n")[2].splitlines()
    assert last and all(re.match(r" *\d+\.\d\d%  \.\.\.", line) for line in last)


@pytest.mark.parametrize("line", ["/edit", "/edit 1", "/edit one No.", "/edit 2 No.", "/again 0", "/again -2"])
def test_a_turn_there_is_not_is_told_in_one_line(run_script, capsys, line):  # noqa: F811
    assert run_script("Hello", line) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and f"{line}: it needs the number of a turn" in output.err
    assert "the cache can go back to: 1\n" in output.err
