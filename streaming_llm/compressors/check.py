"""A check for the tests of a new compressor: random weighted tokens in, and what must hold of the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..config import ADMSConfig
from ..data.queries import Queries
from ..data.tokens import UNUSED, WeightedTokens
from ..maths.importance import attention_logits, attention_statistics
from ..registry import get_compressor
from .base import Compressor, Reference, check_made

_SINKS, _RECENT, _HEADS, _DIM = 3, 6, 3, 8

_PICKS = {"heads in another order": lambda tensor: tensor[:, [1, 0, 2]], "a row alone": lambda tensor: tensor[-1:].clone()}


class _Case(NamedTuple):
    """`unused`: slots without a token that row 0 begins with; `ragged`: budgets that differ; `queries`: seen per head."""

    rows: int = 2
    tokens: int = 40
    width: int = 12
    unused: int = 0
    ragged: bool = False
    queries: int = 4
    dtype: torch.dtype = torch.float32


_CASES = (
    _Case(queries=1),
    _Case(ragged=True),
    _Case(unused=7, ragged=True),
    _Case(queries=0),
    _Case(tokens=24, width=1, queries=1),
    _Case(rows=1, tokens=2, width=1, queries=1),
    _Case(tokens=20, width=8, unused=19),
    _Case(tokens=20, width=8, unused=20),
    _Case(unused=5, ragged=True, dtype=torch.bfloat16),
)


def check_compressor(compressor: str | type[Compressor], config: ADMSConfig | None = None) -> None:
    """Run a compressor on random tokens; `AssertionError` says in a sentence what part of its contract is broken.

    The cases: budgets that differ between heads, one slot, one token, rows that begin with padding or are nothing else, no
    queries, bfloat16. What is looked at: shapes, dtypes and finite numbers (as in every compaction), each head's budget,
    pinned tokens, order, `count`, attention mass, unused slots, `Reference.assigned`, that what was given stays as it was,
    and that rows, and the order of heads, do not matter.

    Args:
        compressor: a registered name or a subclass of `Compressor`; `conserves_mass` and `keeps_pinned` of it tell what it
            does not promise.
        config: the settings to make it with; small budgets when None.
    """
    kind = get_compressor(compressor) if isinstance(compressor, str) else compressor
    if config is None:
        config = ADMSConfig(compressed_budget=12, min_importance_tokens=0, rank=4, num_clusters=4)
    for seed, case in enumerate(_CASES):
        try:
            _check(kind, config, case, *_make(case, seed))
        except (AssertionError, TypeError, ValueError) as error:
            raise AssertionError(f"{kind.__name__}: {error} (in {case})") from error


def _check(
    kind: type[Compressor],
    config: ADMSConfig,
    case: _Case,
    tokens: WeightedTokens,
    reference: Reference,
    budget: torch.Tensor | None,
) -> None:
    least = case.width if budget is None else int(budget.amin())

    def compress(pick: Callable[[torch.Tensor], torch.Tensor]) -> tuple[WeightedTokens, Reference]:
        given, known = tokens.map(pick), _picked(reference, pick)
        limits = None if budget is None else pick(budget)
        made = kind(config).compress(given, known, case.width, limits, least)
        check_made(kind.__name__, made, known, given, case.width, limits)
        for before, after in ((tokens.map(pick), given), (_picked(reference, pick), known)):
            for name, tensor in vars(before).items():
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(tensor, getattr(after, name)), f"it writes into the {name} it was given"
        return made, known

    made, known = compress(torch.clone)
    valid, used = made.valid, (made.count > 0) & (made.tier != UNUSED)
    assert torch.equal(valid, used), "a slot's count and tier must be 0 where its beta is -inf, and nowhere else"
    steps = torch.where(valid, made.pos, torch.inf).diff(dim=-1).nan_to_num(0)
    assert (steps >= 0).all(), "the result must be in the order of positions, unused slots last"
    if not reference.log_mass:
        assert not made.beta[valid].any(), "beta must stay 0 where reference.log_mass is False"
    if kind.keeps_pinned:
        same = (made.keys[:, :, None] == tokens.keys[:, :, :, None]).all(-1) & valid[:, :, None]
        assert same.any(-1)[reference.pinned].all(), (
            "a pinned token must come out with its key (or set keeps_pinned = False)"
        )
    if kind.conserves_mass:
        total, counted = tokens.count.sum(-1), made.count.sum(-1)
        assert torch.equal(total, counted), "count must sum to that of the tokens given (or set conserves_mass = False)"
        if case.queries == 1:
            before, after = _mass(tokens, reference), _mass(made, reference)
            lost = ((before - after).abs() / before.clamp_min(1e-20)).amax()
            assert lost < 0.01, f"attention mass must be conserved, {lost:.0%} is off (or set conserves_mass = False)"
        if known.assigned is not None:
            counted = torch.zeros_like(made.count).scatter_add(2, known.assigned.clamp(0, case.width - 1), tokens.count)
            assert torch.equal(counted, made.count), "reference.assigned must be the slot each token went to: count differs"
    if case.dtype == torch.float32:
        for what, pick in _PICKS.items():
            expected, (again, _) = made.map(pick), compress(pick)
            for name, tensor in expected.tensors().items():
                near = torch.isclose(getattr(again, name)[expected.valid], tensor[expected.valid], rtol=1e-3, atol=1e-4)
                assert near.all(), f"{what} must give the same: {name} differs"


def _mass(tokens: WeightedTokens, reference: Reference) -> torch.Tensor:
    """Attention probability of all tokens together, summed over the queries, `[batch, kv_heads]`."""
    context = reference.context
    normaliser = attention_logits(reference.queries, context.keys, context.beta).logsumexp(-1, keepdim=True)
    logits = reference.queries.logits(tokens.keys) + tokens.beta[:, :, None, None]
    return torch.exp(logits - normaliser).sum((2, 3, 4))


def _make(case: _Case, seed: int) -> tuple[WeightedTokens, Reference, torch.Tensor | None]:
    """Random weighted tokens between sinks and a recent window, what is known of them, and the heads' budgets."""
    generator = torch.Generator().manual_seed(seed)
    shape, middle = (case.rows, _HEADS, case.tokens), slice(_SINKS, _SINKS + case.tokens)
    total = _SINKS + case.tokens + _RECENT
    keys, values = torch.randn(2, *shape[:2], total, _DIM, generator=generator, dtype=torch.float32).to(case.dtype)
    context = WeightedTokens.new(keys, values, torch.arange(total).expand(*shape[:2], total))
    merged = torch.rand(shape, generator=generator, dtype=torch.float32) < 0.3
    context.count[:, :, middle][merged] = 3
    if case.queries:
        context.beta[:, :, middle][merged] = math.log(3)
    keep = torch.ones_like(context.valid)
    keep[0, :, _SINKS : _SINKS + case.unused] = False
    context, queries = context.where_valid(keep), None
    if case.queries:
        states = torch.randn(*shape[:2], 2, case.queries, _DIM, generator=generator, dtype=torch.float32)
        queries = Queries(2 * states, _DIM**-0.5)
        context.mass, context.square = attention_statistics(queries, context.keys, context.beta)
        context.score = context.square.sqrt()
    tokens = context.slice(middle.start, middle.stop)
    weight = tokens.score if case.queries else torch.rand(shape, generator=generator, dtype=torch.float32)
    width = case.width
    budget = torch.tensor([width, width // 2, width - 1]).expand(shape[:2]).contiguous() if case.ragged else None
    best = weight.masked_fill(~tokens.valid, -1).topk(width // 4).indices
    pinned = torch.zeros_like(tokens.valid).scatter(2, best, True) & tokens.valid
    return tokens, Reference(weight, tokens.mass, pinned, queries, context, _SINKS, log_mass=case.queries > 0), budget


def _picked(reference: Reference, pick: Callable[[torch.Tensor], torch.Tensor]) -> Reference:
    """The reference of the rows and heads that `pick` takes."""
    queries = reference.queries
    return dataclasses.replace(
        reference,
        **{name: pick(getattr(reference, name)) for name in ("weight", "mass", "pinned")},
        queries=None if queries is None else dataclasses.replace(queries, states=pick(queries.states)),
        context=reference.context.map(pick),
    )
