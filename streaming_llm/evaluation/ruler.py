"""RULER's tasks that need no download (Hsieh et al. 2024, arXiv 2404.06654), through lm-eval, for several methods.

Their texts are made from five sentences of noise, from words and from numbers. Five of RULER's tasks hide their needles in
essays that lm-eval fetches from the hub: `VARIANTS` has those with several needles in noise instead, under names of their
own, for their scores can't be compared with the originals'. `DOWNLOADS` names what is left out.
"""

from __future__ import annotations

import functools
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import flags, report
from .errors import require
from .lm_eval import EXTRA, tokenizer_on_demand
from .passkey import CHUNK
from .run import ModelRun
from .streaming import REFERENCE

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
# What RULER's generator is told for a task of its own in noise: as its task of that name, but for the haystack.
VARIANTS: Mapping[str, Mapping[str, int]] = {
    "niah_multikey_1_noise": {"num_needle_k": 4},
    "niah_multivalue_noise": {"num_needle_v": 4},
    "niah_multiquery_noise": {"num_needle_q": 4},
}
DOWNLOADS = (
    *("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"),
    *("ruler_qa_squad", "ruler_qa_hotpot"),
)
DEFAULT_METHODS = ("full", "streaming", "h2o", "snapkv", "tova", "adms_low_rank", "adms", "adms_recall")


@dataclass(frozen=True)
class Score:
    """One method's answers to one task at one length: the share of what was asked for in each, 0 to 1."""

    method: str
    task: str
    length: int
    scores: tuple[float, ...]
    answers: tuple[str, ...]

    @property
    def mean(self) -> float:
        """The mean share."""
        return sum(self.scores) / len(self.scores)


def load_task(name: str, length: int, tokenizer_folder: str, seed: int):
    """A task of `TASKS` or `VARIANTS` with texts of up to `length` tokens; what lm-eval's `evaluate` takes."""
    import numpy
    from lm_eval.tasks import TaskManager

    # The generators share Python's and numpy's random numbers: a task's texts don't depend on what was made before it.
    random.seed(seed)
    numpy.random.seed(seed)
    metadata = {"pretrained": tokenizer_folder, "max_seq_lengths": [length]}
    manager = TaskManager(metadata=metadata)
    with tokenizer_on_demand():
        return manager.load([variant(name) if name in VARIANTS else name])


def variant(name: str) -> dict[str, Any]:
    """The definition of a task of `VARIANTS`: that of niah_single_1, with other texts."""
    from lm_eval.tasks.ruler.common_utils import process_results

    return {
        "task": name,
        "custom_dataset": functools.partial(in_noise, name),
        "dataset_path": "",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "gen_prefix": "{{gen_prefix}}",
        "target_delimiter": " ",
        "process_results": process_results,
        "generation_kwargs": {"do_sample": False, "temperature": 0.0, "max_gen_toks": 128, "until": []},
        "metadata": {"version": 1.0},
    }


def in_noise(name: str, **metadata: Any) -> dict[str, Any]:
    """The data set of a task of `VARIANTS`; `metadata` as lm-eval hands it on."""
    from lm_eval.tasks.ruler import niah_utils
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    kinds = {"type_haystack": "repeat", "type_needle_k": "words", "type_needle_v": "numbers"}
    made = (
        niah_utils.generate_samples(
            niah_utils.get_haystack(type_haystack="repeat"),
            max_seq_length=length,
            template=niah_utils.TEMPLATE,
            TOKENIZER=get_tokenizer(metadata["pretrained"]),
            **kinds,
            **VARIANTS[name],
        )
        for length in metadata["max_seq_lengths"]
    )
    return niah_utils.download_dataset(made)


def score(model, task, name: str, length: int, method: str, limit: int) -> Score:
    """Let lm-eval ask a model the first `limit` questions of a task that `load_task` gave."""
    from lm_eval.evaluator import evaluate

    (samples,) = evaluate(model, task, limit=limit, bootstrap_iters=0)["samples"].values()
    scores = tuple(float(sample[str(length)]) for sample in samples)
    return Score(method, name, length, scores, tuple(sample["filtered_resps"][0] for sample in samples))


@dataclass
class RulerArguments(flags.Model):
    """The flags beside the settings of the cache."""

    lengths: list[int] = flags.argument(
        "most tokens of the texts, the answer's included (2048 4096 8192 16384)", (2048, 4096, 8192, 16384), metavar="N"
    )
    tasks: list[str] = flags.argument(
        f"tasks: {', '.join((*TASKS, *VARIANTS))} (all). Those of RULER that need a download are not among them: "
        f"{', '.join(DOWNLOADS)}",
        (*TASKS, *VARIANTS),
        metavar="TASK",
    )
    limit: int = flags.count("questions of each task at each length, at most 500 (%(default)s)", 20)
    methods: list[str] = flags.methods(DEFAULT_METHODS)
    chunk_size: int = flags.count("tokens a forward pass while a text is read (%(default)s)", CHUNK)
    full_tokens: int = flags.count("leave the full cache out of longer texts (%(default)s)", 16384)
    output_dir: str = flags.directory("results/ruler")
    log_every: int = flags.count("print a line for each task; 0: none (%(default)s)", 1)
    markdown: flags.Switch = flags.switch("print the table in Markdown too")


class Ruler(ModelRun):
    """Ask several methods the tasks of RULER that need no download, through lm-eval, and print a table of the scores.

    A score is the mean share of what was asked for that the answer has.
    """

    prog = "ruler.py"
    Arguments = RulerArguments
    least = {"limit": 1}
    packages = ("rich",)

    def check(self) -> None:
        super().check()
        given = self.arguments
        self.tasks = list(dict.fromkeys(flags.split_names(given.tasks)))
        for name in self.tasks:
            if name not in (*TASKS, *VARIANTS):
                why = "needs a download" if name in DOWNLOADS else "is not known"
                raise ValueError(f"tasks: {name!r} {why}; choose from {', '.join((*TASKS, *VARIANTS))}")
        if given.limit > 500:
            raise ValueError(f"limit={given.limit} is too large; lm-eval makes 500 questions of a task")
        if min(given.lengths) < 512:
            raise ValueError(f"lengths: {min(given.lengths)} is too small; a length must be at least 512")
        self.plans = self.plan(given.methods)

    def load(self) -> None:
        require("lm_eval", "nltk", "scipy", "wonderwords", extra=EXTRA)
        super().load()
        # It says at each call that a model was given as an object, and that scores of a few samples are no benchmark.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def measure(self) -> Iterator[None]:
        """Ask every method, the shortest texts first."""
        from .lm_eval_model import ADMSLM

        given, self.scores = self.arguments, []
        with tempfile.TemporaryDirectory() as folder:
            # RULER's generators read a tokenizer by its name.
            self.tokenizer.save_pretrained(folder)
            for length in dict.fromkeys(given.lengths):
                asked = [plan.method.name for plan in self.plans]
                if length > given.full_tokens and REFERENCE in asked:
                    asked.remove(REFERENCE)
                    self.console.print(f"full is left out of {length:,} tokens (--full_tokens)", highlight=False)
                for name in self.tasks:
                    task = load_task(name, length, folder, self.seed)
                    for method in asked:
                        model = ADMSLM(
                            pretrained=self.model,
                            tokenizer=self.tokenizer,
                            method=method,
                            chunk_size=given.chunk_size,
                            **self.settings,
                        )
                        found = score(model, task, name, length, method, given.limit)
                        self.scores.append(found)
                        if given.log_every:
                            told = f"{name}, {length:,} tokens, {method}: {found.mean:.3f}"
                            self.console.print(told, soft_wrap=True, highlight=False)
                        yield

    def document(self) -> dict[str, Any]:
        results = [vars(found) | {"mean": found.mean} for found in self.scores]
        return report.document(self.recorded(trained_length=self.trained_length), self.device, results, {})

    def table(self) -> None:
        """Print the table, and where asked for in Markdown."""
        shown, lines = columns(self.tasks), rows(self.scores)
        title = f"{self.model_name}: RULER through lm-eval, {self.arguments.limit} questions a task"
        caption = "'of full': the mean over the full cache's at that length."
        report.print_columns(lines, shown, title, caption, self.console)
        if self.arguments.markdown:
            print(report.markdown_columns(lines, shown))


@dataclass(frozen=True)
class Line:
    """A line of the table: one method at one length, its score in each task, and the full cache's mean score."""

    method: str
    length: int
    scores: Mapping[str, float]
    full: float | None

    @property
    def mean(self) -> float:
        """The mean over the tasks."""
        return sum(self.scores.values()) / len(self.scores)


def rows(scores: Sequence[Score]) -> list[Line]:
    """The table's lines, by length and method in the order they were run."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for entry in scores:
        found.setdefault((entry.length, entry.method), {})[entry.task] = entry.mean
    lines = []
    for (length, method), own in found.items():
        full = found.get((length, REFERENCE))
        lines.append(Line(method, length, own, sum(full.values()) / len(full) if full else None))
    return lines


def columns(tasks: Sequence[str]) -> dict[str, Callable[[Line], str]]:
    """The table's columns, a task each."""
    short = {task: task.removeprefix("ruler_").removeprefix("niah_").replace("_", " ") for task in tasks}
    return {
        "method": lambda line: line.method,
        "length": lambda line: f"{line.length:,}",
        **{short[task]: lambda line, task=task: report.cell(line.scores.get(task), "{:.2f}") for task in tasks},
        "mean": lambda line: f"{line.mean:.3f}",
        "of full": lambda line: f"{line.mean / line.full:.0%}" if line.full else "-",
    }
