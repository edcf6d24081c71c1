"""The flags of the evaluation scripts: fields of dataclasses, read by `transformers.HfArgumentParser` or from a file."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg, HfArgumentParser

from .. import ADMSConfig
from .methods import FEATURES, METHODS, resolve_settings

BAD_USAGE = 2

# A bool with flags of its own, `--name` and `--no-name`, where HfArgumentParser would make `--name true`.
Switch = typing.NewType("Switch", bool)


class _Switch(argparse.BooleanOptionalAction):
    def __init__(self, option_strings: Sequence[str], dest: str, type: Any = None, **options: Any):
        # HfArgumentParser gives every action the field's type.
        super().__init__(option_strings, dest, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        # argparse's own ignores a spelling that is not among `option_strings`, as the one with hyphens.
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


class _Import(argparse.Action):
    """Import a user's module as soon as its name is read, so that what it registers is known to what follows."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            import_module(values)
        except Exception as error:
            parser.error(f"can't import {values}: {type(error).__name__}: {error}")


def import_module(name: str) -> None:
    """Import a module by its name, or from its file, under the file's name; once is enough."""
    path = Path(name).expanduser()
    if path.suffix != ".py":
        importlib.import_module(name)
        return
    if path.stem in sys.modules:
        if getattr(sys.modules[path.stem], "__file__", None) != str(path.resolve()):
            raise ImportError(f"a module named {path.stem} is already there: give the file another name")
        return
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def argument(help: str, default: Any = None, **options: Any) -> Any:
    """A field with its help and default; `options`: others of `argparse`'s `add_argument`."""
    if isinstance(default, (list, tuple)):
        return HfArg(help=help, default_factory=lambda: list(default), metadata=options)
    return HfArg(help=help, default=default, metadata=options)


def count(help: str, default: int | None = None) -> Any:
    """A field for a number of tokens or the like."""
    return argument(help, default, metavar="N")


def switch(help: str, default: bool = False) -> Any:
    """A field of type `Switch`."""
    return argument(help, default, action=_Switch)


def methods(default: Sequence[str]) -> Any:
    """The field of the methods to compare."""
    known = f"methods to compare, at equal tokens a head: {', '.join(METHODS)} ({' '.join(default)})"
    return argument(known, default, metavar="METHOD")


def directory(default: str) -> Any:
    """The field of where a command writes."""
    return argument("where results.json and the plot go (%(default)s)", default, metavar="DIR")


@dataclass
class Model:
    """What is run and on what."""

    model_name_or_path: str | None = argument(
        "gemma3-270m, hub name, local folder or .gguf file (SmolLM2-135M-Instruct)", metavar="NAME"
    )
    dtype: str = argument("float32, bfloat16, float16 or auto (%(default)s)", "float32")
    device: str = argument("auto, cpu, cuda, cuda:1, mps (%(default)s)", "auto")


@dataclass
class TextName:
    """Where a text comes from."""

    dataset_name: str | None = argument(
        "a text file (.txt, .md, also gzipped), or a name or folder for the datasets library "
        "(the shipped novel, Pride and Prejudice)",
        metavar="NAME",
    )


@dataclass
class Text:
    """What of a data set, and from where on, a text is read."""

    task: str | None = argument("the data set's configuration, such as wikitext-2-raw-v1")
    split: str = argument("the data set's split (%(default)s)", "test")
    text_field: str = argument("the data set's column that holds the text (%(default)s)", "text")
    skip_tokens: int = count("begin behind the first N tokens of the text (%(default)s)", 0)
    num_eval_tokens: int = count("tokens to run in total (%(default)s)", 6144)


@dataclass
class Output:
    """How much at once, and what is told."""

    chunk_size: int = count("tokens a forward pass; 1: one by one (%(default)s)", 64)
    output_dir: str = directory("results")
    log_every: int = count("print a line every N tokens; 0: never (%(default)s)", 1024)


def cache_settings(recent: int, middle: int) -> type:
    """A dataclass of the file of flags and of every field of `ADMSConfig`, None for each that is not given.

    `recent`, `middle`: the sizes that hold where none are given, as of `resolve_settings`.
    """
    file = "JSON object of these flags and settings by name; flags on the command line win over it"
    fields = [("config", str, argument(file, metavar="FILE"))]
    defaults, kinds = resolve_settings({}, recent, middle), typing.get_type_hints(ADMSConfig)
    defaults["compressed_budget"] = f"{defaults['compressed_budget']}: {middle} less sketch_budget and replay_budget"
    for field in dataclasses.fields(ADMSConfig):
        text = "seed of torch's and the cache's random numbers" if field.name == "seed" else field.metadata["help"]
        text = f"{text.rstrip('.')} ({defaults.get(field.name, field.default)})".replace("%", "%%")
        kind = kinds[field.name]
        if kind is bool:
            fields.append((field.name, Switch, switch(text, None)))
            continue
        # What is allowed is checked by ADMSConfig, whose messages say more than argparse's.
        metavar = "|".join(map(str, field.metadata.get("options", ()))) or kind.__name__.upper()
        fields.append((field.name, kind, argument(text, metavar=metavar)))
    return dataclasses.make_dataclass("Settings", fields, namespace={"_argument_group_name": "cache settings"})


class Parser(HfArgumentParser):
    """A parser of one dataclass and, where `sizes` are given, of the settings of `ADMSConfig`; its errors are one line.

    `sizes`: recent window and middle that hold where none are given.
    """

    def __init__(self, prog: str, description: str, arguments: type, sizes: tuple[int, int] | None = None):
        kinds = [arguments] if sizes is None else [arguments, cache_settings(*sizes)]
        # The help texts tell the defaults themselves; the description has lines of its own.
        form = argparse.RawDescriptionHelpFormatter
        description, usage = inspect.cleandoc(description), f"{prog} [flags]"
        super().__init__(kinds, prog=prog, usage=usage, description=description, allow_abbrev=False, formatter_class=form)
        if sizes is not None:
            text = "import this module or .py file first: for a compressor of your own, which it registers"
            self.add_argument("--import", action=_Import, dest=argparse.SUPPRESS, metavar="FILE", help=text)
        for feature in FEATURES if sizes is not None else ():
            off = {"action": "store_false", "default": argparse.SUPPRESS, "help": f"the same as --no-{feature}"}
            self.add_argument(f"--disable_{feature.removeprefix('enable_')}", dest=feature, **off)
        for action in self._actions:
            # HfArgumentParser also takes hyphens for underscores; help and errors name one flag.
            action.option_strings = [name for name in action.option_strings if "-" not in name[2:].removeprefix("no-")]

    def error(self, message: str) -> typing.NoReturn:
        """Say on one line what is wrong, and exit with code 2."""
        self.exit(BAD_USAGE, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def flags(self) -> dict[str, argparse.Action]:
        """The flags by name."""
        return {action.option_strings[0][2:]: action for action in self._actions if action.dest != "help"}

    def parse(self, argv: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """The dataclass filled from `argv`, with the flags of a `--config` file before it, and the settings given."""
        own, *cache, unknown = self._read(argv)
        path = cache[0].config if cache else None
        if path:
            own, *cache, unknown = self._read([*self._flags_of_file(path), *argv])
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        given = {name: value for part in cache for name, value in vars(part).items() if value is not None}
        given.pop("config", None)
        return own, given

    def _read(self, argv: Sequence[str]) -> tuple[Any, ...]:
        return self.parse_args_into_dataclasses(list(argv), return_remaining_strings=True, look_for_args_file=False)

    def _flags_of_file(self, path: str) -> list[str]:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"can't read --config {path}: {error.strerror or error}")
        except ValueError as error:
            self.error(f"--config {path} is no valid JSON: {error}")
        if not isinstance(content, dict):
            self.error(f"--config {path} must hold one JSON object of names and values")
        flags = self.flags()
        unknown = [name for name in content if name not in flags or name == "config"]
        if unknown:
            self.error(f"--config {path} has unknown names: {', '.join(map(str, unknown))}")
        arguments: list[str] = []
        for name, value in content.items():
            nargs = flags[name].nargs
            if value is None:
                continue
            if nargs == 0:
                if not isinstance(value, bool):
                    self.error(f"--config {path}: {name} must be true or false, not {value!r}")
                spelled = f"--{name}" if value else f"--no-{name}"
                # That a module is not disabled says nothing.
                arguments += [spelled] if spelled in flags[name].option_strings else []
            elif isinstance(value, list) and nargs == "+":
                arguments += [f"--{name}", *map(str, value)]
            elif isinstance(value, (bool, list, dict)):
                self.error(f"--config {path}: {name} can't be {json.dumps(value)}")
            else:
                arguments.append(f"--{name}={value}")
        return arguments


def split_names(items: Sequence[str]) -> list[str]:
    """Names given apart or joined by commas."""
    return [name for item in items for name in item.split(",") if name]
