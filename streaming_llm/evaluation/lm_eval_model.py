"""lm-eval's model `adms`: its own `hf`, which reads and writes with the cache of one of the methods of a comparison.

A text is read in chunks of `chunk_size` tokens, as a stream is: given in one pass, all of it would be attended to whatever
the cache keeps afterwards. So a figure tells what the method remembers of a text that came before the question did.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from .. import ADMSConfig
from ..model.facts import cache_argument
from . import models
from .errors import EvaluationError
from .methods import Plan, cache_factory, check_plans, plan_methods, resolve_settings
from .offline import MODELS, SMOLLM2
from .passkey import CHUNK
from .streaming import Chunk, lockstep, predictions

DEFAULT_METHOD = "adms"
# What `hf` hands on to transformers' `from_pretrained` and is of use here.
HANDED_ON = ("attn_implementation", "device_map", "use_safetensors", "variant")
# Tokens of a text that a bounded cache reads to its end: more than any.
NO_LIMIT = 2**31 - 1


class ArgumentError(EvaluationError, ValueError):
    """An argument of the model is wrong; the message names it, its value and what is allowed."""


class ADMSLM(HFLM):
    """A causal language model with a bounded cache, for lm-eval.

    Args:
        pretrained: as for `hf`: a hub name, a folder, a loaded model; also a name of `offline.MODELS`, or a .gguf
            file.
        method: one of `METHODS`, as in a comparison of methods.
        chunk_size: tokens of a forward pass while a text is read.
        batch_size: rows of a batch that `generate` gets, padded on the left, so that a row's chunks begin elsewhere than
            alone: compare figures of one batch size. Log-likelihoods are computed row by row.
        **given: the settings of `ADMSConfig` and the arguments of `hf`, by name.

    Raises:
        ArgumentError: an argument that is not known, or has a value that is not allowed; nothing was loaded.
        EvaluationError: the model can't be had.
    """

    def __init__(
        self,
        pretrained: Any = SMOLLM2.name,
        method: str = DEFAULT_METHOD,
        chunk_size: int = CHUNK,
        batch_size: int | str = 1,
        **given: Any,
    ) -> None:
        settings = {name: given.pop(name) for name in ADMSConfig.setting_names() if name in given}
        self.plan = planned(method, settings)
        _check_number("chunk_size", chunk_size)
        # lm-eval finds the largest batch by passes of the longest text, which a bounded cache never makes.
        _check_number("batch_size", int(batch_size) if str(batch_size).isdecimal() else batch_size)
        _check_names(given)
        self.chunk_size = chunk_size
        model, given = _loaded(pretrained, given)
        super().__init__(pretrained=model, batch_size=batch_size, **given)
        try:
            self.make_cache = cache_factory(self.model, self.plan)
            self.make_cache()
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"pretrained={pretrained!r} with method={method!r}: {error}") from error

    @property
    def max_length(self) -> int:
        """Tokens of a text that are read: all of them, where the method keeps positions within the trained length."""
        bounded = self.plan.method.kind != "full" and self.plan.config.positions != "absolute"
        return self._max_length or (NO_LIMIT if bounded else super().max_length)

    def get_model_info(self) -> dict[str, Any]:
        """What `hf` says of the model, the method and its settings."""
        return super().get_model_info() | {"method": self.plan.method.name, "cache_settings": self.plan.settings}

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        cache = {cache_argument(self.model): self.make_cache()}
        return super()._model_generate(context, max_length, stop, prefill_chunk_size=self.chunk_size, **cache, **options)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each request `(key, context, continuation)` its log-likelihood in nats, and whether it is the likeliest.

        What several continuations follow is read once: each goes on from a copy of that cache.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            # As `hf` does, a text that is too long loses its beginning.
            room = max(1, self.max_length + 1 - len(continuation))
            groups.setdefault(tuple(context[-room:]), []).append(number)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for context, numbers in groups.items():
            cache = self.make_cache()
            following = [chunk.logits[-1:] for chunk in self._read(cache, context, len(context) - 1)][-1]
            for number in numbers:
                own = cache if number == numbers[-1] else copy.deepcopy(cache)
                key, _, continuation = requests[number]
                answers[number] = self._score(own, following, continuation)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[number])
                bar.update(1)
        bar.close()
        return answers

    def _read(self, cache: Any, tokens: Sequence[int], first_row: int):
        """Feed tokens to a cache, a chunk at a time, and yield the chunks with their logits from `first_row` on."""
        kind, dtype = self.device.type, self.mixed_precision_dtype
        with torch.autocast(device_type=kind, dtype=dtype, enabled=dtype is not None):
            yield from lockstep(self.model, torch.tensor(tokens), {self.plan.method.name: cache}, self.chunk_size, first_row)

    @torch.no_grad()
    def _score(self, cache: Any, following: torch.Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of tokens, and whether each is the likeliest; `following`: the logits `[1, vocab]` before them."""
        targets = torch.tensor(tokens, device=following.device)
        total, likeliest, scored = 0.0, True, 0
        for chunk in self._continued(cache, following, tokens[:-1]):
            own = targets[scored : scored + len(chunk.logits)]
            for rows, log_p, losses in predictions(chunk, chunk.logits, own):
                total -= losses.sum().item()
                likeliest = likeliest and bool((log_p.argmax(-1) == own[rows]).all())
            scored += len(own)
        return total, likeliest

    def _continued(self, cache: Any, following: torch.Tensor, tokens: Sequence[int]):
        yield Chunk(self.plan.method.name, 0, 1, 0, following, 0.0)
        if tokens:
            yield from self._read(cache, tokens, 0)


def planned(method: str, settings: dict[str, Any]) -> Plan:
    """The plan of a method with the settings given; `ArgumentError` for what is wrong with them."""
    try:
        (plan,) = plans = plan_methods([method], resolve_settings(settings))
        check_plans(plans)
        return plan
    except (TypeError, ValueError) as error:
        raise ArgumentError(str(error)) from error


def offline_folder(name: Any) -> Any:
    """The folder of a model of `offline.MODELS` where it is named, fetched on first use; any other name as it is."""
    return str(models.model_folder(MODELS[name])) if name in MODELS else name


def _loaded(pretrained: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What `hf` is to be given as `pretrained`, and its other arguments."""
    if not isinstance(pretrained, str):
        return pretrained, given
    if not pretrained.lower().endswith(".gguf"):
        return offline_folder(pretrained), given
    dtype, device = given.pop("dtype", None) or "auto", given.pop("device", None) or "auto"
    try:
        model, tokenizer = models.load_model(str(Path(pretrained)), dtype, device)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    return model, {"tokenizer": tokenizer} | given


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name}={value!r} must be a whole number, at least 1")


def _check_names(given: dict[str, Any]) -> None:
    own = [name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")]
    known = {*own, *HANDED_ON, *ADMSConfig.setting_names(), "method", "chunk_size"}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ArgumentError(
                f"{name}={value!r} is not known: {hint}Allowed are method, chunk_size, the settings of ADMSConfig and the "
                "arguments of lm-eval's hf"
            )
    if given.get("backend", "default") not in ("default", "causal"):
        raise ArgumentError(f"backend={given['backend']!r} can't be: the cache is for causal models; leave it out")
