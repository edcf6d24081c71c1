"""A conversation that never ends: each turn gives the model its new tokens only, the bounded cache is all it remembers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper

from .cache import ADMSKVCache
from .data.tokens import EXACT, PRECISION, RECENT, REPLAY, SINK, SKETCH, TIER_NAMES
from .model.facts import cache_argument
from .shown import tokens_by_tier
from .stats import format_bytes

logger = logging.getLogger(__name__)

# Stand-ins for what was said, by which the template's own text between two turns is found.
_USER, _ANSWER, _LAST = "(what the user said)", "(what the model answered)", "(what the user said last)"


class Turn(NamedTuple):
    """What the user said, after `start` tokens of the conversation, and what had still to be read before it."""

    start: int
    text: str
    owed: tuple[int, ...]


class Chat:
    """A conversation of one user with a model, held by an `ADMSKVCache` and nothing else.

    A token is given to the model before it is shown, so that what was shown is in the cache whatever interrupts an answer;
    the token that ends it is given with the next turn. So the cache alone says where the conversation is, and a saved one
    goes on in another process.

    Args:
        model: a causal language model, enabled by `enable_adms_llm`.
        tokenizer: its tokenizer, with a chat template. What that renders of the last turn once there is a new one may differ
            from what was read (it drops thinking): the cache goes back then, where it can, and reads it as rendered.
        cache: the cache of this conversation, for one row; empty, or that of a conversation with the same template.
        system: the system message; None for the template's own.
        max_new_tokens: most tokens of an answer.
        temperature: of the sampling; 0 takes the most likely token.
        top_p: sample from the most likely tokens with this much probability together.
        seed: of the sampling. An answer depends on it and on the conversation so far alone.

    Attributes:
        ending: why the last answer ended: "turn" (the model ended it), "length" (`max_new_tokens`) or "stopped".

    Raises:
        ValueError: a setting out of range, a tokenizer without a chat template, or a template that refuses the system
            message or can't be continued turn by turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: ADMSKVCache,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        check_answer_settings(max_new_tokens, temperature, top_p)
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self._cache_argument = cache_argument(model)
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.max_new_tokens, self.temperature, self.top_p, self.seed = max_new_tokens, temperature, top_p, seed
        self._turn_end, end_of_turn = self._learn_template()
        # What must come before anything else: the end of a turn that was cut while the model read it.
        self._owed: list[int] = []
        # The last turn, where the template renders it otherwise from the next on: see `_rewritten`.
        self._last: tuple[int, str, str] | None = None
        # Of the turns said, by number, those the cache can go back to.
        self._turns: dict[int, Turn] = {}
        self._said = 0
        self._stopped = False
        self.ending = ""
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
        # The special token a template ends turns with is one too, where the model's own settings forget it.
        known = tokenizer.added_tokens_decoder.get(end_of_turn)
        self._ends = frozenset({*ends, end_of_turn} if known is not None and known.special else ends)
        self._warpers = [TemperatureLogitsWarper(float(temperature))] if temperature not in (0, 1) else []
        self._warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    # -- turns -----------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> Iterator[str]:
        """Give the model the user's turn and yield its answer in pieces of text, whole characters each.

        The turn is read in chunks of `compression_interval` tokens, so that a long one needs no more memory. The iterator
        may be left at any piece, and after any exception the conversation can go on: what was shown is in it. A turn that is
        cut while the model reads it stays as far as it was read, with no answer; were it the first, it is forgotten.
        """
        self.ending = "stopped"
        cut, answer = bool(self._owed), None
        turn = self._turn(text)
        try:
            start, tokens = self._unread(text, turn)
            self._turns[self._said] = Turn(start, text, tuple(self._owed))
            self._said += 1
            logits = self._read(tokens)
            if logits is None:
                return
            answer = []
            pieces = TextPieces(self.tokenizer)
            # The state of the generator follows from the conversation: a saved one is sampled as it would have been.
            generator = torch.Generator().manual_seed((1_000_003 * self.seed + self.cache.get_seq_length()) % 2**63)
            for _ in range(self.max_new_tokens):
                token = self._pick(logits, generator)
                if self._stopped or token in self._ends:
                    self.ending = "stopped" if self._stopped else "turn"
                    break
                logits = self._feed([token])
                answer.append(token)
                if piece := pieces.put(token):
                    yield piece
            else:
                self.ending = "length"
            if piece := pieces.end():
                yield piece
        finally:
            self._stopped = False
            self._forget_turns()
            if answer is not None and not cut:
                self._last = self._rewritten(start, text, turn, answer)

    def _forget_turns(self) -> None:
        """Forget the last turn where nothing of it was read, and those the cache can't go back to any more."""
        seen, reach = self.cache.get_seq_length(), self.cache.held_one_by_one
        last = self._turns.get(self._said - 1)
        if last is not None and seen <= last.start + len(last.owed):
            self._said -= 1
            del self._turns[self._said]
        self._turns = {n: turn for n, turn in self._turns.items() if not turn.start or seen - turn.start <= reach}

    @property
    def turns(self) -> dict[int, str]:
        """What the user said in the turns that can be said otherwise, by number since the beginning, or `load`."""
        return {number: turn.text for number, turn in self._turns.items()}

    def edit(self, turn: int, text: str | None) -> Iterator[str]:
        """Let the user have said `text` in a turn of `turns`, and yield the answer to it, as `say` does.

        That turn and all after it are taken back at once, when this is called. A cache that recalls what left its window
        (`enable_recall`) can go back to any turn its archive reaches, another one to those it still holds exactly.

        Args:
            turn: its number; -1 is the last. text: None for what it was.

        Raises:
            ValueError: a turn there is not, or one too far back; nothing has changed.
        """
        number = turn + self._said if turn < 0 else turn
        if number not in self._turns:
            known = ", ".join(map(str, self._turns)) or "none"
            raise ValueError(f"turn={turn} can't be said otherwise: of {self._said} turns the cache can go back to {known}")
        chosen, before = self._turns[number], {own: known for own, known in self._turns.items() if own < number}
        if chosen.start == 0:
            self.reset()
        else:
            self.cache.crop(chosen.start - self.cache.get_seq_length())
        self._turns, self._said, self._owed, self._last = before, number, list(chosen.owed), None
        return self.say(chosen.text if text is None else text)

    def regenerate(self, turn: int = -1) -> Iterator[str]:
        """As `edit`, with the same text. `seed` is one more from then on, so that sampling gives another answer."""
        pieces = self.edit(turn, None)
        self.seed += 1
        return pieces

    def stop(self) -> None:
        """End the answer that is being given (or about to be) after the forward pass under way; for signal handlers."""
        self._stopped = True

    def reset(self) -> None:
        """Forget the conversation; the next turn is the first."""
        self.cache.reset()
        self._owed, self._last, self._turns, self._said = [], None, {}, 0

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to `path`; see `ADMSKVCache.save`."""
        self._read([])
        self.cache.save(path)

    def load(self, path: str | os.PathLike) -> None:
        """Go on with the conversation in `path`, in place of this one, with the settings its cache was saved with.

        Raises what `ADMSKVCache.load` raises; this conversation goes on then.
        """
        self.cache = ADMSKVCache.load(path, self.model)
        self._owed, self._last, self._turns, self._said = [], None, {}, 0

    # -- the template ----------------------------------------------------------------------------------------------------

    def _render(self, *said: str, prompt: bool = True) -> str:
        """The template of a conversation: what the user said, what the model answered, and so on."""
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]
        return self.tokenizer.apply_chat_template(self.system + messages, tokenize=False, add_generation_prompt=prompt)

    def _turn(self, text: str) -> str:
        """What the template adds to the conversation so far when the user says `text`, the end of the last answer first."""
        if self.cache.get_seq_length() == 0:
            return self._render(text)
        return self._render(_USER, _ANSWER, text).partition(_ANSWER)[2]

    def _since(self, start: int, *said: str) -> str:
        """What the template renders of the conversation from a turn on that began after `start` tokens."""
        return self._render(*said) if start == 0 else self._render(_USER, _ANSWER, *said).partition(_ANSWER)[2]

    def _rewritten(self, start: int, text: str, turn: str, answer: list[int]) -> tuple[int, str, str] | None:
        """Where a turn begins, what was said and what answered, where the next turn changes what is rendered of it."""
        said = self.tokenizer.decode(answer, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        same = self._since(start, text, said, _LAST).startswith(turn + said)
        return None if same else (start, text, said)

    def _unread(self, text: str, turn: str) -> tuple[int, list[int]]:
        """Where the new turn begins, and the tokens to be read: from where the last one is rendered otherwise now."""
        tokens, last = self._tokens(turn), self._last
        self._last = None
        if last is not None:
            start, *said = last
            earlier = self._tokens(self._since(start, *said, text).removesuffix(turn))
            ids = [*self.cache.seen_tokens.whole()[0, :start].tolist(), *earlier]
            try:
                rest, _ = self.cache.rewind_to(torch.tensor([ids + tokens]))
                return len(ids), rest[0].tolist()
            except ValueError as error:
                logger.info("the last turn stays as it was read: %s", error)
        return self.cache.get_seq_length(), tokens

    def _learn_template(self) -> tuple[int, int | None]:
        """How many tokens follow what the user said, and the first of those that follow an answer."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"tokenizer={type(self.tokenizer).__name__} has no chat template: take an instruct model, or set its "
                "chat_template to what the model was trained with"
            )
        try:
            answered = self._render(_USER) != self._render(_USER, prompt=False)
            first, _, turn = self._render(_USER, _ANSWER, _USER).partition(_ANSWER)
            whole = self._render(_USER, _ANSWER, _USER, _ANSWER, _LAST)
        except TemplateError as error:
            content = repr(self.system[0]["content"]) if self.system else None
            raise ValueError(f"system={content}: the chat template refuses such a conversation: {error}") from error
        ends = turn.replace(_USER, _LAST)
        # Of the turn between, the template may have changed what the answer follows.
        kept = whole.startswith(first + _ANSWER) and whole.endswith(_ANSWER + ends) and whole.count(_ANSWER) == 2
        if not (answered and kept and turn.count(_USER) == 1):
            raise ValueError(
                "the tokenizer's chat template can't be continued turn by turn: what it renders of a conversation and "
                "an answer does not begin what it renders of a longer one. Set another chat_template"
            )
        return len(self._tokens(turn.partition(_USER)[2])), next(iter(self._tokens(turn)), None)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # -- the model -------------------------------------------------------------------------------------------------------

    def _read(self, turn: Sequence[int]) -> torch.Tensor | None:
        """Logits `[1, vocab]` after a turn; None where it was stopped before its end."""
        before, step = self.cache.get_seq_length(), self.cache.config.compression_interval
        tokens, owed = [*self._owed, *turn], len(self._owed)
        logits = None
        try:
            for start in range(0, len(tokens), step):
                if self._stopped:
                    return None
                logits = self._feed(tokens[start : start + step])
            return logits
        finally:
            read = self.cache.get_seq_length() - before
            if before == 0 and read < len(tokens):
                self.reset()
            elif read <= owed:
                self._owed = tokens[read:owed]
            else:  # of a turn that is cut, the model has yet to be told that it ends
                self._owed = tokens[max(read, len(tokens) - self._turn_end) :]

    @torch.no_grad()
    def _feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits `[1, vocab]` after `tokens`. Where the pass fails, the cache is as it was."""
        ids = torch.tensor([tokens], device=self.model.device)
        try:
            # `generate` can't be used: given new tokens only, it wants a mask as long as the stream, or slices them.
            output = self.model(input_ids=ids, **{self._cache_argument: self.cache}, use_cache=True, logits_to_keep=1)
        except BaseException:
            # The cache's own hook is not called on KeyboardInterrupt, which torch does not count as an exception there.
            self.cache.abort_forward()
            raise
        return output.logits[:, -1]

    def _pick(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax(-1))
        scores = logits.float().cpu()
        for warper in self._warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    # -- what can be read ------------------------------------------------------------------------------------------------

    def recalled(self, most: int = 5, beside: int = 6) -> list[tuple[float, str]]:
        """The passages that the last pass read from the archive, `(weight, text)`, the strongest first.

        `beside` tokens are shown before and after those that were read; see `ADMSKVCache.recalled_passages`."""
        found, seen = self.cache.recalled_passages(most, beside), self.cache.seen_tokens.whole()
        return [(own, self.tokenizer.decode(seen[0, max(0, at - beside) : last + beside + 1])) for own, at, last in found]

    def stats(self) -> str:
        """Tokens seen and held, tokens by tier (of a head, on average), budgets, bytes by use and counters, in lines."""
        cache, config = self.cache, self.cache.config
        tiers, stats = tokens_by_tier(cache), cache.stats
        budgets = {
            SINK: config.dynamic_start_size,
            EXACT: config.compressed_budget,
            PRECISION: "with exact",
            SKETCH: config.sketch_budget,
            REPLAY: config.replay_budget,
            RECENT: f"{config.recent_size} and up to {config.compression_interval} new",
        }
        sizes = [f"{name} {format_bytes(size)}" for name, size in cache.memory_report().items() if size]
        counts = [f"{name.removeprefix('total_').replace('_', ' ')} {count:,}" for name, count in stats.items()]
        lines = [
            f"tokens seen {cache.get_seq_length():,}; a head holds {cache.held_tokens:,}, "
            f"never more than {config.expected_max_tokens:,}",
            "tier       tokens  budget",
            *(f"{TIER_NAMES[tier]:9} {tiers.get(tier, 0.0):7.1f}  {budget}" for tier, budget in budgets.items()),
            f"memory {format_bytes(cache.nbytes)}: {', '.join(sizes) or 'nothing yet'}",
            "totals over layers and heads:",
            *("  " + ", ".join(counts[start : start + 4]) for start in range(0, len(counts), 4)),
        ]
        if not stats["total_compressions"]:
            lines.insert(1, "(nothing was compacted yet: all are in the recent window)")
        return "\n".join(lines)


class TextPieces:
    """Text of tokens that come one by one, in pieces of whole characters; together they are the text of all tokens at once.

    A tokenizer may decode a token differently after another (leading spaces), and a character's bytes may be several tokens:
    a piece is what a token adds to the text of those of the last piece, kept back while its last character is incomplete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._context: list[int] = []
        self._new: list[int] = []

    def _added(self) -> str:
        def text(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        return text(self._context + self._new)[len(text(self._context)) :]

    def put(self, token: int) -> str:
        """The text that is complete with `token`; empty while a character is not."""
        self._new.append(token)
        added = self._added()
        return "" if added.endswith("\ufffd") else self._taken(added)

    def end(self) -> str:
        """The rest, whether complete or not."""
        return self._taken(self._added())

    def _taken(self, added: str) -> str:
        if added:
            self._context, self._new = self._new, []
        return added


def check_answer_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise `ValueError` naming the first of `Chat`'s settings that is out of range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be at least 0 (0: the most likely token)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be more than 0 and at most 1")
