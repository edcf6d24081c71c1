"""The token ids a cache has seen, by row, and the way back to where another text parts from them.

`generate` takes the whole conversation and slices off as many tokens as were seen, whatever they were: only the ids tell
that an answer was edited, a template dropped thinking, or the text is another one. Invariant: there is a column for each
token the layers have seen, padding included; a pass counts once it went well.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .data.autograd import unrecorded

logger = logging.getLogger("streaming_llm")

# In place of an id: padding (as `data/padding.py` records it), and tokens that came as embeddings (equal to any).
NO_TOKEN, UNKNOWN = -1, -2
# Passes whose ids may wait one by one; one that has as many tokens does not wait.
WAITING = 64


@dataclass
class SeenTokens:
    """Ids by row: on the device they came on until somebody asks for them, so that decoding waits for nothing.

    Attributes:
        chunks: int32 `[rows, columns]`, one behind the other, those that were asked for on the host; never written to.
        waiting: what came since: ids likewise, or rows `[rows]`, where row `i` became what row `rows[i]` was.
        rows, length: rows and columns of all together.
    """

    chunks: list[torch.Tensor] = field(default_factory=list)
    waiting: list[torch.Tensor] = field(default_factory=list)
    rows: int = 0
    length: int = 0

    # The decoder that has read them: keys of one model mean nothing to another.
    _reader: ClassVar[weakref.ref | None] = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_reader"}

    def __deepcopy__(self, memo: dict) -> SeenTokens:
        twin = SeenTokens()
        vars(twin).update(vars(self), chunks=[*self.chunks], waiting=[*self.waiting])
        return twin

    def check_reader(self, decoder: torch.nn.Module) -> None:
        """Raise `ValueError` where another model, which is still there, has read what was seen."""
        reader = self._reader and self._reader()
        if self.length and reader is not None and reader is not decoder:
            raise ValueError(
                f"this cache holds a conversation of {self.length} tokens that another model has read: call cache.reset(), "
                "or make a new cache with enable_adms_llm(model, ...)"
            )
        if reader is None or not self.length:
            self._reader = weakref.ref(decoder)

    def append(self, ids: torch.Tensor, before: int) -> None:
        """Ids int32 `[rows, new]` came after `before` columns; those nobody told of are unknown."""
        if self.length > before:
            self.remove(self.length - before)
        if self.length and self.rows != ids.shape[0]:
            self.chunks, self.waiting, self.length = [], [], 0
        if self.length < before:
            self.waiting.append(ids.new_full((ids.shape[0], before - self.length), UNKNOWN))
        self.waiting.append(ids)
        self.rows, self.length = ids.shape[0], before + ids.shape[1]
        if len(self.waiting) >= WAITING or ids.shape[1] >= WAITING:
            self._settle()

    def remove(self, gone: int) -> None:
        """The last `gone` columns are taken back."""
        self.length = max(0, self.length - gone)
        while gone > 0 and (self.waiting or self.chunks):
            if self.waiting and self.waiting[-1].dim() == 1:
                self._settle()
            newest = self.waiting or self.chunks
            last = newest.pop()
            if last.shape[1] > gone:
                newest.append(last[:, :-gone])
            gone -= last.shape[1]

    def pick(self, rows: Any) -> None:
        """Row `i` becomes what row `rows[i]` was; `rows` is any index of one dimension."""
        if not self.length:
            return
        device = rows.device if isinstance(rows, torch.Tensor) else None
        self.waiting.append(torch.arange(self.rows, device=device)[rows])
        self.rows = self.waiting[-1].shape[0]
        if len(self.waiting) >= WAITING:
            self._settle()

    def whole(self) -> torch.Tensor:
        """All ids, int32 `[rows, length]`, on the host."""
        self._settle()
        if not self.chunks:
            return torch.zeros(self.rows, 0, dtype=torch.int32)
        chunks = [chunk.cpu() for chunk in self.chunks]
        self.chunks = chunks if len(chunks) == 1 else [torch.cat(chunks, dim=1)]
        return self.chunks[0]

    def _settle(self) -> None:
        """Put what waits to the chunks."""
        chunks, kept = [*self.chunks], len(self.chunks)
        for entry in self.waiting:
            if entry.dim() == 2:
                chunks.append(entry)
            else:
                chunks, kept = [own.index_select(0, entry.to(own.device)) for own in _by_device(chunks)], 0
        chunks = [*chunks[:kept], *_by_device(chunks[kept:])]
        # Each chunk stays longer than the next: of n columns there are log(n), and each id is copied as often.
        while len(chunks) > 1 and chunks[-1].shape[1] >= chunks[-2].shape[1] and chunks[-1].device == chunks[-2].device:
            chunks[-2:] = [torch.cat(chunks[-2:], dim=1)]
        self.chunks, self.waiting = chunks, []


def _by_device(chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    """The chunks, neighbours of one device joined."""
    # Copies even of one: what came is part of the caller's tensor.
    return [torch.cat(list(own), dim=1) for _, own in itertools.groupby(chunks, key=lambda chunk: chunk.device)]


def ids_of(tokens: torch.Tensor) -> torch.Tensor:
    """New ids int32 `[rows, new]` to be kept, of ids `[rows, new]` or embeddings."""
    if tokens.dim() != 2 or tokens.is_floating_point():
        return torch.full(tokens.shape[:2], UNKNOWN, dtype=torch.int32, device=tokens.device)
    return tokens.to(torch.int32, copy=True)


class SeenMixin:
    """`rewind_to` of the cache."""

    seen_tokens: SeenTokens
    padding: list[tuple[tuple[int, int], ...]]

    @unrecorded()
    def rewind_to(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Go back to where a whole text and the tokens seen begin to differ, and tell what of the text is to be read.

        `ids, mask = cache.rewind_to(ids, mask); model(ids, attention_mask=mask, past_key_values=cache)` goes on as if only
        this text had been given. `generate` does so by itself. At least one token of each row is read again. Real tokens
        are compared, so rows may be padded otherwise than before; tokens that came as embeddings equal any.

        Args:
            input_ids: the text from its first token on, `[batch, tokens]`.
            attention_mask: its padding, 1 for real tokens, `[batch, tokens]`; None for none.

        Returns:
            What is to be read `[batch, new]`, and the mask for it: `attention_mask` where that fits, else one with a column
            for each token seen and new.

        Raises:
            ValueError: nothing is common, or what parts from it can't all be taken back any more; nothing has changed.
        """
        shape = input_ids.shape if attention_mask is None else attention_mask.shape
        if input_ids.dim() != 2 or not input_ids.shape[1] or shape != input_ids.shape:
            raise ValueError(
                f"input_ids of shape {list(input_ids.shape)} and attention_mask of shape {list(shape)} must both be "
                "[batch, tokens] of the whole text"
            )
        self._drop_unfinished()
        self._settle()
        seen, tokens = self.get_seq_length(), self.seen_tokens
        if not seen:
            return input_ids, attention_mask
        if tokens.length > seen:
            tokens.remove(tokens.length - seen)
        elif tokens.length < seen:
            tokens.append(torch.full((input_ids.shape[0], 0), UNKNOWN, dtype=torch.int32), seen)
        held = tokens.whole().clone()
        if held.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"input_ids of {input_ids.shape[0]} rows do not fit the cache, which holds a conversation of "
                f"{held.shape[0]}: call cache.reset() or make a new one"
            )
        for row, stretches in enumerate(self.padding):
            for first, last in stretches:
                held[row, first:last] = NO_TOKEN
        ids = input_ids.cpu()
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
        if _goes_on(held, ids, real):
            return input_ids[:, seen:], attention_mask
        texts = [row[own] for row, own in zip(ids, real, strict=True)]
        common = [_common(row[row != NO_TOKEN], text) for row, text in zip(held, texts, strict=True)]
        # The last token of a text is read (again): its logits are asked for.
        wanted = [max(0, min(count, text.shape[0] - 1)) for count, text in zip(common, texts, strict=True)]
        starts = (held != NO_TOKEN).cumsum(1) > torch.tensor(wanted)[:, None]
        gone = seen - int(torch.where(starts.any(1), starts.int().argmax(1), seen).amin())
        kept = held[:, : seen - gone] != NO_TOKEN
        aligned = real.shape[1] > kept.shape[1] and torch.equal(real[:, : kept.shape[1]], kept)
        # A sliding window counts columns: padding between tokens would take places in it.
        anew = not aligned and len(self._full_layers()) < len(self.layers)
        if anew or (gone > self.held_one_by_one and not self.stream.compacted):
            # All of it is read anew: nothing is lost by that before the first compaction.
            gone, aligned, kept = seen, True, kept[:, :0]
        if gone:
            another = any(not count and len(text) for count, text in zip(common, texts, strict=True))
            self._go_back(gone, _parting(held, texts, common), another)
        if aligned:
            return input_ids[:, kept.shape[1] :], attention_mask
        rest = [text[count:] for count, text in zip(kept.sum(1).tolist(), texts, strict=True)]
        width = max(len(text) for text in rest)
        new = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in rest])
        marks = torch.stack([torch.arange(width) >= width - len(text) for text in rest])
        like = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return new.to(input_ids), torch.cat([kept, marks], dim=1).to(like)

    def _go_back(self, gone: int, parting: str, another: bool) -> None:
        """Take back the last `gone` tokens, which a text does not go on from."""
        seen = self.get_seq_length()
        ways = (
            "Call cache.reset() or make a new cache for another text; for several texts with one beginning, or a turn that "
            "may be said otherwise, take copy.deepcopy(cache) before. generate takes input_ids as the whole text so far, or "
            "as what is new where attention_mask is as long as the whole"
        )
        held = self.held_one_by_one
        compacted = self.stream.compacted
        if another or (compacted and gone > held):
            recalls = any(stack.archive is not None for stack in self.stream.stacks)
            kept = "held one by one or archived" if recalls else "held one by one"
            why = f"the last {held} are {kept}, and {gone} would have to be taken back"
            why = "it has no beginning in common with them" if another else why
            raise ValueError(f"this cache holds a conversation of {seen} tokens, but {parting}: {why}. {ways}")
        recorded = any(getattr(layer, "record_past", False) for layer in self.layers)
        if gone == seen:
            self.reset()
        else:
            self.crop(-gone)
        if recorded:
            self.activate_past_recording()
        level = logging.INFO if self._told_rewound else logging.WARNING
        logger.log(level, "of the %d tokens seen the last %d are taken back: %s", seen, gone, parting)
        self._told_rewound = True


def _goes_on(held: torch.Tensor, ids: torch.Tensor, real: torch.Tensor) -> bool:
    """Whether a text, column by column, begins with what was seen; what its mask hides is not compared."""
    seen = held.shape[1]
    if ids.shape[1] <= seen or not bool(real[:, seen:].any(1).all()):
        return False
    before = real[:, :seen]
    same = (held == ids[:, :seen]) | (held == UNKNOWN) | ~before
    return bool(same.all()) and torch.equal(before.int().argmax(1), (held != NO_TOKEN).int().argmax(1))


def _common(held: torch.Tensor, text: torch.Tensor) -> int:
    """How many tokens of two rows `[tokens]` are equal before the first that differs."""
    least = min(held.shape[0], text.shape[0])
    differs = (held[:least] != text[:least]) & (held[:least] != UNKNOWN)
    return int(differs.int().argmax()) if bool(differs.any()) else least


def _parting(held: torch.Tensor, texts: list[torch.Tensor], common: list[int]) -> str:
    """Where the first row that does not go on parts from what was seen, in words."""
    for number, (row, text, count) in enumerate(zip(held, texts, common, strict=True)):
        own = row[row != NO_TOKEN]
        if count == len(text):
            return f"the text given ends after token {count - 1} of row {number}, with nothing new"
        if count < len(own):
            return f"the text given differs from token {count} of row {number} on: seen {own[count]}, given {text[count]}"
    return "the text given is padded otherwise"
