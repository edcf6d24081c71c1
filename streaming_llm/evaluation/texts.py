"""Turns a text into the token streams an evaluation runs on.

The text is the novel shipped with the package, a local file, or any data set the `datasets` library can load. Streams
are plain text behind the beginning-of-sequence token, where the tokenizer puts one before every text (Gemma's does, and
the model reads nothing well without it); no chat template is added.
"""

from __future__ import annotations

import gzip
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .errors import EvaluationError, check_least, require

logger = logging.getLogger(__name__)

SHIPPED_TEXT = "pride_and_prejudice"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".log")


@dataclass(frozen=True)
class TextStreams:
    """What an evaluation reads: `streams` are int64 tensors `[tokens]`, each meant for a cache of its own."""

    name: str
    streams: tuple[torch.Tensor, ...]
    samples: int

    @property
    def total_tokens(self) -> int:
        """Tokens of all streams together."""
        return sum(stream.numel() for stream in self.streams)


def shipped_text() -> str:
    """*Pride and Prejudice* (public domain), the whole novel, from the first line of the book on."""
    packed = resources.files(__package__).joinpath("data", f"{SHIPPED_TEXT}.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8")


def load_text(
    tokenizer: PreTrainedTokenizerBase,
    dataset_name: str | None = None,
    *,
    task: str | None = None,
    split: str = "test",
    text_field: str = "text",
    num_samples: int | None = None,
    num_eval_tokens: int = 6144,
    skip_tokens: int = 0,
    concat_stream: bool = True,
    concat_limit: int | None = None,
    min_seq_len: int = 1,
    sep: str = "\n\n",
) -> TextStreams:
    """Read a text and cut it into token streams of `num_eval_tokens` tokens in total.

    `dataset_name`: None for the shipped novel; the path of a text file, plain or gzipped, which is one sample; else a
    name or folder for `datasets.load_dataset`, with `task` its configuration, `split` and the column `text_field`.
    Samples with fewer than `min_seq_len` tokens are left out, and at most `num_samples` are used.
    With `concat_stream` samples are joined, `sep` between them, into one stream that begins behind its first `skip_tokens`
    tokens, or into streams of `concat_limit` tokens; otherwise each sample is a stream. Each stream begins with what
    `beginning` gives, which counts among its tokens. Fewer tokens than asked for are used as they are, with a warning.
    Raises `EvaluationError` where the text can't be had, `ValueError` for a wrong argument.
    """
    check_least({"num_eval_tokens": num_eval_tokens, "num_samples": num_samples, "min_seq_len": min_seq_len})
    check_joined(concat_stream, concat_limit=concat_limit, skip_tokens=skip_tokens)
    name, texts = _open(dataset_name, task, split, text_field)
    # Enough of each text to fill the streams, and to tell whether it is as long as min_seq_len.
    wanted = max(skip_tokens + num_eval_tokens, min_seq_len)
    samples = (ids for text in texts if len(ids := _encode(tokenizer, text, wanted)) >= max(min_seq_len, 1))
    samples = itertools.islice(samples, num_samples)
    separator = _encode(tokenizer, sep, wanted) if sep else []

    first = beginning(tokenizer)
    if concat_stream:
        streams, used = _joined(samples, separator, skip_tokens, num_eval_tokens, concat_limit, first)
    else:
        streams, used = _separate(samples, num_eval_tokens, first)
    if not streams:
        behind = f" behind its first {skip_tokens:,} tokens" if skip_tokens else ""
        raise EvaluationError(f"{name} gives no sample of at least {max(min_seq_len, 2)} tokens to evaluate on{behind}")
    found = TextStreams(name, tuple(torch.tensor(ids, dtype=torch.int64) for ids in streams), used)
    if found.total_tokens < num_eval_tokens:
        logger.warning("%s gives %d tokens; %d were asked for", name, found.total_tokens, num_eval_tokens)
    return found


def beginning(tokenizer) -> list[int]:
    """The beginning-of-sequence token where the tokenizer puts it before every text, in a list; else an empty one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [] if bos is None else [token for token in tokenizer("")["input_ids"][:1] if token == bos]


def check_joined(concat_stream: bool, **settings: int | None) -> None:
    """Raise `ValueError` for a setting of a joined stream that is too small, or has none to be a setting of."""
    check_least(settings)
    for name, number in settings.items():
        if number and not concat_stream:
            raise ValueError(f"{name}={number} has no meaning without concat_stream; leave one of them out")


def _joined(samples: Iterable[list[int]], separator: list[int], skip: int, total: int, limit: int | None, first: list[int]):
    ids: list[int] = []
    used = 0
    for sample in samples:
        if ids:
            ids.extend(separator)
        ids.extend(sample)
        used += 1
        if len(ids) >= skip + total:
            break
    ids = ids[skip : skip + total]
    pieces: list[list[int]] = []
    start, left = 0, total
    while start < len(ids) and left > 0:
        piece = (first + ids[start:])[: min(left, limit or left)]
        pieces.append(piece)
        start, left = start + len(piece) - len(first), left - len(piece)
    return [piece for piece in pieces if len(piece) > 1], used


def _separate(samples: Iterable[list[int]], total: int, first: list[int]):
    streams: list[list[int]] = []
    left = total
    for sample in samples:
        piece = (first + sample)[:left]
        if len(piece) < 2:  # a single token has nothing to be predicted from
            continue
        streams.append(piece)
        left -= len(piece)
        if left < 2:
            break
    return streams, len(streams)


def _encode(tokenizer, text: str, wanted: int) -> list[int]:
    """Token ids of a text, at least the first `wanted` if it has so many.

    Only as much of a long text is read as it takes: the last tokens of a cut text may depend on the cut, so some more
    are read than are wanted.
    """
    characters = wanted * 8 + 1024
    while True:
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        if characters >= len(text) or len(ids) >= wanted + 128:
            return list(ids)
        characters *= 2


def _open(dataset_name: str | None, task: str | None, split: str, text_field: str) -> tuple[str, Iterable[str]]:
    if dataset_name is None or dataset_name == SHIPPED_TEXT:
        return SHIPPED_TEXT, [shipped_text()]
    path = Path(dataset_name).expanduser()
    if path.is_file():
        return path.name, [_read_file(path)]
    if path.suffix in (*TEXT_SUFFIXES, ".gz"):
        raise EvaluationError(f"there is no text file {path}")
    return dataset_name, _read_dataset(dataset_name, task, split, text_field)


def _read_file(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError) as error:
        raise EvaluationError(f"can't read {path}: {error}") from error


def _read_dataset(name: str, task: str | None, split: str, text_field: str) -> Iterator[str]:
    require("datasets")
    import datasets

    # Streaming reads the first rows of a data set of any size at once; it needs the network, or a local folder.
    streaming = not getattr(datasets.config, "HF_HUB_OFFLINE", False)
    try:
        rows = datasets.load_dataset(name, task, split=split, streaming=streaming)
        rows = iter(rows)
        first = next(rows, None)
    except Exception as error:  # `datasets` raises its own, the hub's, the network's and the builders' errors here
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        asked = f"{name!r}" + (f", task {task!r}" if task else "") + f", split {split!r}"
        raise EvaluationError(f"can't load the data set {asked}: {reason.strip()}") from error
    if first is None:
        raise EvaluationError(f"the data set {name!r}, split {split!r}, is empty")
    if not isinstance(first.get(text_field), str):
        columns = [column for column, value in first.items() if isinstance(value, str)]
        raise EvaluationError(
            f"text_field={text_field!r} is no text column of {name!r}; it has {', '.join(columns) or 'none'}"
        )
    return (row[text_field] for row in itertools.chain([first], rows) if isinstance(row[text_field], str))
