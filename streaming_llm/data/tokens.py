"""The one thing every tier holds: weighted tokens. Attention over them is `softmax(q.k * scale + beta) v`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .select import gather_tokens, put_tokens

UNUSED, EXACT, PRECISION, SKETCH, REPLAY, SINK, RECENT = range(7)
# A log-mass that is none, for a token that was changed: one of exactly 0 says that it is the text's own, to the bit.
CHANGED = 1e-7
# What an untouched token has in its fields, where that is not 0.
_UNTOUCHED = {"count": 1, "tier": RECENT}
TIER_NAMES = {EXACT: "exact", PRECISION: "precision", SKETCH: "sketch", REPLAY: "replay", SINK: "sink", RECENT: "recent"}


@dataclass
class WeightedTokens:
    """A batch of weighted tokens, or a buffer of slots for them.

    Attributes:
        keys: `[batch, kv_heads, tokens, head_dim]`, rotated where the model has RoPE.
        values: `[batch, kv_heads, tokens, value_dim]`.
        beta: log-mass `[batch, kv_heads, tokens]`, float32; 0 for an untouched token, `-inf` for an unused slot.
        pos: position each key is rotated to `[batch, kv_heads, tokens]`, float32.
        score: remembered importance `[batch, kv_heads, tokens]`, float32.
        mass: mean attention probability of the recent queries `[batch, kv_heads, tokens]`, float32.
        square: mean squared attention probability, as `mass`.
        count: how many real tokens it stands for `[batch, kv_heads, tokens]`, int32.
        tier: which tier it belongs to (`EXACT`, `PRECISION`, ...), int8.
        exact_keys: keys as they were before any move, rotated to `exact_pos`, so that roundings of half-precision keys
            do not add up; None where keys were never moved, or are wide enough.
        exact_pos: as `pos`; None with `exact_keys`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    beta: torch.Tensor
    pos: torch.Tensor
    score: torch.Tensor
    mass: torch.Tensor
    square: torch.Tensor
    count: torch.Tensor
    tier: torch.Tensor
    exact_keys: torch.Tensor | None = None
    exact_pos: torch.Tensor | None = None

    @classmethod
    def new(cls, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor) -> WeightedTokens:
        """Untouched tokens at `pos` (broadcast to `[batch, kv_heads, tokens]`)."""
        shape = keys.shape[:-1]

        def zeros(dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=keys.device)

        return cls(
            keys=keys,
            values=values,
            beta=zeros(),
            pos=pos.to(device=keys.device, dtype=torch.float32).expand(shape),
            score=zeros(),
            mass=zeros(),
            square=zeros(),
            count=torch.ones(shape, dtype=torch.int32, device=keys.device),
            tier=torch.full(shape, RECENT, dtype=torch.int8, device=keys.device),
        )

    @classmethod
    def empty(
        cls, keys: torch.Tensor, values: torch.Tensor, slots: int, copies: int = 1, exact: bool = False
    ) -> WeightedTokens:
        """`slots` unused slots shaped, typed and placed like `keys` and `values`, for `copies` times as many rows.

        `exact` adds `exact_keys` and `exact_pos`.
        """
        batch, heads = keys.shape[0] * copies, keys.shape[1]

        def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((batch, heads, slots), value, dtype=dtype, device=keys.device)

        def states(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(batch, heads, slots, like.shape[-1])

        return cls(
            keys=states(keys),
            values=states(values),
            beta=full(-torch.inf),
            pos=full(0),
            score=full(0),
            mass=full(0),
            square=full(0),
            count=full(0, torch.int32),
            tier=full(UNUSED, torch.int8),
            exact_keys=states(keys) if exact else None,
            exact_pos=full(0) if exact else None,
        )

    @staticmethod
    def field_names() -> tuple[str, ...]:
        """Names of the tensors that are always there, keys and values first."""
        fields = dataclasses.fields(WeightedTokens)
        return tuple(item.name for item in fields if item.default is dataclasses.MISSING)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, keys and values first."""
        named = ((item.name, getattr(self, item.name)) for item in dataclasses.fields(WeightedTokens))
        return {name: tensor for name, tensor in named if tensor is not None}

    def field(self, name: str) -> torch.Tensor:
        """A tensor by name; of tokens that were never moved the exact keys are the keys."""
        tensor = getattr(self, name)
        return getattr(self, name.removeprefix("exact_")) if tensor is None else tensor

    @property
    def exact(self) -> bool:
        """Whether keys are kept as they were before any move."""
        return self.exact_keys is not None

    def with_exact(self) -> WeightedTokens:
        """The same with `exact_keys` and `exact_pos`, copies of what they are now."""
        return self if self.exact else dataclasses.replace(self, exact_keys=self.keys.clone(), exact_pos=self.pos.clone())

    def map(self, function) -> WeightedTokens:
        """Each tensor replaced by `function(tensor)`."""
        return WeightedTokens(**{name: function(tensor) for name, tensor in self.tensors().items()})

    @property
    def length(self) -> int:
        """Slots, used or not."""
        return self.beta.shape[-1]

    @property
    def valid(self) -> torch.Tensor:
        """Which slots hold a token, bool `[batch, kv_heads, tokens]`."""
        return self.beta > -torch.inf

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def slice(self, start: int, stop: int) -> WeightedTokens:
        """The slots from `start` to `stop`, as views."""
        return self.map(lambda tensor: tensor[:, :, start:stop])

    def gather(self, index: torch.Tensor) -> WeightedTokens:
        """The slots `index [batch, kv_heads, picked]` of each head, copied."""
        known: dict[int, torch.Tensor] = {}
        return self.map(lambda tensor: gather_tokens(tensor, index, known))

    def write(self, start: int, tokens: WeightedTokens) -> None:
        """Overwrite the slots from `start` on with `tokens`, in place."""
        stop = start + tokens.length
        for name, tensor in self.tensors().items():
            tensor[:, :, start:stop] = tokens.field(name)

    def widened(self, slots: int) -> WeightedTokens:
        """A copy with `slots` slots; those behind these are as those of untouched tokens."""
        copies, length = {}, min(slots, self.length)
        for name, tensor in self.tensors().items():
            copy = tensor.new_empty(*tensor.shape[:2], slots, *tensor.shape[3:])
            copy[:, :, :length] = tensor[:, :, :length]
            copy[:, :, length:] = _UNTOUCHED.get(name, 0)
            copies[name] = copy
        return WeightedTokens(**copies)

    def cleared(self, free: torch.Tensor) -> WeightedTokens:
        """The same tokens, the slots where `free` is True with the bookkeeping of untouched ones."""
        fields = ("beta", "score", "mass", "square", "count", "tier")
        filled = {name: getattr(self, name).masked_fill(free, _UNTOUCHED.get(name, 0)) for name in fields}
        return dataclasses.replace(self, **filled)

    def with_slots(self, index: torch.Tensor, picked: torch.Tensor, tokens: WeightedTokens) -> WeightedTokens:
        """The same with `tokens [batch, kv_heads, n, ...]` in the slots `index [batch, kv_heads, n]`, where `picked`."""

        def put(name: str, own: torch.Tensor) -> torch.Tensor:
            new = tokens.field(name).to(own.dtype)
            if own.dim() == 3:
                return own.scatter(2, index, torch.where(picked, new, own.gather(2, index)))
            own = own.clone(memory_format=torch.contiguous_format)
            put_tokens(own, index, torch.where(picked[..., None], new, gather_tokens(own, index)))
            return own

        return WeightedTokens(**{name: put(name, own) for name, own in self.tensors().items()})

    def where_valid(self, keep: torch.Tensor) -> WeightedTokens:
        """These tokens with the slots where `keep [batch, kv_heads, tokens]` is False marked unused."""
        return dataclasses.replace(
            self,
            beta=self.beta.masked_fill(~keep, -torch.inf),
            score=self.score.masked_fill(~keep, 0),
            mass=self.mass.masked_fill(~keep, 0),
            square=self.square.masked_fill(~keep, 0),
            count=self.count.masked_fill(~keep, 0),
            tier=self.tier.masked_fill(~keep, UNUSED),
        )


def lightened(tokens: WeightedTokens, lighter: Callable[[torch.Tensor], torch.Tensor]) -> WeightedTokens:
    """The tokens with lower log-masses: what they weigh beyond themselves becomes less, and the masses with it.

    Args:
        tokens: those with a log-mass above 0 are changed, and none of them below `CHANGED`.
        lighter: the new log-masses, made from the old.
    """
    beta = torch.where(tokens.beta > CHANGED, lighter(tokens.beta).clamp_min(CHANGED), tokens.beta)
    share = torch.where(tokens.valid, beta - tokens.beta, 0.0).exp()
    return dataclasses.replace(tokens, beta=beta, mass=tokens.mass * share, square=tokens.square * share.square())


def as_held(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Computed keys or values in the dtype they are held in; what is too large for it becomes its largest number."""
    return states.to(dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)


def squared_norm(states: torch.Tensor) -> torch.Tensor:
    """Squared length of each state `[..., dim]`, float32 `[...]`."""
    return torch.linalg.vector_norm(states.float(), dim=-1).square()


def concatenate(parts: list[WeightedTokens], slots: int = 0) -> WeightedTokens:
    """The parts' slots one after the other, and as many of untouched tokens behind as make `slots`."""
    names = max((part.tensors() for part in parts), key=len)
    length = sum(part.length for part in parts)

    def joined(name: str) -> torch.Tensor:
        tensors = [part.field(name) for part in parts]
        if slots <= length:
            return torch.cat(tensors, dim=2)
        shape = tensors[0].shape
        result = tensors[0].new_empty(*shape[:2], slots, *shape[3:])
        torch.cat(tensors, dim=2, out=result[:, :, :length])
        result[:, :, length:] = _UNTOUCHED.get(name, 0)
        return result

    return WeightedTokens(**{name: joined(name) for name in names})
