"""What a memory is for: several methods answer questions about texts they have read, in one table and one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from . import flags, report
from .long_stream import own_positions
from .memory_cases import CONVERSATION, DEPTHS, MODES, NOTHING, TASKS, Answer, Score, Texts, ask, score
from .methods import cache_factory
from .passkey import CHUNK, SHIFT
from .run import ModelRun
from .streaming import REFERENCE
from .texts import load_text

DEFAULT_METHODS = ("full", "streaming", "adms_low_rank", "adms", "adms_recall")
# The task whose answers lie at known depths: the picture's.
DRAWN = "facts"


@dataclass
class MemoryArguments(flags.Output, flags.TextName, flags.Model):
    """The flags beside the settings of the cache."""

    lengths: list[int] = flags.argument("tokens of the texts (2048 6144)", (2048, 6144), metavar="N")
    tasks: list[str] = flags.argument(
        f"what is remembered: {', '.join(TASKS)} (all); name, a conversation of {CONVERSATION:,} tokens or more, is tried "
        "once for all shorter lengths",
        tuple(TASKS),
        metavar="TASK",
    )
    modes: list[str] = flags.argument(
        "how questions and answers are read: chunked, as the text is, or decoded, one token at a time (chunked)",
        MODES[:1],
        metavar="MODE",
    )
    trials: int = flags.count("texts of each task and length (%(default)s)", 1)
    methods: list[str] = flags.methods(DEFAULT_METHODS)
    chunk_size: int = flags.count("tokens a forward pass while a text is read; 1: one by one (%(default)s)", CHUNK)
    output_dir: str = flags.directory("results/memory")
    log_every: int = flags.count("print a line for each text; 0: none (%(default)s)", 1)
    markdown: flags.Switch = flags.switch("print the table in Markdown too")


class Memory(ModelRun):
    """Ask several methods for what was in a text they have read, in questions that were not known before.

    A score is the log-likelihood of the right answers, relative: 1 is the full cache's, 0 that of a model that was not given
    the text. Facts in a book, several needles at once, a table to copy, a variable handed on, a passage read again, and the
    user's name after 40 turns.
    """

    prog = "memory.py"
    Arguments = MemoryArguments
    picture = "memory.png"

    def check(self) -> None:
        super().check()
        given = self.arguments
        self.tasks, self.modes = (
            _chosen(name, flags.split_names(items), known)
            for name, items, known in (("tasks", given.tasks, tuple(TASKS)), ("modes", given.modes, MODES))
        )
        if min(given.lengths) < 512:
            raise ValueError(f"lengths: {min(given.lengths)} is too small; a length must be at least 512")
        # What all others are measured against is always asked.
        names = [REFERENCE, *(name for name in flags.split_names(given.methods) if name != REFERENCE)]
        self.plans = own_positions(self.plan(names), self.settings)

    def measure(self) -> Iterator[None]:
        """Ask every method about every text."""
        given, self.answers = self.arguments, []
        longest = max(*given.lengths, CONVERSATION) + given.trials * SHIFT + 1024
        filler = load_text(self.tokenizer, given.dataset_name, num_eval_tokens=longest).streams[0]
        texts = Texts(self.tokenizer, filler, self.seed)
        makers: dict[str, Callable[[], Any]] = {NOTHING: lambda: DynamicCache(config=self.model.config)}
        makers |= {plan.method.name: cache_factory(self.model, plan) for plan in self.plans}
        for task in self.tasks:
            lengths = [max(length, CONVERSATION) if task == "name" else length for length in given.lengths]
            for length in dict.fromkeys(lengths):
                for trial in range(given.trials):
                    case = texts.case(task, length, trial)
                    for mode in self.modes:
                        for method, make in makers.items():
                            self.answers += ask(self.model, texts, case, make(), method, mode, given.chunk_size)
                            if given.log_every:
                                self._tell(case, mode, method)
                            if method not in (NOTHING, REFERENCE):
                                yield
        if not self.plans[1:]:
            yield

    def _tell(self, case, mode: str, method: str) -> None:
        own = [found for found in self.answers if found.trial == case.trial]
        line = _line(own, case.task, case.length, mode, method)
        told = (
            f"{case.task}, {case.length:,} tokens, {mode}, {method}: nll {line.score.nll:.3f}, exact {line.score.exact:.0%}"
        )
        self.console.print(told, soft_wrap=True, highlight=False)

    def document(self) -> dict[str, Any]:
        results = {
            "answers": [asdict(answer) for answer in self.answers],
            "scores": [asdict(line) for line in lines(self.answers)],
        }
        return report.document(self.recorded(trained_length=self.trained_length), self.device, results, {})

    def plot(self, path: Path) -> None:
        """Draw the scores of the facts over depth and length; without facts, those of all tasks over length."""
        plot(path, self.answers, f"{self.model_name}: what is remembered of {DRAWN}")

    def table(self) -> None:
        """Print the table, and where asked for in Markdown."""
        caption = (
            f"'relative': 1 as with the full cache, 0 as without the text; '-' where the full cache has nothing of it, or "
            f"beside {REFERENCE} itself."
        )
        found = lines(self.answers)
        report.print_columns(found, COLUMNS, f"{self.model_name}: what is remembered", caption, self.console)
        if self.arguments.markdown:
            print(report.markdown_columns(found, COLUMNS))


def _chosen(name: str, items: Sequence[str], known: Sequence[str]) -> list[str]:
    for item in items:
        if item not in known:
            raise ValueError(f"{name}: {item!r} is not known; choose from {', '.join(known)}")
    if not items:
        raise ValueError(f"{name} is empty; choose from {', '.join(known)}")
    return list(dict.fromkeys(items))


@dataclass(frozen=True)
class Line:
    """A line of the table: a method's score in a task at a length."""

    task: str
    length: int
    mode: str
    method: str
    score: Score


COLUMNS: report.Columns = {
    "task": lambda line: line.task,
    "length": lambda line: f"{line.length:,}",
    "mode": lambda line: line.mode,
    "method": lambda line: line.method,
    "relative": lambda line: report.cell(line.score.relative, "{:.3f}"),
    "nats a token": lambda line: f"{line.score.nll:.3f}",
    "exact": lambda line: f"{line.score.exact:.0%}",
    "questions": lambda line: f"{line.score.counted}/{line.score.questions}",
}


def _line(answers: Sequence[Answer], task: str, length: int, mode: str, method: str) -> Line:
    own = [a for a in answers if (a.task, a.length, a.mode, a.method) == (task, length, mode, method)]
    return Line(task, length, mode, method, score(own, answers))


def lines(answers: Sequence[Answer]) -> list[Line]:
    """The table's lines, by task, length, mode and method in the order they were run."""
    places = dict.fromkeys((answer.task, answer.length, answer.mode, answer.method) for answer in answers)
    return [_line(answers, *place) for place in places]


def plot(path: Path, answers: Sequence[Answer], title: str) -> None:
    """Draw a panel a method, depth over length, each cell with its relative score (needs `matplotlib`).

    Without answers to `DRAWN` the rows are the tasks instead. The share answered exactly stands below a cell's score.
    """
    drawn = [answer for answer in answers if answer.task == DRAWN]
    rows = [("depth", f"{depth:g}", lambda a, depth=depth: a.depth == depth) for depth in DEPTHS]
    if not drawn:
        drawn = list(answers)
        rows = [("task", task, lambda a, task=task: a.task == task) for task in dict.fromkeys(a.task for a in drawn)]
    lengths = sorted({answer.length for answer in drawn})
    methods = [name for name in dict.fromkeys(answer.method for answer in drawn) if name != NOTHING]
    figure = report.new_figure(1.2 + max(1.3, 0.75 * len(lengths)) * len(methods), 1.5 + 0.5 * len(rows))
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, method in zip(panels, methods, strict=True):
        own = [answer for answer in drawn if answer.method == method]
        cells = [[[a for a in own if a.length == length and fits(a)] for length in lengths] for _, _, fits in rows]
        scores = [[score(cell, answers) if cell else None for cell in row] for row in cells]
        values = [[float("nan") if s is None or s.relative is None else s.relative for s in row] for row in scores]
        # One colour scale that is told apart with any colour vision, and in grey: dark is forgotten, light remembered.
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(scores):
            for x, found in enumerate(row):
                if found is None:
                    continue
                told = report.cell(found.relative, lambda share: f"{round(share, 2) + 0.0:.2f}") + f"\n{found.exact:.0%}"
                dark = found.relative is not None and found.relative < 0.5
                axes.text(x, y, told, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set_title(method, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_xlabel("tokens read", fontsize=8)
    panels[0].set_yticks(range(len(rows)), [name for _, name, _ in rows], fontsize=8)
    panels[0].set_ylabel("depth in the text" if rows[0][0] == "depth" else "", fontsize=9)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9, pad=0.02)
    bar.set_label("log-likelihood of the right answer\n0: no context, 1: full cache", fontsize=8)
    figure.suptitle(f"{title}\n(below each score: answered exactly)", fontsize=10, x=0.01, ha="left")
    report.save_figure(figure, path)
