"""Reads a text with one cache and draws what is in it: memory map, budgets over time, what the last step recalled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import flags, plots, report, streaming
from .methods import RECALL, cache_factory
from .run import ModelRun


@dataclass
class PicturesArguments(flags.Output, flags.Text, flags.TextName, flags.Model):
    """The flags beside the settings of the cache."""

    num_eval_tokens: int = flags.count("tokens to read (%(default)s)", 3072)
    method: str = flags.argument("method whose cache is drawn: adms_recall, adms, ... (%(default)s)", RECALL)
    question: str = flags.argument(
        "read at the end; what its last token recalls is drawn (%(default)s)", " Mr. Bingley, who had taken Netherfield, was"
    )
    output_dir: str = flags.directory("results/pictures")


class Pictures(ModelRun):
    """Read a text and draw the cache: memory map, budgets over time, and what the last step read again."""

    prog = "pictures.py"
    Arguments = PicturesArguments

    def check(self) -> None:
        super().check()
        self.plans = self.plan([self.arguments.method])
        if self.plans[0].method.kind != "adms":
            raise ValueError(f"method={self.arguments.method!r} has nothing to draw; choose one that begins with adms")

    def load(self) -> None:
        super().load()
        output = Path(self.arguments.output_dir).expanduser()
        draw = {"reading.png": self.draw_reading, "budgets.png": self.draw_budgets, "memory_map.png": self.draw_memory}
        config = self.plans[0].config
        if not config.enable_recall:
            del draw["reading.png"]
        if not config.enable_adaptive_controller:
            del draw["budgets.png"]
        self.files = {output / name: write for name, write in draw.items()} | self.files

    def measure(self) -> Iterator[None]:
        """Read the text in chunks, then the question token by token."""
        given, text = self.arguments, self.text(self.arguments.dataset_name)
        stream = text.streams[0]
        self.title = f"{self.model_name} on {text.name}, {stream.numel():,} tokens"
        self.console.print(self.title, soft_wrap=True)
        self.cache, self.watch = cache_factory(self.model, self.plans[0])(), plots.Watch()
        caches = {given.method: self.cache}
        with self.progress(stream.numel()) as on_chunk:
            for chunk in streaming.lockstep(self.model, stream, caches, given.chunk_size):
                self.watch.sample(self.cache)
                on_chunk(chunk.end, {})
        question = self.tokenizer(given.question, add_special_tokens=False, return_tensors="pt").input_ids[0]
        for _ in streaming.lockstep(self.model, question, caches, 1):
            pass
        self.passages = plots.read_now(self.cache, self.tokenizer) if self.cache.config.enable_recall else []
        if not self.watch.budgets:
            # Too short a text: the controller had nothing to decide yet.
            self.files = {path: write for path, write in self.files.items() if path.name != "budgets.png"}
        yield

    def draw_memory(self, path: Path) -> None:
        """Write the memory map."""
        plots.plot_memory_map(path, self.cache, self.title)

    def draw_budgets(self, path: Path) -> None:
        """Write budgets and energies over time."""
        plots.plot_watch(path, self.watch, self.title)

    def draw_reading(self, path: Path) -> None:
        """Write what the last token of the question recalled."""
        plots.plot_reading(path, self.passages, f"What was read again for: {self.arguments.question.strip()}")

    def document(self) -> dict[str, Any]:
        passages = [
            {"weight": one.weight, "first": one.first, "text": "".join(t for t, _ in one.pieces)} for one in self.passages
        ]
        found = {"stats": self.cache.stats, "memory": self.cache.memory_report(), "passages": passages}
        return report.document(self.recorded(), self.device, found, {})

    def table(self) -> None:
        """Print what the cache says of itself."""
        self.console.print("\n".join(self.cache.report()), soft_wrap=True, markup=False)
