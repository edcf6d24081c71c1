"""A pass key hidden at some depth of a stream that is longer than the trained length, asked for at the end.

Two things are told apart: whether generation still works there (it must, for every method), and whether the key comes back,
which a cache that has dropped or merged its tokens can't be expected to do.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.facts import cache_argument
from .cli import (
    Parser,
    add_method_flags,
    add_model_flags,
    add_output_flags,
    add_settings,
    check_least,
    exit_code,
    parse_arguments,
    prepare,
    recorded_settings,
)
from .long_stream import DEFAULT_METHODS, MIDDLE, RECENT, given_plans
from .methods import Plan, cache_factory
from .report import Columns, environment, markdown_columns, print_columns, write_json
from .streaming import REFERENCE, CacheFactory, lockstep

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
    """Token ids `[length]`: the task, filler with the key at `depth` of it, and the question.

    `filler`: token ids, repeated where they are too few. Raises `ValueError` where `length` has no room for the rest.
    """

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    task, needle, question = encode(TASK), encode(NEEDLE.format(key=key)), encode(QUESTION)
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
    """One method at one length, as a line of the table: found and tried for each depth, and how many broke."""

    method: str
    length: int
    found: Mapping[float, int]
    tried: Mapping[float, int]
    broken: int


def lines(trials: Mapping[str, Sequence[Trial]]) -> list[Line]:
    """The table's lines, by method and length in the order they were run."""
    table = []
    for method, tried in trials.items():
        for length in dict.fromkeys(trial.length for trial in tried):
            some = [trial for trial in tried if trial.length == length]
            depths = dict.fromkeys(trial.depth for trial in some)
            count = {depth: [trial.found for trial in some if trial.depth == depth] for depth in depths}
            found = {depth: sum(hits) for depth, hits in count.items()}
            tries = {depth: len(hits) for depth, hits in count.items()}
            table.append(Line(method, length, found, tries, sum(trial.broken is not None for trial in some)))
    return table


def columns(depths: Sequence[float]) -> Columns:
    """The table's columns: a dash where a depth was not tried."""

    def share(line: Line, depth: float) -> str:
        return f"{line.found[depth]}/{line.tried[depth]}" if depth in line.tried else "-"

    return {
        "method": lambda line: line.method,
        "length": lambda line: f"{line.length:,}",
        **{f"{depth:g}": lambda line, depth=depth: share(line, depth) for depth in depths},
        "found": lambda line: f"{sum(line.found.values())}/{sum(line.tried.values())}",
        "broken": lambda line: str(line.broken),
    }


def document(trials: Mapping[str, Sequence[Trial]], settings: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """What `results.json` holds; all that differs between two runs on one machine is under `timing`."""
    results: dict[str, Any] = {}
    timing: dict[str, Any] = {}
    for method, tried in trials.items():
        results[method] = [dataclasses.asdict(trial) for trial in tried]
        timing[method] = {"seconds": [entry.pop("seconds") for entry in results[method]]}
    return {"settings": dict(settings), "environment": environment(device), "results": results, "timing": timing}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the pass key's command line."""
    parser = Parser(
        prog="passkey.py",
        description="Hide a pass key at several depths of streams longer than the trained length, ask for it at the end, "
        "and count for every method how often it is found and whether generation ever breaks.",
        allow_abbrev=False,
    )
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("pass key")
    add = group.add_argument
    add(
        "--lengths",
        nargs="+",
        type=int,
        default=[16384, 32768],
        metavar="N",
        help="tokens of the streams, question included (16384 32768)",
    )
    add(
        "--depths",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        metavar="SHARE",
        help="where the key is: 0 at the beginning, 1 at the end (0.1 0.3 0.5 0.7 0.9)",
    )
    add("--trials", type=int, default=1, metavar="N", help="keys at each depth of each length (%(default)s)")
    add(
        "--filler",
        default="novel",
        metavar="NAME",
        help=f"what the key is hidden in: novel (the shipped one), a text file, or {GRASS_NAME}, the same five sentences "
        "again and again (%(default)s)",
    )
    add_method_flags(group, DEFAULT_METHODS)
    add(
        "--full_tokens",
        type=int,
        default=16384,
        metavar="N",
        help="leave the full cache out of longer streams: its time grows with their square (%(default)s)",
    )
    group = parser.add_argument_group("output")
    add_output_flags(group, "results/passkey")
    group.add_argument("--markdown", action="store_true", help="print the table in Markdown too")
    add_settings(parser, RECENT, MIDDLE)
    parser.set_defaults(chunk_size=CHUNK)
    return parser


def checked_plans(arguments: argparse.Namespace) -> list[Plan]:
    """The methods to run; `ValueError` for anything wrong with the arguments."""
    check_least(arguments, {"trials": 1, "chunk_size": 1, "log_every": 0, "full_tokens": 0})
    for depth in arguments.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths: {depth} is out of range; a depth must be between 0 and 1")
    if min(arguments.lengths) < 1:
        raise ValueError(f"lengths: {min(arguments.lengths)} is too small; a length must be at least 1")
    return given_plans(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pass key test; its exit code, as of `cli.exit_code`, 1 also where a generation broke."""
    parser = build_parser()
    arguments = parse_arguments(parser, sys.argv[1:] if argv is None else argv)
    return exit_code(parser.prog, lambda: _run(arguments))


def _filler(tokenizer, name: str, tokens: int) -> torch.Tensor:
    from .texts import load_text

    if name == GRASS_NAME:
        return torch.tensor(tokenizer(GRASS, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    return load_text(tokenizer, None if name == "novel" else name, num_eval_tokens=tokens).streams[0]


def _run(arguments: argparse.Namespace) -> int:
    # All that can be wrong with the arguments is found before the weights are loaded.
    plans = checked_plans(arguments)
    setup = prepare(arguments)
    console, model, tokenizer = setup.console, setup.model, setup.tokenizer

    filler = _filler(tokenizer, arguments.filler, max(arguments.lengths) + arguments.trials * SHIFT)
    for length in arguments.lengths:
        passkey_prompt(tokenizer, filler, length, 0.5, "12345")  # raises where there is no room
    settings = recorded_settings(arguments, plans, trained_length=setup.trained_length)
    path = setup.output / "results.json"

    trials: dict[str, list[Trial]] = {}
    for length in dict.fromkeys(arguments.lengths):
        for plan in plans:
            name = plan.method.name
            if name == REFERENCE and length > arguments.full_tokens:
                console.print(f"full is left out of {length:,} tokens (--full_tokens)", highlight=False)
                continue
            for trial in run_trials(
                model,
                tokenizer,
                cache_factory(model, plan),
                filler,
                length,
                arguments.depths,
                trials=arguments.trials,
                chunk_size=arguments.chunk_size,
                seed=getattr(arguments, "seed", 0),
            ):
                trials.setdefault(name, []).append(trial)
                if arguments.log_every:
                    told = f"depth {trial.depth:g}: {trial.key} -> {trial.generated!r}"
                    console.print(f"{name}, {length:,} tokens, {told}", soft_wrap=True, markup=False)
                # Written at once, for the next may take as long again.
                write_json(path, document(trials, settings, setup.device))
    table, shown = lines(trials), columns(arguments.depths)
    title = f"{setup.model_name}: pass keys found, by depth of the key"
    caption = "'broken': generations with a logit that is no number, with no text, or that failed."
    print_columns(table, shown, title, caption, console)
    if arguments.markdown:
        print(markdown_columns(table, shown))
    console.print(f"wrote {path}", soft_wrap=True)
    broken = [trial.broken for tried in trials.values() for trial in tried if trial.broken]
    if broken:
        console.print(f"{len(broken)} generations broke; the first: {broken[0]}", soft_wrap=True, markup=False)
    return 1 if broken else 0
