"""The comparison of methods at equal tokens a head on one text: `eval_adms_vs_streaming.py` and `compare_methods.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import flags, plots, report, streaming
from .methods import FEATURES, METHODS, RECALL, Plan, check_plans, plan_equal_bytes, resolve_settings
from .run import ModelRun
from .texts import check_joined


@dataclass
class ComparisonArguments(flags.Output, flags.Text, flags.TextName, flags.Model):
    """The flags beside the settings of the cache."""

    num_samples: int | None = flags.count("use at most N samples: rows of a data set; a file is one (all)")
    concat_stream: flags.Switch = flags.switch(
        "join the samples into one stream; otherwise each is a stream with a cache of its own (joined)", True
    )
    concat_limit: int | None = flags.count(
        "longest joined stream in tokens; what follows begins another with a new cache (no limit)"
    )
    min_seq_len: int = flags.count("leave out samples of fewer tokens (%(default)s)", 1)
    sep: str = flags.argument("text between joined samples; \\n and \\t are understood (%(default)s)", "\\n\\n")
    methods: list[str] = flags.methods(("full", "streaming", "adms", RECALL))
    score_from: int | None = flags.count("first scored token of each stream, from 0 (2048, or a third of a shorter stream)")
    equal_bytes: flags.Switch = flags.switch(
        f"give every method as many bytes, instead of as many tokens, as {RECALL} takes with an archive of the whole stream "
        "(recall_bits 4 unless given)"
    )
    decode_tokens: int = flags.count(
        "tokens decoded one by one after the stream, for their timing only; 0: none (%(default)s)", 128
    )


@dataclass
class EveryMethodArguments(ComparisonArguments):
    """The same flags, with other defaults."""

    methods: list[str] = flags.methods(tuple(METHODS))
    output_dir: str = flags.directory("results/compare_methods")


class Comparison(ModelRun):
    """Compare ADMS and StreamingLLM at equal tokens a head with the full cache, on one stream of text.

    For example:
      python examples/eval_adms_vs_streaming.py --num_eval_tokens 2048
      python examples/eval_adms_vs_streaming.py --dataset_name my_book.txt --recent_size 512 --compressed_budget 512
      python examples/eval_adms_vs_streaming.py --import my_compressor.py --compressor_type mine
    """

    prog = "eval_adms_vs_streaming.py"
    Arguments = ComparisonArguments
    picture = "perplexity.png"
    markdown = False

    def check(self) -> None:
        given = self.arguments
        self.plans = self.plan(given.methods)
        super().check()
        if given.score_from is not None and given.score_from >= given.num_eval_tokens:
            raise ValueError(
                f"score_from={given.score_from} leaves nothing to score of {given.num_eval_tokens} tokens (num_eval_tokens)"
            )
        check_joined(given.concat_stream, concat_limit=given.concat_limit, skip_tokens=given.skip_tokens)

    def measure(self) -> Iterator[None]:
        """Read the text with all methods in lockstep."""
        given = self.arguments
        sep = given.sep.replace("\\n", "\n").replace("\\t", "\t")
        text = self.read = self.text(given.dataset_name, sep=sep)
        streams = "1 stream" if len(text.streams) == 1 else f"{len(text.streams)} streams"
        self.console.print(f"{self.model_name}, {text.name}: {text.total_tokens:,} tokens in {streams}")
        if given.equal_bytes:
            longest = max(stream.numel() for stream in text.streams)
            names, settings = [plan.method.name for plan in self.plans], resolve_settings(self.settings, *self.sizes)
            self.plans = plan_equal_bytes(names, settings, self.model.config, self.model.dtype, longest)
            check_plans(self.plans)
        self.title = f"{self.model_name} on {text.name}, {text.total_tokens:,} tokens in chunks of {given.chunk_size}"
        self.found = self.evaluate(text, self.plans, decode_tokens=given.decode_tokens)
        yield

    @property
    def score_from(self) -> int | None:
        """The first scored token; None with several streams, whose scored tokens are no single stretch."""
        if len(self.read.streams) > 1:
            return None
        return self.arguments.score_from or streaming.default_score_from(self.read.total_tokens)

    def document(self) -> dict[str, Any]:
        text = self.read
        described = {"name": text.name, "tokens": text.total_tokens, "streams": len(text.streams)}
        scored = {} if self.score_from is None else {"score_from": self.score_from}
        return report.results_document(self.found, self.recorded(text=described, **scored), self.device)

    def plot(self, path: Path) -> None:
        plots.plot_perplexity(path, self.found, self.title, self.score_from or 0)

    def table(self) -> None:
        """Print both tables, and as one in Markdown."""
        report.print_tables(self.found, self.title, _caption(self.plans, self.arguments), self.console)
        if self.markdown:
            print(report.markdown_table(self.found))


class EveryMethod(Comparison):
    """Compare every method at equal tokens a head on one stream of text; prints the table in Markdown too.

    For example:
      python examples/compare_methods.py --methods full streaming snapkv adms --num_eval_tokens 4096
    """

    prog = "compare_methods.py"
    Arguments = EveryMethodArguments
    markdown = True


def _on(plan: Plan, feature: str) -> bool:
    return plan.method.name == "adms" and getattr(plan.config, feature)


def _caption(plans: Sequence[Plan], given: ComparisonArguments) -> str:
    bounded = [plan for plan in plans if plan.total_tokens is not None]
    if not bounded:
        return "KL in nats a token."
    totals = {plan.total_tokens for plan in bounded}
    every = f"every {bounded[0].interval} tokens"
    if given.equal_bytes:
        each = ", ".join(f"{plan.method.name} {plan.total_tokens:,}" for plan in bounded)
        equal = f"Equal bytes, the archive's included; tokens a head after a compaction, {every}: {each}."
    elif len(totals) == 1:
        equal = (
            f"Equal tokens: every method but full keeps {bounded[0].total_tokens:,} tokens a head when it compacts, {every}."
        )
    else:
        equal = "Equal tokens: tokens a head: " + ", ".join(f"{plan.method.name} {plan.total_tokens:,}" for plan in bounded)
        equal += f", {every}."
    modules = [feature.removeprefix("enable_") for feature in FEATURES if any(_on(plan, feature) for plan in bounded)]
    if modules:
        equal += f" 'adms' is ADMS with {', '.join(modules)}" + (
            ", which is ADM++." if len(modules) == len(FEATURES) else "."
        )
    text = f"{equal} KL in nats a token. 'cache' is the most bytes held, all state included"
    recalling = [plan.config for plan in bounded if plan.config.enable_recall]
    if not recalling:
        return f"{text}."
    config = recalling[0]
    text += " but recall's archive and its index, which are 'archive'"
    text += f"; {config.recall_budget} of its tokens are recalled ones"
    count = min(given.chunk_size * config.recall_budget, max(config.recall_budget, config.recall_chunk_budget))
    if given.chunk_size > 1:
        text += f", where tokens come one by one; the queries of a chunk of {given.chunk_size} share {count}"
    return f"{text}."
