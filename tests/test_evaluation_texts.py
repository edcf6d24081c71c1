"""Reading texts: the shipped novel, files and data sets, and how samples become streams."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from types import SimpleNamespace

import pytest

from streaming_llm.evaluation import EvaluationError, load_text, shipped_text, texts


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 128 for letter in text]}


def read(streams):
    return ["".join(map(chr, stream.tolist())) for stream in streams]


class LettersBehindBos(Letters):
    """The same with `^` before every text."""

    bos_token_id = ord("^")

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = super().__call__(text, False)["input_ids"]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


class NamedOnly(Letters):
    """One that knows a `bos_token_id` and puts it before nothing."""

    bos_token_id = ord("^")

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return super().__call__(text, False)


@pytest.fixture
def rows(monkeypatch):
    """A stand-in for the `datasets` library that gives these rows and keeps what it was asked for."""
    asked = {}

    def load_dataset(*arguments, **options):
        asked.update(arguments=arguments, options=options)
        return found

    found = [{"id": 1, "text": text} for text in ("", "abcdef", "gh", "ijklmnop", "qrs")]
    fake = SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return SimpleNamespace(found=found, asked=asked)


def test_the_shipped_text_is_the_novel_from_its_first_line():
    text = shipped_text()
    assert text.startswith("PRIDE AND PREJUDICE\n\nBy Jane Austen\n")
    assert "It is a truth universally acknowledged" in text[:200]
    assert len(text) == 684_768
    # What published figures were measured on is its beginning.
    assert (
        hashlib.sha256(text[:231_267].encode()).hexdigest()
        == "801176734df97a0bae43c7b75a4a1e250bbd2f935ec8fc0f8cd06a286831b99c"
    )


def test_the_shipped_text_is_the_default_and_long_enough(smol):
    _, tokenizer = smol
    text = load_text(tokenizer, num_eval_tokens=65_536)
    assert text.name == "pride_and_prejudice"
    assert text.total_tokens == 65_536
    # The first tokens are what published figures depend on: reading less of the text must not change them.
    assert load_text(tokenizer, num_eval_tokens=6144).streams[0].equal(text.streams[0][:6144])


def test_a_real_tokenizer_gives_the_text_back(smol):
    _, tokenizer = smol
    text = shipped_text()[:5000] + "  naïve — “quoted” ½ 日本\n\n\t1,813"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer(text)["input_ids"] == ids
    assert len(tokenizer) == 49152


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.txt.gz"])
def test_a_local_file_is_one_sample(tmp_path, name):
    content = "naïve text".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    text = load_text(Letters(), str(tmp_path / name), num_eval_tokens=5)
    assert (text.name, text.samples, text.total_tokens) == (name, 1, 5)
    assert read(text.streams)[0][:2] == "na"


def test_what_can_not_be_read_is_refused_with_its_reason(tmp_path):
    with pytest.raises(EvaluationError, match="there is no text file"):
        load_text(Letters(), str(tmp_path / "missing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(EvaluationError, match="latin.txt is not UTF-8 text .* at byte 3"):
        load_text(Letters(), str(tmp_path / "latin.txt"))
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(EvaluationError, match="can't read .*broken.txt.gz"):
        load_text(Letters(), str(tmp_path / "broken.txt.gz"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(EvaluationError, match="empty.txt gives no sample"):
        load_text(Letters(), str(tmp_path / "empty.txt"))


def test_fewer_tokens_than_asked_for_are_used_with_a_warning(tmp_path, caplog):
    (tmp_path / "short.txt").write_text("abc")
    assert load_text(Letters(), str(tmp_path / "short.txt"), num_eval_tokens=10).total_tokens == 3
    assert "gives 3 tokens; 10 were asked for" in caplog.text


def test_a_data_set_is_asked_for_by_task_and_split(rows):
    load_text(Letters(), "some/set", task="part-1", split="validation")
    assert rows.asked["arguments"] == ("some/set", "part-1")
    assert rows.asked["options"]["split"] == "validation"


def test_samples_are_joined_with_the_separator(rows):
    text = load_text(Letters(), "some/set", sep="|")
    assert read(text.streams) == ["abcdef|gh|ijklmnop|qrs"]
    assert text.samples == 4
    assert read(load_text(Letters(), "some/set", sep="").streams) == ["abcdefghijklmnopqrs"]
    assert read(load_text(Letters(), "some/set", sep="|", num_eval_tokens=10).streams) == ["abcdef|gh|"]


def test_num_samples_and_min_seq_len_choose_the_samples(rows):
    assert read(load_text(Letters(), "some/set", sep="|", num_samples=2).streams) == ["abcdef|gh"]
    assert read(load_text(Letters(), "some/set", sep="|", min_seq_len=3).streams) == ["abcdef|ijklmnop|qrs"]
    assert read(load_text(Letters(), "some/set", sep="|", min_seq_len=3, num_samples=2).streams) == ["abcdef|ijklmnop"]


def test_concat_limit_begins_another_stream(rows):
    text = load_text(Letters(), "some/set", sep="|", concat_limit=8)
    assert read(text.streams) == ["abcdef|g", "h|ijklmn", "op|qrs"]


def test_the_first_tokens_can_be_left_out(rows):
    assert read(load_text(Letters(), "some/set", sep="|", skip_tokens=5, num_eval_tokens=6).streams) == ["f|gh|i"]
    pieces = load_text(Letters(), "some/set", sep="|", skip_tokens=1, concat_limit=8)
    assert read(pieces.streams) == ["bcdef|gh", "|ijklmno", "p|qrs"]
    assert read(load_text(Letters(), "some/set", sep="|", skip_tokens=20).streams) == ["rs"]
    with pytest.raises(EvaluationError, match="no sample of at least 2 tokens to evaluate on behind its first 21 tokens"):
        load_text(Letters(), "some/set", sep="|", skip_tokens=21)


def test_without_concat_stream_each_sample_is_a_stream(rows):
    text = load_text(Letters(), "some/set", concat_stream=False, num_eval_tokens=10)
    assert read(text.streams) == ["abcdef", "gh", "ij"]
    assert text.samples == 3


def test_another_column_can_hold_the_text_and_a_wrong_one_is_named(rows):
    with pytest.raises(EvaluationError, match="text_field='content' is no text column .*; it has text"):
        load_text(Letters(), "some/set", text_field="content")
    rows.found[:] = [{"content": "abc"}]
    assert read(load_text(Letters(), "some/set", text_field="content").streams) == ["abc"]


def test_a_data_set_that_can_not_be_loaded_is_named(rows, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", fail)
    with pytest.raises(EvaluationError, match="can't load the data set 'some/set', task 'x', split 'test': no route$"):
        load_text(Letters(), "some/set", task="x")
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *_, **__: [])
    with pytest.raises(EvaluationError, match="is empty"):
        load_text(Letters(), "some/set")


def test_without_the_datasets_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvaluationError, match=r"datasets is needed .*\[eval\]"):
        load_text(Letters(), "some/set")


def test_the_datasets_library_itself_reads_a_local_folder(tmp_path):
    pytest.importorskip("datasets")
    lines = [json.dumps({"body": word}) for word in ("first", "second")]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    text = load_text(Letters(), str(tmp_path), text_field="body", sep=" ")
    assert read(text.streams) == ["first second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_eval_tokens": 1}, "num_eval_tokens=1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"min_seq_len": -1}, "min_seq_len=-1"),
        ({"concat_limit": 1}, "concat_limit=1"),
        ({"skip_tokens": -1}, "skip_tokens=-1"),
        ({"skip_tokens": 9, "concat_stream": False}, "skip_tokens=9 has no meaning"),
        ({"concat_limit": 9, "concat_stream": False}, "concat_limit=9 has no meaning"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_text(Letters(), **arguments)


def test_every_stream_begins_with_bos_where_the_tokenizer_puts_it_before_a_text(rows):
    def streams(**options):
        return read(load_text(LettersBehindBos(), "some/set", sep="|", **options).streams)

    assert streams(num_eval_tokens=8) == ["^abcdef|"]
    assert streams(concat_limit=9) == ["^abcdef|g", "^h|ijklmn", "^op|qrs"]
    assert streams(concat_limit=9, num_eval_tokens=12) == ["^abcdef|g", "^h|"]
    assert streams(skip_tokens=5, num_eval_tokens=6) == ["^f|gh|"]
    assert streams(concat_stream=False, num_eval_tokens=11) == ["^abcdef", "^gh"]
    # One that has the token and leaves it to others to write it gets the text alone.
    assert texts.beginning(NamedOnly()) == []
