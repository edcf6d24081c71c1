"""The one shape of an evaluation command: arguments, check, measurement, document, picture and table.

`Run.main` checks all arguments before anything is loaded, and has written what was measured after each part of it, each file
in one step: what is finished is kept, and nothing is half-written.
"""

from __future__ import annotations

import abc
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from . import flags, models, report, streaming, texts
from .errors import LEAST, EvaluationError, check_least, require
from .methods import DEFAULT_MIDDLE, DEFAULT_RECENT, Plan, cache_factory, check_plans, plan_methods, resolve_settings

INTERRUPTED = 130
FAILED = 1


class Run(abc.ABC):
    """A command, made of its parsed arguments. A subclass says what it measures and how that is shown; its own docstring is
    the description that `--help` gives.

    `Arguments`: the dataclass of its flags. `sizes`: recent window and middle where none are given; None where the settings
    of `ADMSConfig` are no flags. `least`: the smallest value of an argument, where not that of `LEAST`. `packages`: the
    optional ones it needs. `files`: those it writes, and what writes each.
    """

    prog: ClassVar[str]
    Arguments: ClassVar[type]
    sizes: ClassVar[tuple[int, int] | None] = (DEFAULT_RECENT, DEFAULT_MIDDLE)
    least: ClassVar[Mapping[str, int]] = {}
    packages: ClassVar[tuple[str, ...]] = ("rich",)
    plans: Sequence[Plan] = ()
    files: Mapping[Path, Callable[[Path], None]] = {}

    def __init__(self, arguments: Any, settings: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.settings = dict(settings)
        self.seed = self.settings.get("seed", 0)

    @classmethod
    def parser(cls) -> flags.Parser:
        """The parser of its command line."""
        return flags.Parser(cls.prog, cls.__doc__, cls.Arguments, cls.sizes)

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Run:
        """The run that a command line asks for; exits with code 2 where that can't be parsed."""
        return cls(*cls.parser().parse(argv))

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> int:
        """Run the command; its exit code, as of `exit_code`."""
        run = cls.parse(sys.argv[1:] if argv is None else argv)
        return exit_code(cls.prog, run.run)

    def run(self) -> int:
        """Check, load, measure, write and show; the exit code."""
        self.check()
        self.load()
        for _ in self.measure():
            for path, write in self.files.items():
                write(path)
        self.table()
        if self.files:
            self.console.print(f"wrote {' and '.join(map(str, reversed(self.files)))}", soft_wrap=True)
        return self.code()

    def check(self) -> None:
        """Raise `ValueError` for anything wrong with the arguments, naming the one that is."""
        check_least(vars(self.arguments), LEAST | dict(self.least))

    def plan(self, names: Sequence[str]) -> list[Plan]:
        """The methods named, which may be joined by commas, with the settings given; `ValueError` for a wrong one."""
        plans = plan_methods(flags.split_names(names), resolve_settings(self.settings, *self.sizes))
        check_plans(plans)
        return plans

    @functools.cached_property
    def console(self):
        """Where it prints."""
        from rich.console import Console

        return Console()

    def load(self) -> None:
        """Load what is needed, once all arguments were checked."""
        require(*self.packages)

    @abc.abstractmethod
    def measure(self) -> Iterable[None]:
        """Measure one part after another; yields when what was found so far can be written."""

    @abc.abstractmethod
    def table(self) -> None:
        """Print what was found."""

    def code(self) -> int:
        """The exit code of a run that came to its end."""
        return 0


class ModelRun(Run):
    """A command that loads a model and writes what it found into `output_dir`.

    `results`: the file of its `document`. `picture`: the file that its `plot(path)` draws, None where it has none.
    """

    packages = ("rich", "matplotlib")
    results: ClassVar[str] = "results.json"
    picture: ClassVar[str | None] = None

    def load(self) -> None:
        """See that the output directory can be written, and load the model."""
        super().load()
        given, output = self.arguments, Path(self.arguments.output_dir).expanduser()
        self.files = {} if self.picture is None else {output / self.picture: self.plot}
        self.files[output / self.results] = lambda path: report.write_json(path, self.document())
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("streaming_llm.evaluation").setLevel(logging.INFO)
        transformers.utils.logging.disable_progress_bar()
        self.device = models.resolve_device(given.device)
        report.prepare_output(output)
        for old, kept in report.keep_earlier(self.files):
            self.console.print(f"{old} of an earlier run is now {kept.name}", soft_wrap=True)
        torch.manual_seed(self.seed)
        self.model, self.tokenizer = self.load_model(given.dtype)
        self.model_name = given.model_name_or_path or models.MODEL_NAME

    def load_model(self, dtype: str) -> tuple[Any, Any]:
        """The model that is run, in a dtype, and its tokenizer."""
        return models.load_model(self.arguments.model_name_or_path, dtype, self.device)

    @property
    def trained_length(self) -> int | None:
        """Tokens the model was trained on; None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def text(self, dataset_name: str | None, **options: Any) -> texts.TextStreams:
        """The text of that name, None for the shipped novel, as the flags have it; `options` win over them."""
        known = inspect.signature(texts.load_text).parameters
        given = {name: value for name, value in vars(self.arguments).items() if name in known}
        return texts.load_text(self.tokenizer, **given | {"dataset_name": dataset_name} | options)

    def evaluate(self, text: texts.TextStreams, plans: Sequence[Plan], **options: Any) -> dict[str, streaming.MethodResult]:
        """Read a text with several methods in lockstep; `options`: others of `streaming.evaluate_streams`."""
        given, caches = self.arguments, {plan.method.name: cache_factory(self.model, plan) for plan in plans}
        options |= {"chunk_size": given.chunk_size, "score_from": given.score_from}
        progress, count = self.progress(text.total_tokens), options.get("decode_tokens", 0)
        with progress as on_chunk:
            options |= {
                "on_chunk": on_chunk,
                "on_decode": lambda name: progress.tell(f"decoding {count} tokens with {name}"),
            }
            return streaming.evaluate_streams(self.model, text.streams, caches, **options)

    @abc.abstractmethod
    def document(self) -> dict[str, Any]:
        """What its file of results holds; all that differs between two runs on one machine is under `timing`."""

    def recorded(self, **more: Any) -> dict[str, Any]:
        """What a document says of the run: its flags, each method's settings, and `more`."""
        given = vars(self.arguments) | self.settings
        given = {name: given[name] for name in sorted(given) if name != "output_dir"}
        return given | {"methods": {plan.method.name: plan.settings for plan in self.plans}} | more

    def progress(self, total: int) -> report.Progress:
        """A report of the progress through `total` tokens."""
        return report.Progress(self.console, total, self.arguments.log_every)


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
        return flags.BAD_USAGE if usage else FAILED
