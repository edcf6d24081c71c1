"""What a memory is for: texts with something in them to be asked for later, from the shipped novel and from made facts.

A text is read before the questions are known. They follow in turn, each with its right answer, so that all methods read
the same. Exact match has a floor that small models stand on; the log-likelihood of the right answer has none. It is told
relative to two others: the full cache's is 1, that of a model that was never given the text is 0.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .passkey import SHIFT
from .streaming import REFERENCE, lockstep, predictions, scored_part

# The method that every question is asked without its text.
NOTHING = "no context"
MODES = ("chunked", "decoded")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PASSAGE = 512
TURNS = 40
# A conversation of `TURNS` turns has at least as many tokens.
CONVERSATION = 8192
SAID_TOKENS = 24

FIRST = ("Ambrose", "Beatrix", "Clement", "Dorothea", "Edmund", "Flora", "Gilbert", "Hester", "Isidore", "Juliana")
PLACES = ("Ashcombe", "Birkwood", "Coldwell", "Dunmere", "Elmstead", "Foxley", "Garsdale", "Holmbury", "Inglewick", "Kelby")
THINGS = ("lantern", "violin", "compass", "kettle", "saddle", "mirror", "ledger", "anchor", "basket", "trumpet")
COLOURS = ("crimson", "emerald", "amber", "violet", "silver", "scarlet", "turquoise", "ivory", "golden", "indigo")


@dataclass(frozen=True)
class Question:
    """What is asked after a text, and the right answer, as text; `lead` are words of the answer that are given.

    `depth`: where in the text the answer is, 0 at its beginning and 1 at its end; None where it is in several places.
    """

    prompt: str
    answer: str
    depth: float | None = None
    lead: str = ""


@dataclass(frozen=True)
class Case:
    """A text, int64 `[tokens]`, and the questions that follow it, in turn."""

    task: str
    length: int
    trial: int
    text: torch.Tensor
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    """One method's answer to the question of that number: the log-likelihood, in nats, of the right answer's `tokens`.

    `exact`: each of its tokens is the likeliest; where words of it were given, a text generated without them has it.
    `said`: that text.
    """

    method: str
    task: str
    length: int
    trial: int
    number: int
    mode: str
    depth: float | None
    tokens: int
    log_likelihood: float
    exact: bool
    said: str | None = None


# -- texts and questions -----------------------------------------------------------------------------------------------


class Texts:
    """Makes the cases of all tasks from one filler, int64 `[tokens]`; what is made depends on the arguments and `seed`."""

    def __init__(self, tokenizer, filler: torch.Tensor, seed: int = 0) -> None:
        self.tokenizer, self.filler, self.seed = tokenizer, filler, seed

    def encode(self, text: str) -> torch.Tensor:
        """Token ids, int64 `[tokens]`, with nothing added."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    def case(self, task: str, length: int, trial: int) -> Case:
        """A case of one of `TASKS` with a text of `length` tokens, of `CONVERSATION` or more for a conversation."""
        return TASKS[task](self, length, trial)

    def chance(self, task: str, length: int, trial: int) -> random.Random:
        """The random numbers of one case."""
        return random.Random(f"{self.seed} {task} {length} {trial}")

    def passages(self, trial: int, tokens: int) -> torch.Tensor:
        """Filler of one trial, repeated where it is too short."""
        own = self.filler.roll(-trial * SHIFT)
        return own.repeat(-(-tokens // own.numel()))[:tokens]

    def with_parts(self, length: int, trial: int, parts: Sequence[tuple[float, str]]) -> torch.Tensor:
        """Filler of `length` tokens in all with a text set in at each of some depths, which are in order."""
        inserted = [(depth, self.encode(text)) for depth, text in parts]
        room = length - sum(ids.numel() for _, ids in inserted)
        if room < len(parts):
            raise ValueError(f"lengths: {length} leaves no room; this text needs {length - room} tokens beside the filler")
        filler, pieces, before = self.passages(trial, room), [], 0
        for depth, ids in inserted:
            place = round(depth * room)
            pieces += [filler[before:place], ids]
            before = place
        return torch.cat([*pieces, filler[before:]])

    def facts(self, length: int, trial: int) -> Case:
        """A fact at each of `DEPTHS`; all are asked for, in another order."""
        chance = self.chance("facts", length, trial)
        names, things = chance.sample(FIRST, len(DEPTHS)), chance.sample(THINGS, len(DEPTHS))
        places, colours = chance.sample(PLACES, len(DEPTHS)), chance.sample(COLOURS, len(DEPTHS))
        parts, questions = [], []
        for depth, *known in zip(DEPTHS, names, places, colours, things, strict=True):
            name, place, colour, thing = known
            parts.append((depth, f"\n\nIn the house of {name} of {place} there was a {colour} {thing}.\n\n"))
            asked = f"\n\nIn the house of {name} of {place} there was a"
            questions.append(Question(asked, f" {colour} {thing}.", depth))
        chance.shuffle(questions)
        return Case("facts", length, trial, self.with_parts(length, trial, parts), tuple(questions))

    def needles(self, length: int, trial: int) -> Case:
        """Four numbers at four depths, asked for all at once."""
        chance = self.chance("needles", length, trial)
        numbers = [str(number) for number in chance.sample(range(10_000, 100_000), 4)]
        name = chance.choice(FIRST)
        parts = [
            (depth, f"\n\nOne of the lucky numbers of {name} is {number}.\n\n")
            for depth, number in zip((0.2, 0.4, 0.6, 0.8), numbers, strict=True)
        ]
        asked = f"\n\nThe lucky numbers of {name}, in the order of the text, are:"
        question = Question(asked, f" {', '.join(numbers)}.")
        return Case("needles", length, trial, self.with_parts(length, trial, parts), (question,))

    def table(self, length: int, trial: int) -> Case:
        """A table of eight rows, in the middle of the text, to be copied."""
        chance = self.chance("table", length, trial)
        places = chance.sample(PLACES, 8)
        lines = [f"| {place} | {chance.choice(THINGS)} | {chance.randint(100, 999)} |\n" for place in places]
        head = "| place | thing | price |\n|---|---|---|\n"
        depth = chance.choice(DEPTHS)
        text = self.with_parts(length, trial, [(depth, f"\n\nThe table of prices:\n\n{head}{''.join(lines)}\n")])
        question = Question(f"\n\nThe table of prices, once more:\n\n{head}", "".join(lines), depth)
        return Case("table", length, trial, text, (question,))

    def variable(self, length: int, trial: int) -> Case:
        """A value handed on through four assignments, asked for at the last of them."""
        chance = self.chance("variable", length, trial)
        names = ["".join(chance.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=3)) for _ in range(4)]
        value = str(chance.randint(10_000, 99_999))
        sources = [value, *(f"VAR {name}" for name in names)]
        parts = [
            (depth, f"\n\nVAR {name} = {source}\n\n")
            for depth, name, source in zip((0.2, 0.4, 0.6, 0.8), names, sources, strict=False)
        ]
        asked = f"\n\nFollowing the assignments above, the number that VAR {names[-1]} holds is"
        text = self.with_parts(length, trial, parts)
        return Case("variable", length, trial, text, (Question(asked, f" {value}"),))

    def passage(self, length: int, trial: int) -> Case:
        """The first `PASSAGE` tokens, read again once `length` others have gone by; the answer is that passage."""
        text = self.passages(trial, PASSAGE + length)
        # Told as tokens: a passage that begins in the middle of a word would be cut otherwise.
        again = self.tokenizer.decode(text[:PASSAGE], clean_up_tokenization_spaces=False)
        return Case("passage", length, trial, text, (Question("\n\n", again, 0.0),))

    def name(self, length: int, trial: int) -> Case:
        """A conversation of `TURNS` turns: the user's name is told in the first, and asked for in the last."""
        chance = self.chance("name", length, trial)
        name, length = chance.choice(FIRST), max(length, CONVERSATION)
        answers = ("I see.", "Go on, please.", "That is well told.", "What happens next?")
        messages = [
            {"role": "user", "content": f"Hello! My name is {name}. I will read a book to you, page by page."},
            {"role": "assistant", "content": f"Hello {name}! I am glad to listen."},
        ]
        # As many tokens of the book a turn as make the whole longer than `length`.
        page = -(-length // (TURNS - 2))
        pages = self.passages(trial, page * (TURNS - 2)).split(page)
        for number, part in enumerate(pages):
            said = self.tokenizer.decode(part, clean_up_tokenization_spaces=False)
            messages.append({"role": "user", "content": said.strip()})
            messages.append({"role": "assistant", "content": answers[number % len(answers)]})
        asked = [*messages, {"role": "user", "content": "What is my name?"}]
        before = self.tokenizer.apply_chat_template(messages, tokenize=False)
        whole = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        question = Question(whole.removeprefix(before), f" {name}", 0.0, lead="Your name is")
        return Case("name", length, trial, self.encode(before), (question,))


TASKS: Mapping[str, Callable[[Texts, int, int], Case]] = {
    "facts": Texts.facts,
    "needles": Texts.needles,
    "table": Texts.table,
    "variable": Texts.variable,
    "passage": Texts.passage,
    "name": Texts.name,
}


# -- asking ------------------------------------------------------------------------------------------------------------


def ask(model, texts: Texts, case: Case, cache: Any, method: str, mode: str, chunk_size: int) -> list[Answer]:
    """Read a case's text into a cache, then its questions and right answers in turn; the answers' scores.

    The text is not read where `method` is `NOTHING`. `mode`: "chunked": a question and its answer are read in chunks of
    `chunk_size` as the text is; "decoded": one token at a time. The right answer's first token is predicted from the
    question's last, whatever the tokenizer would make of both together.
    """
    step = chunk_size if mode == "chunked" else 1
    if method != NOTHING:
        _feed(model, cache, case.text, chunk_size)
    answers = []
    for number, question in enumerate(case.questions):
        prompt, lead, answer = map(texts.encode, (question.prompt, question.lead, question.answer))
        said = None
        if question.lead:
            following = _feed(model, cache, prompt, step)
            said, prompt = _generate(model, texts, copy.deepcopy(cache), following), lead
        score, exact = _score(model, cache, torch.cat([prompt, answer]), prompt.numel(), step)
        if said is not None:
            exact = question.answer.strip() in said
        place = (case.task, case.length, case.trial, number, mode, question.depth)
        answers.append(Answer(method, *place, answer.numel(), score, exact, said))
    return answers


def _feed(model, cache: Any, tokens: torch.Tensor, step: int) -> torch.Tensor:
    """Feed tokens to a cache and return the logits `[1, vocab]` after the last."""
    return [chunk.logits[-1:] for chunk in lockstep(model, tokens, {"": cache}, step, tokens.numel() - 1)][-1]


def _score(model, cache: Any, tokens: torch.Tensor, first: int, step: int) -> tuple[float, bool]:
    """Feed tokens to a cache; the log-likelihood of those from `first` on, and whether each is the likeliest."""
    targets = tokens.to(next(model.parameters()).device)
    total, likeliest = 0.0, True
    for chunk in lockstep(model, tokens, {"": cache}, step, first - 1):
        logits, scored = scored_part(chunk, tokens.numel(), first)
        own = targets[scored.start : scored.stop]
        for rows, log_p, losses in predictions(chunk, logits, own):
            total -= losses.sum().item()
            likeliest = likeliest and bool((log_p.argmax(-1) == own[rows]).all())
    return total, likeliest


def _generate(model, texts: Texts, cache: Any, following: torch.Tensor) -> str:
    """The likeliest `SAID_TOKENS` tokens after logits `[1, vocab]`, as text, up to where the model ends."""
    ends, said = model.generation_config.eos_token_id, []
    ends = {*(ends if isinstance(ends, list) else [ends]), texts.tokenizer.eos_token_id}
    for _ in range(SAID_TOKENS):
        token = int(following.argmax(-1))
        if token in ends:
            break
        said.append(token)
        following = _feed(model, cache, torch.tensor([token]), 1)
    return texts.tokenizer.decode(said)


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One method's answers to some questions together.

    `nll`: nats a token of the right answers. `exact`: the share of questions answered exactly. `relative`: what the text is
    worth to the method, over what it is worth to the full cache, `(own - no context) / (full - no context)` of the summed
    log-likelihoods; over the questions to which the full cache's text is worth something, which are `counted` of
    `questions`; None for none.
    """

    nll: float
    exact: float
    relative: float | None
    questions: int
    counted: int


def score(answers: Iterable[Answer], everything: Iterable[Answer]) -> Score:
    """The score of one method's answers; `everything` holds the full cache's and those without context too."""
    own = list(answers)
    known = {(answer.method, *_question(answer)): answer for answer in everything}
    gained = possible = 0.0
    counted = 0
    for answer in own:
        pair = [known.get((method, *_question(answer))) for method in (REFERENCE, NOTHING)]
        if None in pair or pair[0].log_likelihood <= pair[1].log_likelihood:
            continue
        full, nothing = (reference.log_likelihood for reference in pair)
        gained, possible, counted = gained + answer.log_likelihood - nothing, possible + full - nothing, counted + 1
    return Score(
        nll=-sum(answer.log_likelihood for answer in own) / sum(answer.tokens for answer in own),
        exact=sum(answer.exact for answer in own) / len(own),
        relative=gained / possible if counted else None,
        questions=len(own),
        counted=counted,
    )


def _question(answer: Answer) -> tuple[Any, ...]:
    return answer.task, answer.length, answer.trial, answer.number, answer.mode
