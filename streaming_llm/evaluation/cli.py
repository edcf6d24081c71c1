"""The command line of the evaluation scripts in `examples/`: flags, a JSON file of flags, the run and its output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EvaluationError, require
from .methods import (
    DEFAULT_MIDDLE,
    DEFAULT_RECENT,
    FEATURES,
    METHODS,
    Plan,
    cache_factory,
    plan_methods,
    resolve_settings,
)

logger = logging.getLogger(__name__)

INTERRUPTED = 130
BAD_USAGE = 2
FAILED = 1

# What `check_least` is to ask of the flags that `read_text` takes.
LEAST_OF_TEXT = {"num_eval_tokens": 2, "skip_tokens": 0}
# Flags beside those of ADMSConfig's settings.
_GROUPS = ("model", "text", "scoring", "output")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which can say which flags it has."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(BAD_USAGE, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def flags(self) -> dict[str, argparse.Action]:
        return {action.option_strings[0][2:]: action for action in self._actions if action.dest != "help"}


def build_parser(prog: str, description: str, methods: Sequence[str], output_dir: str) -> argparse.ArgumentParser:
    """The parser of an evaluation script: its own flags, and one for every setting of `ADMSConfig`.

    Settings of `ADMSConfig` that are not given are absent from the result, so that the library's defaults hold.
    """
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    groups = {name: parser.add_argument_group(name) for name in _GROUPS}

    add_model_flags(groups["model"])

    add_text_flags(groups["text"])
    add = groups["text"].add_argument
    add("--num_samples", type=int, metavar="N", help="use at most N samples: rows of a data set; a file is one (all)")
    add("--num_eval_tokens", type=int, default=6144, metavar="N", help="tokens to run in total (%(default)s)")
    add(
        "--concat_stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="join the samples into one stream; otherwise each is a stream with a cache of its own (joined)",
    )
    add(
        "--concat_limit",
        type=int,
        metavar="N",
        help="longest joined stream in tokens; what follows begins another with a new cache (no limit)",
    )
    add("--min_seq_len", type=int, default=1, metavar="N", help="leave out samples of fewer tokens (%(default)s)")
    add("--sep", default="\\n\\n", help="text between joined samples; \\n and \\t are understood (%(default)s)")

    add_method_flags(groups["scoring"], methods)
    add = groups["scoring"].add_argument
    add(
        "--score_from",
        type=int,
        metavar="N",
        help="first scored token of each stream, from 0 (2048, or a third of a shorter stream)",
    )
    add(
        "--decode_tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens decoded one by one after the stream, for their timing only; 0: none (%(default)s)",
    )

    add_output_flags(groups["output"], output_dir)
    add_settings(parser)
    return parser


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say what is run and on what."""
    add = group.add_argument
    add("--model_name_or_path", metavar="NAME", help="hub name, local folder or .gguf file (SmolLM2-135M-Instruct)")
    add("--dtype", default="float32", help="float32, bfloat16, float16 or auto (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    add("--seed", type=int, default=argparse.SUPPRESS, help="seed of torch's and the cache's random numbers (0)")


def add_text_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say where a text comes from."""
    add = group.add_argument
    add(
        "--dataset_name",
        metavar="NAME",
        help="a text file (.txt, .md, also gzipped), or a name or folder for the datasets library "
        "(the shipped novel, Pride and Prejudice)",
    )
    add_reading_flags(group)


def add_reading_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say what of a data set, and from where on, a text is read."""
    add = group.add_argument
    add("--task", help="the data set's configuration, such as wikitext-2-raw-v1")
    add("--split", default="test", help="the data set's split (%(default)s)")
    add("--text_field", default="text", help="the data set's column that holds the text (%(default)s)")
    add("--skip_tokens", type=int, default=0, metavar="N", help="begin behind the first N tokens of the text (%(default)s)")


def add_method_flags(group: argparse._ArgumentGroup, methods: Sequence[str]) -> None:
    """The flags that say which methods read it, and how many tokens at once."""
    add = group.add_argument
    add(
        "--methods",
        nargs="+",
        default=list(methods),
        metavar="METHOD",
        help=f"methods to compare, at equal tokens a head: {', '.join(METHODS)} ({' '.join(methods)})",
    )
    add("--chunk_size", type=int, default=64, metavar="N", help="tokens a forward pass; 1: one by one (%(default)s)")


def add_output_flags(group: argparse._ArgumentGroup, output_dir: str) -> None:
    """The flags of what is written and printed, and the file of flags."""
    add = group.add_argument
    add("--output_dir", default=output_dir, metavar="DIR", help="where results.json and the plot go (%(default)s)")
    add("--log_every", type=int, default=1024, metavar="N", help="print a line every N tokens; 0: never (%(default)s)")
    add_config_flag(group)


def add_config_flag(group: argparse._ArgumentGroup) -> None:
    """The flag `parse_arguments` reads a file of flags from."""
    group.add_argument(
        "--config",
        metavar="FILE",
        help="JSON object of these flags and settings by name; flags on the command line win over it",
    )


def add_settings(parser: Parser, recent: int = DEFAULT_RECENT, middle: int = DEFAULT_MIDDLE) -> None:
    """One flag for every field of `ADMSConfig`, typed as the field is, and the documented --disable_* flags.

    `recent`, `middle`: the sizes that hold where none are given, as of `resolve_settings`.
    """
    from streaming_llm import ADMSConfig

    group = parser.add_argument_group("cache settings", "every setting of ADMSConfig, under its own name")
    hints = typing.get_type_hints(ADMSConfig)
    taken = {action.dest for action in parser._actions}
    defaults = resolve_settings({}, recent, middle)
    for field in dataclasses.fields(ADMSConfig):
        if field.name in taken or not field.init:
            continue
        default = defaults.get(field.name, field.default)
        if field.name == "compressed_budget":
            default = f"{default}: {middle} less sketch_budget and replay_budget"
        text = f"{field.metadata.get('help', '').rstrip('.')} ({default})".strip().replace("%", "%%")
        kind = hints[field.name]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float, str):
            # What is allowed is checked by ADMSConfig, whose messages say more than argparse's.
            choices = field.metadata.get("options")
            options |= {"type": kind, "metavar": "|".join(choices) if choices else kind.__name__.upper()}
        else:
            raise TypeError(f"no flag can be made of the setting {field.name}, whose type is {kind!r}")
        group.add_argument(f"--{field.name}", **options)
        if field.name in FEATURES:
            group.add_argument(
                f"--disable_{field.name.removeprefix('enable_')}",
                dest=field.name,
                action="store_false",
                default=argparse.SUPPRESS,
                help=f"the same as --no-{field.name}",
            )


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`, with the flags of a `--config` file, if it names one, put before it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    try:
        path = first.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        path = None  # the full parser reports it
    return parser.parse_args([*(_flags_of_file(parser, path) if path else []), *argv])


def _flags_of_file(parser: Parser, path: str) -> list[str]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"can't read --config {path}: {error.strerror or error}")
    except ValueError as error:
        parser.error(f"--config {path} is no valid JSON: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config {path} must hold one JSON object of names and values")
    flags = parser.flags()
    unknown = [name for name in content if name not in flags or name == "config"]
    if unknown:
        parser.error(f"--config {path} has unknown names: {', '.join(map(str, unknown))}")
    arguments: list[str] = []
    for name, value in content.items():
        action = flags[name]
        if value is None:
            continue
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                parser.error(f"--config {path}: {name} must be true or false, not {value!r}")
            if value:
                arguments.append(f"--{name}")
            elif isinstance(action, argparse.BooleanOptionalAction):
                arguments.append(f"--no-{name}")
        elif isinstance(value, list) and action.nargs == "+":
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, (bool, list, dict)):
            parser.error(f"--config {path}: {name} can't be {json.dumps(value)}")
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def cache_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `ADMSConfig` that were given, by flag or file."""
    from streaming_llm import ADMSConfig

    given = vars(arguments)
    return {field.name: given[field.name] for field in dataclasses.fields(ADMSConfig) if field.name in given}


def split_names(items: Sequence[str]) -> list[str]:
    """Names given apart or joined by commas."""
    return [name for item in items for name in item.split(",") if name]


def check_plans(plans: Sequence[Plan]) -> None:
    """Raise `ValueError` for settings that a cache refuses, before anything is loaded."""
    from streaming_llm import ADMSConfig, ADMSKVCache

    for plan in plans:
        if plan.method.kind == "adms":
            ADMSKVCache(ADMSConfig(**plan.settings))


def check_least(arguments: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Raise `ValueError` for an argument that is given and below what `least` says of it."""
    for name, number in least.items():
        value = getattr(arguments, name)
        if value is not None and value < number:
            raise ValueError(f"{name}={value} is too small; it must be at least {number}")


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    methods: Sequence[str],
    output_dir: str,
    markdown: bool = False,
) -> int:
    """Run an evaluation script; its exit code, as of `exit_code`."""
    parser = build_parser(prog, description, methods, output_dir)
    arguments = parse_arguments(parser, sys.argv[1:] if argv is None else argv)
    return exit_code(prog, lambda: _run(arguments, markdown))


def exit_code(prog: str, run: Callable[[], int]) -> int:
    """What `run` gives, or one line on stderr and 1 (something is missing), 2 (wrong usage), 130 (interrupted)."""
    try:
        return run()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (EvaluationError, TypeError, ValueError) as error:
        usage = not isinstance(error, EvaluationError)
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_USAGE if usage else FAILED


@dataclass
class Setup:
    """What every evaluation command starts with."""

    console: Any
    output: Path
    device: Any
    model: Any
    tokenizer: Any
    model_name: str

    @property
    def trained_length(self) -> int | None:
        """Tokens the model was trained on; None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def prepare(arguments: argparse.Namespace) -> Setup:
    """The console, the output directory (seen to be writable) and the model, after all arguments were checked."""
    require("rich", "matplotlib")

    import torch
    import transformers
    from rich.console import Console

    from . import models, report

    output = Path(arguments.output_dir).expanduser()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("streaming_llm.evaluation").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    device = models.resolve_device(arguments.device)
    report.prepare_output(output)
    torch.manual_seed(getattr(arguments, "seed", 0))
    model, tokenizer = models.load_model(arguments.model_name_or_path, arguments.dtype, device)
    return Setup(Console(), output, device, model, tokenizer, arguments.model_name_or_path or models.MODEL_NAME)


def read_text(arguments: argparse.Namespace, tokenizer, name: str | None, **options: Any):
    """The text `name`, None for the shipped novel, as the flags have it; `options`: others of `texts.load_text`."""
    from . import texts

    flags = ("task", "split", "text_field", *LEAST_OF_TEXT)
    return texts.load_text(tokenizer, name, **{flag: getattr(arguments, flag) for flag in flags}, **options)


def recorded_settings(arguments: argparse.Namespace, plans: Sequence[Plan], **more: Any) -> dict[str, Any]:
    """What `results.json` says of a run: its flags, each method's settings, and `more`."""
    flags = {name: value for name, value in sorted(vars(arguments).items()) if name not in ("output_dir", "config")}
    return flags | {"methods": {plan.method.name: plan.settings for plan in plans}} | more


def _run(arguments: argparse.Namespace, markdown: bool) -> int:
    # All that can be wrong with the arguments is found before the weights are loaded.
    plans = plan_methods(split_names(arguments.methods), resolve_settings(cache_settings(arguments)))
    check_plans(plans)
    _check(arguments)
    setup = prepare(arguments)
    console, output, model, model_name = setup.console, setup.output, setup.model, setup.model_name

    from . import report, streaming

    text = read_text(
        arguments,
        setup.tokenizer,
        arguments.dataset_name,
        num_samples=arguments.num_samples,
        concat_stream=arguments.concat_stream,
        concat_limit=arguments.concat_limit,
        min_seq_len=arguments.min_seq_len,
        sep=arguments.sep.replace("\\n", "\n").replace("\\t", "\t"),
    )
    console.print(f"{model_name}, {text.name}: {text.total_tokens:,} tokens in {_count(len(text.streams), 'stream')}")

    with ProgressReport(console, text.total_tokens, arguments.log_every) as on_chunk:
        results = streaming.evaluate_streams(
            model,
            text.streams,
            {plan.method.name: cache_factory(model, plan) for plan in plans},
            chunk_size=arguments.chunk_size,
            score_from=arguments.score_from,
            decode_tokens=arguments.decode_tokens,
            on_chunk=on_chunk,
        )

    title = f"{model_name} on {text.name}, {text.total_tokens:,} tokens in chunks of {arguments.chunk_size}"
    report.print_tables(results, title, _caption(plans), console)
    if markdown:
        print(report.markdown_table(results))
    described = {"name": text.name, "tokens": text.total_tokens, "streams": len(text.streams)}
    settings = recorded_settings(arguments, plans, text=described)
    scored_from = 0  # with several streams the scored tokens are no single stretch
    if len(text.streams) == 1:
        scored_from = arguments.score_from or streaming.default_score_from(text.total_tokens)
        settings["score_from"] = scored_from
    report.plot(output / "perplexity.png", results, title, scored_from)
    report.write_json(output / "results.json", report.results_document(results, settings, setup.device))
    console.print(f"wrote {output / 'results.json'} and {output / 'perplexity.png'}", soft_wrap=True)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    least = {
        "chunk_size": 1,
        "score_from": 1,
        "decode_tokens": 0,
        "log_every": 0,
        **LEAST_OF_TEXT,
        "num_samples": 1,
        "concat_limit": 2,
        "min_seq_len": 0,
    }
    check_least(arguments, least)
    if arguments.score_from is not None and arguments.score_from >= arguments.num_eval_tokens:
        raise ValueError(
            f"score_from={arguments.score_from} leaves nothing to score of {arguments.num_eval_tokens} tokens "
            "(num_eval_tokens)"
        )
    for name in ("concat_limit", "skip_tokens"):
        if getattr(arguments, name) and not arguments.concat_stream:
            raise ValueError(f"{name} has no meaning with --no-concat_stream; leave one of them out")


def _caption(plans) -> str:
    bounded = [plan for plan in plans if plan.total_tokens is not None]
    if not bounded:
        return "KL in nats a token."
    totals = {plan.total_tokens for plan in bounded}
    equal = f"every method but full keeps {bounded[0].total_tokens:,} tokens a head when it compacts"
    if len(totals) > 1:
        equal = "tokens a head: " + ", ".join(f"{plan.method.name} {plan.total_tokens:,}" for plan in bounded)
    return (
        f"Equal tokens: {equal}, every {bounded[0].interval} tokens. KL in nats a token. 'cache' is the most bytes "
        "held, all state included."
    )


class ProgressReport:
    """A progress bar on a terminal, and a line every `log_every` tokens anywhere."""

    def __init__(self, console, total: int, log_every: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.console = console
        self.log_every = log_every
        self.total = total
        self.logged = 0

    def __enter__(self):
        self.bar.start()
        self.task = self.bar.add_task("tokens", total=self.total)
        return self.on_chunk

    def on_chunk(self, tokens: int, perplexities: dict[str, float]) -> None:
        self.bar.update(self.task, completed=tokens)
        if self.log_every and tokens // self.log_every > self.logged:
            self.logged = tokens // self.log_every
            running = ", ".join(f"{name} {value:.2f}" for name, value in perplexities.items()) or "not scored yet"
            self.console.print(f"{tokens:,} tokens: perplexity {running}", soft_wrap=True, highlight=False)

    def __exit__(self, *_) -> None:
        self.bar.stop()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
