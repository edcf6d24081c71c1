"""lm-eval's own command, which also knows the model `adms`: `adms-lm-eval --model adms --model_args ... --tasks ...`.

lm-eval has no way to find a model outside of its package: one must have been registered before its command runs. That, and
nothing else, is done here; every flag and every task is lm-eval's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence

from . import models
from .errors import EvaluationError, require
from .offline import MODELS

PROG = "adms-lm-eval"
MODEL = "adms"
EXTRA = "lm-eval"
# `pretrained=gemma3-270m` among arguments joined by commas, or as JSON has it.
NAMED = re.compile(rf'((?:^|,)\s*pretrained=|"pretrained"\s*:\s*")({"|".join(map(re.escape, MODELS))})(?=$|[,"])')


def register() -> None:
    """Let lm-eval know the model `adms`; may be called again. `EvaluationError` where lm-eval is not installed."""
    require("lm_eval", extra=EXTRA)
    import lm_eval.models  # noqa: F401  its own models come first
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=f"{__package__}.lm_eval_model:ADMSLM")


@contextlib.contextmanager
def tokenizer_on_demand() -> Iterator[None]:
    """Let RULER's tasks fetch nltk's sentence tokenizer when a text is cut into sentences, not when they are imported.

    Most of them never cut one, and a machine without a network would wait for a download that nothing needs.
    """
    if importlib.util.find_spec("nltk") is None:
        yield
        return
    import nltk

    download, cut, wanted = nltk.download, nltk.sent_tokenize, []

    def later(name: str, *options, **more) -> bool:
        wanted.append((name, options, more))
        return True

    def cut_now(text: str, *options, **more) -> list[str]:
        while wanted:
            name, given, named = wanted.pop()
            download(name, *given, **named)
        return cut(text, *options, **more)

    nltk.download, nltk.sent_tokenize = later, cut_now
    try:
        yield
    finally:
        nltk.download, nltk.sent_tokenize = download, cut


def with_own_model(argv: Sequence[str]) -> list[str]:
    """The arguments with the folder of a model of `offline.MODELS` in place of its name: tasks read its tokenizer there."""
    return [NAMED.sub(lambda found: found[1] + str(models.model_folder(MODELS[found[2]])), argument) for argument in argv]


def main(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval's command; its exit code, 1 with one line on stderr where an argument of the model is wrong."""
    given, before = sys.argv[1:] if argv is None else argv, sys.argv
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        sys.argv = [PROG, *with_own_model(given)]
        with tokenizer_on_demand():
            cli_evaluate()
    except EvaluationError as error:
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
