"""One layer as transformers sees it: it answers questions, and what it holds is the stream's."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from .data.rope import Rope
from .data.tokens import WeightedTokens
from .stream.passes import StackPass
from .stream.stream import Stream


class ADMSLayer(CacheLayerMixin):
    """The weighted tokens of one layer: `[sinks | middle | recent window]`, new tokens behind.

    Args:
        stream: what holds them.
        number: which of the cache's layers it is.
        rope: how its keys turn with position; None where that is not known.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, stream: Stream, number: int, rope: Rope | None = None):
        self.stream, self.number = stream, number
        stream.ropes[number] = rope

    # -- what is held ----------------------------------------------------------------------------------------------------

    @property
    def stack(self):
        """The stack that holds the layer, as the last pass left it; None before the first token."""
        return self.stream.stack_of(self.number)

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything."""
        return self.stack is not None

    @property
    def compacted(self) -> bool:
        """Whether any row was compacted."""
        return self.stack is not None and self.stack.compacted

    @property
    def record_past(self) -> bool:
        """Whether passes count only with the next `crop`."""
        return self.stream.records_past

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.stack.tokens.keys.dtype

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.stack.device

    @property
    def rope(self) -> Rope | None:
        """How the layer's keys turn with position."""
        return self.stream.ropes[self.number]

    @property
    def held(self) -> WeightedTokens:
        """All slots up to the longest row's last, `[batch, kv_heads, tokens, ...]`; free ones and padding have
        `beta = -inf`."""
        self.stream.settle()
        stack = self.stack
        return stack.attended().map(lambda tensor: stack.of_layer(self.number, tensor))

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, `[batch, kv_heads, tokens, head_dim]`, a view; None before the first token."""
        return self._states("keys")

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._assign("keys", states)

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, `[batch, kv_heads, tokens, value_dim]`, a view; None before the first token."""
        return self._states("values")

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._assign("values", states)

    def _states(self, name: str) -> torch.Tensor | None:
        """Keys or values as held, those of the pass under way among them once they came."""
        part, stack = self.stream.part_of(self.number), self.stack
        if part is not None and self.number in part.written:
            return part.attended(self.number, name)
        return None if stack is None else stack.of_layer(self.number, getattr(stack.tokens, name))[:, :, : stack.columns]

    def _assign(self, name: str, states: torch.Tensor | None) -> None:
        # kvpress's pipeline takes an answer back by assigning what came before it.
        if states is None:
            return
        own = getattr(self, name)
        first = own is not None and states.data_ptr() == own.data_ptr() and states.stride() == own.stride()
        if not first or states.shape[2] > own.shape[2]:
            raise ValueError(f"{name} can't be assigned to: the cache decides itself what to keep, and knows its log-mass")
        if self.stack.compacted:
            self.stream.cut = True
        elif states.shape[2] < own.shape[2]:
            # For all layers at once: the others then find nothing left to remove.
            self.stream.crop(own.shape[2] - states.shape[2])

    # -- what transformers asks ------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the stream makes room when the first tokens come."""

    def get_seq_length(self) -> int:
        """Tokens seen, held or not; of a pass that is over, its own too."""
        return self.stream.seen_by(self.number)

    def get_max_length(self) -> int:
        """-1: a stream has no maximum length."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that the next `query_length` queries will see.

        The offset puts the held tokens right before the new ones, so that a plain causal mask is right for them.
        """
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        before, seen = self.stream.mask_length(self.number, new)
        return before + new, seen - before

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values to attend to.

        Args:
            key_states: `[batch, kv_heads, tokens, head_dim]`, rotated.
            value_states: `[batch, kv_heads, tokens, value_dim]`.

        Returns:
            `(keys, values)` in the dtypes given: what is held has those of the first pass, which may have been others.

        Raises:
            ValueError: a batch, head count or dimension other than the tokens held have; nothing has changed.
        """
        keys, values = self.stream.write(self.number, key_states, value_states)
        keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # What is kept is cut off from autograd and written in place later. Gradients reach the pass's own tokens only:
            # through copies.
            part = self.stream.part_of(self.number)
            keys, values = _with_new(part, keys, key_states), _with_new(part, values, value_states)
        if self.stream.wired:
            keys.adms_layer = self
        return keys, values

    # -- what the attention function asks ----------------------------------------------------------------------------------

    def attention_bias(self, new: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """See `StackPass.bias`."""
        return self.stream.part_of(self.number).bias(self.number, groups, dtype)

    def observe(self, query: torch.Tensor, scale: float, softcap: float | None = None) -> None:
        """Take note of the queries that attended to what `update` returned; see `StackPass.observe`."""
        self.stream.open.of_layer[self.number].observe(self.number, query, scale, softcap, self.stream.records_past)

    # -- rows and ends: the cache's, for all layers at once --------------------------------------------------------------

    def reset(self) -> None:
        """Nothing: `ADMSKVCache.reset` forgets for all layers."""

    def activate_past_recording(self) -> None:
        """From now on a pass counts (is scored, and compacted) only with the next `crop`, which may take tokens of it back,
        or the next pass: transformers calls this where tokens are tried out (assisted generation)."""
        self.stream.records_past = True

    def offload(self) -> None:
        """Not supported: the cache is bounded, and its memory fits by choosing the budgets."""
        raise NotImplementedError("ADMSKVCache does not offload its layers; choose budgets with ADMSConfig.from_memory")

    prefetch = offload

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the layer holds."""
        stack = self.stack
        return 0 if stack is None else sum(stack.nbytes.values()) // len(stack.layers)

    def held_tokens(self) -> torch.Tensor:
        """Tokens held per row, averaged over the heads, float32 `[batch]`; those of a pass on trial too, which stays so."""
        done = self.stream.open
        part = self.stream.part_of(self.number) if done is not None and done.over else None
        stack = self.stack if part is None else part.stack
        if stack is None:
            return torch.zeros(1, dtype=torch.float32)
        held = stack.of_layer(self.number, stack.attended().valid).sum(-1).float().mean(-1)
        return held if part is None else held + torch.tensor(done.arrival.counts, device=held.device)


def _with_new(part: StackPass | None, held: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """What is attended to, with the new tokens' states themselves where it has copies of them."""
    if part is None or not part.ragged or part.overflows:
        return torch.cat([held[:, :, : held.shape[2] - states.shape[2]], states], dim=2)
    # One more slot, which is dropped again, is where padding goes.
    length = held.shape[2]
    at = torch.where(part.real, part.slots, length)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    return torch.nn.functional.pad(held, (0, 0, 0, 1)).scatter(2, at, states)[:, :, :length]
