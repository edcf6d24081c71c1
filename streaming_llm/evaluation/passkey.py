"""A pass key hidden at some depth of a stream that is longer than the trained length, asked for at the end.

Two things are told apart: whether generation still works there (it must, for every method), and whether the key comes back,
which a cache that has dropped or merged its tokens can't be expected to do.
"""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..model.facts import cache_argument
from . import flags
from .long_stream import DEFAULT_METHODS, MIDDLE, RECENT, own_positions
from .methods import cache_factory
from .report import Columns, document, markdown_columns, print_columns
from .run import ModelRun
from .streaming import REFERENCE, CacheFactory, lockstep
from .texts import beginning, load_text

TASK = "There is a pass key hidden in the text below. Find it and remember it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
GRASS_NAME = "grass"
# Tokens of a forward pass: a text that is there as a whole is read faster in long ones.
CHUNK = 256
# Each trial's filler begins this many tokens further into the text.
SHIFT = 1009


@dataclass(frozen=True)
class Trial:
    """One key at one depth (0: the beginning, 1: the end) of one stream of `length` tokens.

    `found`: the first number in the text generated is the key. `broken`: what was wrong with the generation, None where
    every logit was finite and some text came.
    """

    length: int
    depth: float
    key: str
    generated: str
    found: bool
    broken: str | None
    seconds: float


def passkey_prompt(tokenizer, filler: torch.Tensor, length: int, depth: float, key: str) -> torch.Tensor:
    """Token ids `[length]`: the task, filler with the key at `depth` of it, and the question, behind `texts.beginning`.

    `filler`: token ids, repeated where they are too few. Raises `ValueError` where `length` has no room for the rest.
    """

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    first = torch.tensor(beginning(tokenizer), dtype=torch.int64)
    task, needle, question = torch.cat([first, encode(TASK)]), encode(NEEDLE.format(key=key)), encode(QUESTION)
    room = length - task.numel() - needle.numel() - question.numel()
    if room < 1:
        raise ValueError(
            f"length={length} leaves no room for filler: {length - room} tokens are needed for the question alone"
        )
    body = filler.repeat(-(-room // filler.numel()))[:room]
    before = round(depth * room)
    return torch.cat([task, body[:before], needle, body[before:], question])


def first_number(text: str) -> str | None:
    """The first run of digits in a text."""
    found = re.search(r"\d+", text)
    return found[0] if found else None


def read(model, cache, tokens: torch.Tensor, chunk_size: int) -> None:
    """Feed tokens, int64 `[tokens]`, to a cache, a chunk at a time."""
    for _ in lockstep(model, tokens, {"": cache}, chunk_size, first_row=tokens.numel()):
        pass


@torch.no_grad()
def ask(
    model, tokenizer, cache, prompt: torch.Tensor, shared: int, chunk_size: int = CHUNK, new_tokens: int = 16
) -> tuple[str, str | None]:
    """Read what of a prompt, int64 `[tokens]`, a cache has not seen, in chunks, and let `generate` go on greedily.

    The cache itself gets the first `shared` tokens, a copy of it the others. Returns the text and what was wrong, or None.
    The last token is left to `generate`, which gets the whole prompt.
    """
    device = next(model.parameters()).device
    try:
        read(model, cache, prompt[cache.get_seq_length() : shared], chunk_size)
        cache = copy.deepcopy(cache)
        read(model, cache, prompt[cache.get_seq_length() : -1], chunk_size)
        ids = prompt[None].to(device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{cache_argument(model): cache},
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=model.generation_config.eos_token_id or 0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    except (IndexError, RuntimeError, ValueError) as error:
        # A method that can't go on is a finding, to be reported beside the others'.
        return "", f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = tokenizer.decode(output.sequences[0, prompt.numel() :], skip_special_tokens=True)
    if not all(bool(logits.isfinite().all()) for logits in output.logits):
        return text, "the logits hold NaN or infinity"
    return text, None if text.strip() else "nothing was generated"


def run_trials(
    model,
    tokenizer,
    make_cache: CacheFactory,
    filler: torch.Tensor,
    length: int,
    depths: Sequence[float],
    *,
    trials: int = 1,
    chunk_size: int = CHUNK,
    seed: int = 0,
) -> Iterator[Trial]:
    """Hide `trials` keys, each in filler of its own, at each depth of streams of `length` tokens, and ask for them.

    The keys, of five digits, depend on `seed`, length, depth and the trial's number only: every method gets the same. What
    comes before the key is the same at all depths and read once, in whole chunks: each key's cache is a copy from there.
    """
    for number in range(trials):
        own = filler.roll(-number * SHIFT)
        cache = make_cache()
        for depth in sorted(set(depths)):
            key = str(random.Random(f"{seed} {length} {depth} {number}").randint(10_000, 99_999))
            prompt = passkey_prompt(tokenizer, own, length, depth, key)
            plain = passkey_prompt(tokenizer, own, length, 1.0, key)
            alike = min(length - 1, int((prompt == plain).to(torch.int8).cumprod(0).sum()))
            began = time.perf_counter()
            text, broken = ask(model, tokenizer, cache, prompt, alike - alike % chunk_size, chunk_size)
            seconds = time.perf_counter() - began
            yield Trial(length, depth, key, text, first_number(text) == key, broken, seconds)


@dataclass(frozen=True)
class Line:
    """The trials of one method at one length, as a line of the table."""

    method: str
    length: int
    trials: Sequence[Trial]

    def share(self, depth: float | None = None) -> str:
        """Keys found of those hidden at a depth, at all for None; a dash where the depth was not tried."""
        found = [trial.found for trial in self.trials if depth in (None, trial.depth)]
        return f"{sum(found)}/{len(found)}" if found else "-"


def lines(trials: Mapping[str, Sequence[Trial]]) -> list[Line]:
    """The table's lines, by method and length in the order they were run."""
    return [
        Line(method, length, [trial for trial in tried if trial.length == length])
        for method, tried in trials.items()
        for length in dict.fromkeys(trial.length for trial in tried)
    ]


def columns(depths: Sequence[float]) -> Columns:
    """The table's columns."""
    return {
        "method": lambda line: line.method,
        "length": lambda line: f"{line.length:,}",
        **{f"{depth:g}": lambda line, depth=depth: line.share(depth) for depth in depths},
        "found": lambda line: line.share(),
        "broken": lambda line: str(sum(trial.broken is not None for trial in line.trials)),
    }


@dataclass
class PasskeyArguments(flags.Output, flags.Model):
    """The flags beside the settings of the cache."""

    lengths: list[int] = flags.argument(
        "tokens of the streams, question included (16384 32768)", (16384, 32768), metavar="N"
    )
    depths: list[float] = flags.argument(
        "where the key is: 0 at the beginning, 1 at the end (0.1 0.3 0.5 0.7 0.9)",
        (0.1, 0.3, 0.5, 0.7, 0.9),
        metavar="SHARE",
    )
    trials: int = flags.count("keys at each depth of each length (%(default)s)", 1)
    filler: str = flags.argument(
        f"what the key is hidden in: novel (the shipped one), a text file, or {GRASS_NAME}, the same five sentences again "
        "and again (%(default)s)",
        "novel",
        metavar="NAME",
    )
    methods: list[str] = flags.methods(DEFAULT_METHODS)
    chunk_size: int = flags.count("tokens a forward pass; 1: one by one (%(default)s)", CHUNK)
    full_tokens: int = flags.count(
        "leave the full cache out of longer streams: its time grows with their square (%(default)s)", 16384
    )
    output_dir: str = flags.directory("results/passkey")
    markdown: flags.Switch = flags.switch("print the table in Markdown too")


class Passkey(ModelRun):
    """Hide a pass key at several depths of streams longer than the trained length, and ask for it at the end.

    Counts for every method how often it is found and whether generation ever breaks: then the exit code is 1.
    """

    prog = "passkey.py"
    Arguments = PasskeyArguments
    sizes = RECENT, MIDDLE

    def check(self) -> None:
        super().check()
        given = self.arguments
        for depth in given.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths: {depth} is out of range; a depth must be between 0 and 1")
        if min(given.lengths) < 1:
            raise ValueError(f"lengths: {min(given.lengths)} is too small; a length must be at least 1")
        self.plans = own_positions(self.plan(given.methods), self.settings)

    def measure(self) -> Iterator[None]:
        """Ask every method for every key, the shortest streams first."""
        given = self.arguments
        filler = _filler(self.tokenizer, given.filler, max(given.lengths) + given.trials * SHIFT)
        for length in given.lengths:
            passkey_prompt(self.tokenizer, filler, length, 0.5, "12345")  # raises where there is no room
        self.trials: dict[str, list[Trial]] = {}
        for length in dict.fromkeys(given.lengths):
            for plan in self.plans:
                name = plan.method.name
                if name == REFERENCE and length > given.full_tokens:
                    self.console.print(f"full is left out of {length:,} tokens (--full_tokens)", highlight=False)
                    continue
                make_cache, sizes = cache_factory(self.model, plan), {"trials": given.trials, "chunk_size": given.chunk_size}
                asked = (self.model, self.tokenizer, make_cache, filler, length, given.depths)
                for trial in run_trials(*asked, **sizes, seed=self.seed):
                    self.trials.setdefault(name, []).append(trial)
                    if given.log_every:
                        told = f"depth {trial.depth:g}: {trial.key} -> {trial.generated!r}"
                        self.console.print(f"{name}, {length:,} tokens, {told}", soft_wrap=True, markup=False)
                    # Written at once, for the next may take as long again.
                    yield

    def document(self) -> dict[str, Any]:
        results = {method: [asdict(trial) for trial in tried] for method, tried in self.trials.items()}
        timing = {method: {"seconds": [entry.pop("seconds") for entry in tried]} for method, tried in results.items()}
        return document(self.recorded(trained_length=self.trained_length), self.device, results, timing)

    def table(self) -> None:
        """Print the table, and where asked for in Markdown."""
        table, shown = lines(self.trials), columns(self.arguments.depths)
        title = f"{self.model_name}: pass keys found, by depth of the key"
        caption = "'broken': generations with a logit that is no number, with no text, or that failed."
        print_columns(table, shown, title, caption, self.console)
        if self.arguments.markdown:
            print(markdown_columns(table, shown))

    def code(self) -> int:
        """1 where a generation broke, which is told."""
        broken = [trial.broken for tried in self.trials.values() for trial in tried if trial.broken]
        if broken:
            told = f"{len(broken)} generations broke; the first: {broken[0]}"
            self.console.print(told, soft_wrap=True, markup=False)
        return 1 if broken else 0


def _filler(tokenizer, name: str, tokens: int) -> torch.Tensor:
    if name == GRASS_NAME:
        return torch.tensor(tokenizer(GRASS, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    stream = load_text(tokenizer, None if name == "novel" else name, num_eval_tokens=tokens).streams[0]
    return stream[len(beginning(tokenizer)) :]
