"""Compressors: what they keep, what they conserve, and how a user adds one."""

from __future__ import annotations

import dataclasses
import math

import plain
import pytest
import torch
from conftest import make_tiny_llama, random_queries, random_states, stream, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_llm import (
    ADMSConfig,
    Compressor,
    Queries,
    Reference,
    WeightedTokens,
    enable_adms_llm,
    register_compressor,
    registry,
)
from streaming_llm.compressors import attention_matching, available_compressors, check_compressor, get_compressor
from streaming_llm.compressors.attention_matching import ridge_towards
from streaming_llm.compressors.low_rank import LowRankCompressor
from streaming_llm.compressors.vq import weighted_kmeans
from streaming_llm.data.select import top_in_order
from streaming_llm.data.tokens import EXACT, PRECISION, UNUSED, concatenate
from streaming_llm.evaluation.lone_layer import LoneLayer
from streaming_llm.maths.importance import attention_statistics

ALL = ("low_rank", "vq", "attention_matching")
MERGING = ("low_rank", "attention_matching")
SCALE = 8**-0.5


@pytest.fixture(autouse=True, scope="module")
def every_query():
    """The fit uses every query, whatever stride it takes to save time: masses are conserved for those it uses."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in vars(attention_matching) if name.endswith("_STEP")]:
            patch.setattr(attention_matching, name, 1)
        yield


@dataclasses.dataclass
class Case:
    """A middle with what surrounds it: `first` sinks, the middle, `last` recent tokens, and queries that see all of it."""

    tokens: WeightedTokens
    reference: Reference
    config: ADMSConfig

    def compress(self, name: str, width: int, budget=None, least=None) -> WeightedTokens:
        compressor = get_compressor(name)(dataclasses.replace(self.config, compressor_type=name))
        return compressor.compress(self.tokens, self.reference, width, budget, least)


def make(
    middle: int = 40,
    batch: int = 1,
    heads: int = 2,
    pins: int = 5,
    window: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    unused: int = 0,
    carried: bool = False,
    log_mass: bool = True,
    **chosen,
) -> Case:
    first, last, groups = 3, 6, 2
    total = first + middle + last
    keys, values = random_states(total, batch, heads, seed=seed, dtype=dtype)
    context = WeightedTokens.new(keys, values, torch.arange(total)[None, None])
    generator = torch.Generator().manual_seed(seed + 7)
    if carried:
        context.beta[:, :, first : first + middle] = torch.randn(batch, heads, middle, generator=generator).abs()
        context.count[:, :, first : first + middle] = 3
    if unused:
        keep = torch.ones(batch, heads, total, dtype=torch.bool)
        keep[:, :, first : first + unused] = False
        context = context.where_valid(keep)
    states = random_queries(window, batch, heads, groups, seed=seed + 1).view(batch, heads, groups, window, 8)
    queries = Queries(states, SCALE)
    mass, square = attention_statistics(queries, context.keys, context.beta)
    context.mass, context.square, context.score = mass, square, square.sqrt()
    tokens = context.slice(first, first + middle)
    order = tokens.score.masked_fill(~tokens.valid, -1).argsort(-1, descending=True)[:, :, :pins]
    reference = Reference(
        weight=tokens.score,
        mass=tokens.mass,
        pinned=torch.zeros_like(tokens.valid).scatter(2, order, True),
        queries=queries,
        context=context,
        start=first,
        log_mass=log_mass,
    )
    shape = {"compressed_budget": 12, "min_importance_tokens": 0, "rank": 4, "num_clusters": 4}
    return Case(tokens, reference, ADMSConfig(**{**shape, **chosen}))


def middle_mass(queries: Queries, tokens: WeightedTokens, normaliser: torch.Tensor) -> torch.Tensor:
    """Attention mass of the tokens summed over all queries, `[batch, kv_heads]`."""
    logits = queries.logits(tokens.keys).flatten(2, 3) + tokens.beta[:, :, None]
    return torch.exp(logits - normaliser).sum((2, 3))


def normaliser_of(case: Case) -> torch.Tensor:
    context = case.reference.context
    logits = case.reference.queries.logits(context.keys).flatten(2, 3) + context.beta[:, :, None]
    # The queries are those of the newest tokens, and don't see what came after them.
    window, total = case.reference.queries.window, context.length
    for place in range(window):
        for group in range(2):
            logits[:, :, group * window + place, total - (window - 1 - place) :] = -torch.inf
    return logits.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("name", ALL)
@given(
    middle=st.integers(9, 40),
    width=st.integers(1, 8),
    batch=st.integers(1, 2),
    pins=st.integers(0, 4),
    unused=st.integers(0, 8),
    carried=st.booleans(),
    seed=st.integers(0, 50),
)
@settings(deadline=None, max_examples=15)
def test_masses_of_the_reference_queries_are_conserved(name, middle, width, batch, pins, unused, carried, seed):
    case = make(middle, batch, pins=min(pins, width), unused=unused, carried=carried, seed=seed)
    normaliser = normaliser_of(case)
    before = middle_mass(case.reference.queries, case.tokens, normaliser)
    after = middle_mass(case.reference.queries, case.compress(name, width), normaliser)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_masses_of_one_clear_case_are_conserved_to_1e_4(name):
    case = make(middle=60, window=4)
    normaliser = normaliser_of(case)
    before = middle_mass(case.reference.queries, case.tokens, normaliser)
    after = middle_mass(case.reference.queries, case.compress(name, 12), normaliser)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ALL)
@given(
    middle=st.integers(9, 40),
    width=st.integers(1, 8),
    pins=st.integers(0, 8),
    unused=st.integers(0, 8),
    ragged=st.booleans(),
    log_mass=st.booleans(),
    seed=st.integers(0, 50),
)
@settings(deadline=None, max_examples=15)
def test_every_token_is_counted_once_and_no_budget_exceeded(name, middle, width, pins, unused, ragged, log_mass, seed):
    case = make(middle, 2, pins=min(pins, width), unused=unused, log_mass=log_mass, seed=seed)
    budget, least = None, None
    if ragged:
        budget = torch.tensor([[width, max(1, width // 2)], [width, width]])
        least = max(1, width // 2)
        case.reference.pinned &= case.reference.pinned.cumsum(-1) <= budget[..., None]
    made = case.compress(name, width, budget, least)
    assert made.length == width
    assert torch.equal(made.count.sum(-1), case.tokens.count.sum(-1))
    assert (made.valid.sum(-1) <= (width if budget is None else budget)).all()
    assert made.count[~made.valid].eq(0).all() and made.tier[~made.valid].eq(UNUSED).all()
    assert made.tier[made.valid].ne(UNUSED).all()
    for tensor in (made.keys, made.values, made.beta[made.valid], made.mass, made.score):
        assert tensor.isfinite().all()
    if not log_mass:
        assert made.beta[made.valid].eq(0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_tokens_are_their_originals_to_the_bit(name, dtype):
    case = make(middle=40, batch=2, dtype=dtype)
    made = case.compress(name, 20)
    slot = made.pos.long() - 3
    exact = made.valid & (made.tier == EXACT)
    assert exact.sum() >= 2 * 2 * 2
    keys = case.tokens.gather(slot.clamp(0, 39)).keys
    values = case.tokens.gather(slot.clamp(0, 39)).values
    kept = made.valid if name != "vq" else exact
    assert torch.equal(made.keys[kept], keys[kept])
    alone = exact & (made.count == 1)
    assert torch.equal(alone, exact)
    if name != "attention_matching":
        assert torch.equal(made.values[alone], values[alone])
        assert made.beta[alone].eq(0).all()
    assert made.keys.dtype == made.values.dtype == dtype and made.beta.dtype == torch.float32


@pytest.mark.parametrize("name", MERGING)
def test_protected_tokens_stay_exact_in_value_and_log_mass_too(name):
    case = make(middle=40, pins=6, protect_exact=True)
    made = case.compress(name, 12)
    exact = made.tier == EXACT
    assert exact.sum(-1).ge(6).all()
    originals = case.tokens.gather(made.pos.long() - 3)
    assert torch.equal(made.values[exact], originals.values[exact])
    assert made.beta[exact].eq(0).all()
    open_case = make(middle=40, pins=6)
    assert (open_case.compress(name, 12).count[exact] > 1).any()


@pytest.mark.parametrize("name", MERGING)
def test_pinned_tokens_come_out_as_tokens_of_their_own(name):
    case = make(middle=40, pins=9)
    made = case.compress(name, 12)
    for head in range(2):
        pinned = set(case.tokens.pos[0, head][case.reference.pinned[0, head]].tolist())
        assert len(pinned) == 9 and pinned <= set(made.pos[0, head].tolist())


@pytest.mark.parametrize("name", ALL)
def test_tokens_come_in_the_order_of_their_positions(name):
    made = make(middle=40, batch=2, unused=5).compress(name, 12)
    order = torch.where(made.valid, made.pos, torch.inf)
    assert (order.diff(dim=-1).nan_to_num(0) >= 0).all()


@pytest.mark.parametrize("name", ALL)
def test_a_permutation_of_heads_permutes_the_result(name):
    case = make(middle=30, heads=3)
    order = torch.tensor([2, 0, 1])

    def permuted(tokens: WeightedTokens) -> WeightedTokens:
        return tokens.map(lambda tensor: tensor[:, order])

    queries = case.reference.queries
    other = dataclasses.replace(
        case.reference,
        weight=case.reference.weight[:, order],
        mass=case.reference.mass[:, order],
        pinned=case.reference.pinned[:, order],
        context=permuted(case.reference.context),
        queries=dataclasses.replace(queries, states=queries.states[:, order]),
    )
    made = case.compress(name, 10)
    again = Case(permuted(case.tokens), other, case.config).compress(name, 10)
    for field, tensor in permuted(made).tensors().items():
        torch.testing.assert_close(getattr(again, field), tensor, rtol=1e-4, atol=1e-5, msg=field)


@pytest.mark.parametrize("name", ALL)
def test_a_row_alone_gives_what_it_gives_in_a_batch(name):
    case = make(middle=30, batch=3)
    made = case.compress(name, 10)
    queries = case.reference.queries
    alone = dataclasses.replace(
        case.reference,
        weight=case.reference.weight[1:2],
        mass=case.reference.mass[1:2],
        pinned=case.reference.pinned[1:2],
        context=case.reference.context.map(lambda tensor: tensor[1:2]),
        queries=dataclasses.replace(queries, states=queries.states[1:2]),
    )
    again = Case(case.tokens.map(lambda tensor: tensor[1:2]), alone, case.config).compress(name, 10)
    for field, tensor in made.tensors().items():
        torch.testing.assert_close(getattr(again, field), tensor[1:2], rtol=1e-4, atol=1e-5, msg=field)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_low_rank_merges_as_the_slow_plain_reference_does(carried, seed):
    case = make(middle=30, batch=2, heads=2, seed=seed, carried=carried)
    made = case.compress("low_rank", 9)
    context, queries = case.reference.context, case.reference.queries
    for row in range(2):
        for head in range(2):
            flat = [query.tolist() for query in queries.states[row, head].flatten(0, 1)]
            part = [getattr(case.tokens, name)[row, head].tolist() for name in ("keys", "values", "beta", "mass", "count")]
            keep = {int(position) - 3 for position in made.pos[row, head]}
            assert len(keep) == 9
            expected = plain.merge(*part, keep, plain.value_weight(flat, part[1], SCALE))
            for slot, token in enumerate(expected):
                assert made.pos[row, head, slot].item() == token["slot"] + 3
                assert made.keys[row, head, slot].tolist() == token["key"]
                assert made.values[row, head, slot].tolist() == pytest.approx(token["value"], rel=1e-4, abs=1e-5)
                assert made.beta[row, head, slot].item() == pytest.approx(token["beta"], rel=1e-4, abs=1e-5)
                assert made.count[row, head, slot].item() == token["count"]
                assert made.mass[row, head, slot].item() == pytest.approx(token["mass"], rel=1e-4)
    # The masses themselves, where one query sees everything.
    single = make(middle=12, window=1, seed=seed)
    context = single.reference.context
    flat = [query.tolist() for query in single.reference.queries.states[0, 1].flatten(0, 1)]
    masses = plain.attention_masses(flat, context.keys[0, 1].tolist(), context.beta[0, 1].tolist(), SCALE)
    assert context.mass[0, 1].tolist() == pytest.approx(masses, rel=1e-4)


def test_pinned_tokens_stay_where_the_others_keys_do_not_differ():
    for alike in (1, 3):
        case = make(middle=6 + alike, heads=1, pins=6)
        pinned = case.reference.pinned[0, 0]
        # Equal keys, or one alone, have no covariance but its rounding.
        case.tokens.keys[:, :, ~pinned] = case.tokens.keys[:, :, ~pinned][:, :, :1].clone()
        priority = get_compressor("low_rank")(case.config).leverage(
            case.tokens.keys, case.reference.weight.masked_fill(case.reference.pinned, 0.0)
        )
        assert priority.max() <= case.config.rank
        made = case.compress("low_rank", 6)
        assert [int(position) - 3 for position in made.pos[0, 0]] == pinned.nonzero()[:, 0].tolist()


def test_without_log_mass_tokens_join_by_their_counts():
    case = make(middle=20, heads=1, log_mass=False, pins=1)
    made = case.compress("low_rank", 1)
    torch.testing.assert_close(made.values[0, 0, 0], case.tokens.values[0, 0].mean(0), rtol=1e-4, atol=1e-5)
    assert made.count.item() == 20 and made.beta.item() == 0


def test_a_token_that_joins_again_weighs_as_much_as_it_carries():
    case = make(middle=12, heads=1, pins=1)
    masses = case.tokens.mass[0, 0]
    made = case.compress("low_rank", 1)
    mean = (masses[:, None] * case.tokens.values[0, 0]).sum(0) / masses.sum()
    torch.testing.assert_close(made.values[0, 0, 0], mean, rtol=1e-4, atol=1e-5)
    kept = int(made.pos[0, 0, 0]) - 3
    assert made.beta.item() == pytest.approx(math.log(masses.sum() / masses[kept]), rel=1e-4)


# -- low_rank ------------------------------------------------------------------------------------------------------------


def leverage(keys: torch.Tensor, weight: torch.Tensor, **chosen) -> torch.Tensor:
    config = ADMSConfig(**{"rank": 2, **chosen})
    return LowRankCompressor(config).leverage(keys, weight)


def test_a_key_of_its_own_direction_has_the_highest_leverage():
    generator = torch.Generator().manual_seed(0)
    keys = torch.zeros(1, 1, 20, 8)
    keys[..., 0] = torch.randn(1, 1, 20, generator=generator)
    keys[0, 0, 7] = torch.tensor([0.0, 9, 0, 0, 0, 0, 0, 0])
    scores = leverage(keys, torch.ones(1, 1, 20))
    assert scores[0, 0].argmax().item() == 7
    assert scores[0, 0, 7].item() > 0.9


def test_leverage_is_that_of_the_leading_eigenvectors():
    generator = torch.Generator().manual_seed(1)
    keys = 0.01 * torch.randn(1, 1, 50, 8, generator=generator)
    keys[..., 0] += 3 * torch.randn(1, 1, 50, generator=generator)
    keys[..., 1] += torch.randn(1, 1, 50, generator=generator)
    centred = keys[0, 0] - keys[0, 0].mean(0)
    left = torch.linalg.svd(centred, full_matrices=False).U[:, :2]
    scores = leverage(keys, torch.ones(1, 1, 50))[0, 0]
    torch.testing.assert_close(scores, left.square().sum(-1), rtol=0.15, atol=0.01)


@given(tokens=st.integers(2, 40), limit=st.integers(1, 30), rank=st.integers(1, 8), seed=st.integers(0, 20))
@settings(deadline=None, max_examples=25)
def test_leverage_lies_between_0_and_the_rank_and_is_0_without_weight(tokens, limit, rank, seed):
    keys, _ = random_states(tokens, seed=seed)
    weight = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(seed))
    weight[:, :, 0] = 0
    scores = leverage(keys, weight, rank=rank, svd_max_tokens=limit)
    assert scores.isfinite().all() and (scores >= 0).all()
    assert scores[:, :, 0].eq(0).all()
    if tokens <= limit:
        assert (scores.sum(-1) <= rank + 1e-4).all()


def test_equal_keys_break_nothing():
    case = make(middle=20)
    case.tokens.keys[:] = 1.0
    for name in ALL:
        made = case.compress(name, 6)
        assert made.keys.isfinite().all() and made.values.isfinite().all()
        assert made.count.sum(-1).eq(20).all()


# -- vq ------------------------------------------------------------------------------------------------------------------


def test_k_means_finds_clusters_that_are_far_apart():
    centres = 50 * torch.eye(4)
    generator = torch.Generator().manual_seed(0)
    points = (centres[:, None] + torch.randn(4, 10, 4, generator=generator)).view(1, 1, 40, 4)
    found, nearest = weighted_kmeans(points, torch.ones(1, 1, 40), 4, seed=0)
    groups = nearest[0, 0].view(4, 10)
    assert (groups == groups[:, :1]).all() and groups[:, 0].unique().numel() == 4
    means = points.view(4, 10, 4).mean(1)
    torch.testing.assert_close(found[0, 0][groups[:, 0]], means, rtol=1e-4, atol=1e-4)


def test_a_point_without_weight_moves_no_centre():
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [500.0]])[None, None]
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])[None, None]
    centres, _ = weighted_kmeans(points, weight, 2, seed=0)
    assert sorted(centres.flatten().tolist()) == pytest.approx([0.5, 10.5])


def test_a_cluster_is_the_mass_weighted_mean_with_the_mass_of_its_members():
    case = make(middle=24, heads=1, pins=0, num_clusters=1, compressed_budget=1, importance_ratio=0.0)
    made = case.compress("vq", 1)
    masses = case.tokens.mass[0, 0]
    share = masses / masses.sum()
    torch.testing.assert_close(made.keys[0, 0, 0], share @ case.tokens.keys[0, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.values[0, 0, 0], share @ case.tokens.values[0, 0], rtol=1e-4, atol=1e-5)
    assert made.pos.item() == pytest.approx(float(share @ case.tokens.pos[0, 0]), rel=1e-4)
    assert made.tier.item() == PRECISION and made.count.item() == 24


def test_vq_makes_no_more_clusters_than_it_is_told():
    case = make(middle=40, pins=4, num_clusters=3)
    made = case.compress("vq", 12)
    assert ((made.count > 1).sum(-1) <= 3).all()
    assert (made.tier == PRECISION).sum() <= 2 * 3


# -- attention_matching --------------------------------------------------------------------------------------------------


def test_the_fit_is_the_ridge_solution():
    generator = torch.Generator().manual_seed(0)
    design, target = torch.randn(2, 20, 6, generator=generator), torch.randn(2, 20, 3, generator=generator)
    start = torch.randn(2, 6, 3, generator=generator)
    got, solved = ridge_towards(design, target, start, 0.3)
    assert solved.all()
    for row in range(2):
        gram = design[row].T @ design[row]
        level = 0.3 * gram.diagonal().mean() * torch.eye(6)
        expected = torch.linalg.solve(gram + level, design[row].T @ target[row] + level @ start[row])
        torch.testing.assert_close(got[row], expected, rtol=1e-3, atol=1e-4)


def test_a_fit_that_fails_leaves_the_start_and_says_so():
    design = torch.ones(2, 4, 3)
    design[1, 0, 0] = torch.nan
    start = torch.randn(2, 3, 1)
    got, solved = ridge_towards(design, torch.ones(2, 4, 1), start, 0.1)
    assert solved.tolist() == [True, False]
    assert torch.equal(got[1], start[1])
    compressor = get_compressor("attention_matching")(ADMSConfig())
    compressor.count_fallbacks(solved)
    compressor.count_fallbacks(solved)
    assert int(compressor.fallbacks) == 2


def test_the_fit_comes_nearer_to_the_true_output_than_the_merge():
    case = make(middle=60, pins=6, window=6, heads=2)
    normaliser = normaliser_of(case)
    queries = case.reference.queries

    def output(tokens: WeightedTokens) -> torch.Tensor:
        logits = queries.logits(tokens.keys).flatten(2, 3) + tokens.beta[:, :, None]
        return torch.exp(logits - normaliser) @ tokens.values

    truth = output(case.tokens)
    error = {name: (output(case.compress(name, 12)) - truth).norm().item() for name in MERGING}
    assert error["attention_matching"] < 0.8 * error["low_rank"]


# -- the registry --------------------------------------------------------------------------------------------------------


class NewestFirst(Compressor):
    """Keeps the newest tokens and drops the rest: what a user might write."""

    def compress(self, tokens, reference, width, budget=None, least=None):
        newest = torch.where(tokens.valid, tokens.pos, -torch.inf).topk(width, dim=-1).indices.sort(-1).values
        return tokens.gather(newest)


@pytest.fixture
def registered():
    before = dict(registry.COMPRESSORS)
    register_compressor("newest", NewestFirst)
    yield "newest"
    registry.COMPRESSORS.clear()
    registry.COMPRESSORS.update(before)


def test_a_users_own_compressor_is_one_class_and_one_call(registered):
    assert registered in available_compressors() and get_compressor(registered) is NewestFirst
    model = make_tiny_llama()
    cache = enable_adms_llm(
        model, compressor_type=registered, recent_size=16, compressed_budget=8, compression_interval=8, start_size=2
    )
    stream(model, token_ids(100), cache, 4)
    layer = cache.layers[1]
    # Before the last compaction the stream was at most 8 tokens shorter, and the middle ends where the recent window began.
    middle = layer.held.pos[0, 0, 2:10].tolist()
    assert middle == list(range(int(middle[0]), int(middle[0]) + 8))
    assert int(middle[-1]) + 1 == int(layer.held.pos[0, 0, 10])
    register_compressor("newest", NewestFirst)


def test_what_is_no_compressor_class_is_refused(registered):
    for wrong in (object, NewestFirst(ADMSConfig()), None, lambda tokens: tokens):
        with pytest.raises(TypeError, match="must be a subclass of"):
            register_compressor("mine", wrong)
    for name in ("", 3, None):
        with pytest.raises(TypeError, match="non-empty string"):
            register_compressor(name, NewestFirst)
    assert "mine" not in available_compressors()


def test_a_taken_name_is_refused(registered):
    with pytest.raises(ValueError, match="name='low_rank' is already taken by LowRankCompressor"):
        register_compressor("low_rank", NewestFirst)
    assert get_compressor("low_rank") is LowRankCompressor


def test_an_unregistered_name_is_refused_with_the_list():
    with pytest.raises(ValueError, match="compressor_type='best'.*low_rank.*vq.*attention_matching"):
        ADMSConfig(compressor_type="best")
    with pytest.raises(ValueError, match="compressor_type='best'"):
        get_compressor("best")


def test_concatenated_compressions_stay_independent():
    # A compressor must not write into the tokens it was given: the layer compares before and after.
    case = make(middle=30)
    before = concatenate([case.tokens])
    for name in ALL:
        case.compress(name, 10)
    for field, tensor in before.tensors().items():
        assert torch.equal(getattr(case.tokens, field), tensor), field


# -- the contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL, "h2o", "snapkv", "tova"])
@pytest.mark.parametrize("chosen", [{}, {"protect_exact": True}, {"rank": 8, "num_clusters": 1, "importance_ratio": 0.0}])
def test_every_compressor_of_ours_passes_the_check(name, chosen):
    import streaming_llm.baselines  # noqa: F401 - registers them

    small = {"compressed_budget": 12, "min_importance_tokens": 0, "rank": 4, "num_clusters": 4}
    check_compressor(name, ADMSConfig(compressor_type=name, **{**small, **chosen}))
    check_compressor(get_compressor(name))


def too_many(tokens, made, reference, width, budget):
    return concatenate([made, made])


def over_budget(tokens, made, reference, width, budget):
    return LowRankCompressor(ADMSConfig(rank=4)).compress(tokens, reference, width)


def nothing(tokens, made, reference, width, budget):
    return None


def keys_alone(tokens, made, reference, width, budget):
    return made.keys


def other_dtype(tokens, made, reference, width, budget):
    return dataclasses.replace(made, values=made.values.double())


def other_heads(tokens, made, reference, width, budget):
    return made.map(lambda tensor: tensor[:, :1])


def not_finite(tokens, made, reference, width, budget):
    return dataclasses.replace(made, keys=made.keys / 0.0)


def nan_log_mass(tokens, made, reference, width, budget):
    return dataclasses.replace(made, beta=torch.where(made.valid, torch.inf, made.beta))


def strange_assignment(tokens, made, reference, width, budget):
    reference.assigned = reference.assigned[:, :, :-1]
    return made


def lost_tokens(tokens, made, reference, width, budget):
    return dataclasses.replace(made, count=made.count.clamp(max=1))


def lost_mass(tokens, made, reference, width, budget):
    return dataclasses.replace(made, beta=torch.where(made.valid, 0.0, made.beta))


def lost_pins(tokens, made, reference, width, budget):
    return dataclasses.replace(made, keys=made.keys + 1e-3)


def out_of_order(tokens, made, reference, width, budget):
    reference.assigned = None
    return made.map(lambda tensor: tensor.flip(2))


def written_into(tokens, made, reference, width, budget):
    tokens.values.mul_(2)
    return made


def scores_written_into(tokens, made, reference, width, budget):
    reference.weight.zero_()
    return made


def heads_mixed(tokens, made, reference, width, budget):
    return dataclasses.replace(made, values=made.values + made.values.roll(1, dims=1))


def rows_mixed(tokens, made, reference, width, budget):
    return dataclasses.replace(made, values=made.values + made.values.roll(1, dims=0))


def half_unused(tokens, made, reference, width, budget):
    return dataclasses.replace(made, tier=torch.zeros_like(made.tier))


def wrongly_assigned(tokens, made, reference, width, budget):
    reference.assigned = torch.zeros_like(reference.assigned)
    return made


def seen_log_mass(tokens, made, reference, width, budget):
    return dataclasses.replace(made, beta=torch.where(made.valid & (made.count > 1), math.log(2), made.beta))


REFUSED = {
    too_many: "returned keys of shape .*24, 8.*12, 8.* is asked for", nothing: "returned NoneType, not WeightedTokens",
    over_budget: "returned more tokens than a head's budget", keys_alone: "returned Tensor, not WeightedTokens",
    other_dtype: "returned values of .*float64.*float32.* is asked for", other_heads: "returned keys of shape",
    not_finite: "returned NaN or infinity", nan_log_mass: "returned NaN or infinity",
    strange_assignment: "set reference.assigned of shape",
}  # fmt: skip
BROKEN = {
    lost_tokens: "count must sum to that of the tokens given", lost_mass: "attention mass must be conserved",
    lost_pins: "a pinned token must come out with its key", out_of_order: "in the order of positions",
    written_into: "writes into the values it was given", scores_written_into: "writes into the weight it was given",
    heads_mixed: "heads in another order must give the same", rows_mixed: "a row alone must give the same",
    half_unused: "count and tier must be 0", wrongly_assigned: "reference.assigned must be the slot each token went to",
    seen_log_mass: "beta must stay 0 where reference.log_mass is False|attention mass must be conserved",
}  # fmt: skip


def breaking(change) -> type[Compressor]:
    class Broken(LowRankCompressor):
        """The low-rank compressor, its result changed."""

        def compress(self, tokens, reference, width, budget=None, least=None):
            made = super().compress(tokens, reference, width, budget, least)
            return change(tokens, made, reference, width, budget)

    return Broken


@pytest.mark.parametrize("change", [*REFUSED, *BROKEN], ids=lambda change: change.__name__)
def test_the_check_says_what_part_of_the_contract_is_broken(change):
    with pytest.raises(AssertionError, match=f"^Broken: .*({(REFUSED | BROKEN)[change]}).*in _Case"):
        check_compressor(breaking(change))


def test_a_method_that_drops_tokens_says_so_and_passes():
    with pytest.raises(AssertionError, match="keeps_pinned = False"):
        check_compressor(NewestFirst)

    class Declared(NewestFirst):
        keeps_pinned = conserves_mass = False

        def compress(self, tokens, reference, width, budget=None, least=None):
            index, picked = top_in_order(tokens.pos, tokens.valid, width, budget)
            return tokens.gather(index).where_valid(picked)

    check_compressor(Declared)


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
@pytest.mark.parametrize("modules", [{}, {"enable_adaptive_controller": True}])
def test_a_result_that_does_not_fit_is_refused_in_the_middle_of_a_stream_by_name(registered, change, modules):
    register_compressor("broken", breaking(change))
    shape = {"recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "start_size": 2, "rank": 4}
    model = make_tiny_llama()
    cache = enable_adms_llm(model, compressor_type="broken", **shape, **modules)
    wrong = "" if change is too_many else REFUSED[change]
    if change is over_budget and not modules:
        stream(model, token_ids(60), cache, 4)
        return
    with pytest.raises((TypeError, ValueError), match=f"compressor Broken .*{wrong}"):
        stream(model, token_ids(60), cache, 4)
    cache.reset()
    cache = enable_adms_llm(model, **shape)
    stream(model, token_ids(60), cache, 4)


@pytest.mark.parametrize("name", ["low_rank", "vq", "attention_matching"])
def test_a_head_that_may_keep_nothing_keeps_nothing(name):
    settings = {"compressor_type": name, "num_clusters": 1, "rank": 4, "min_importance_tokens": 0, "importance_ratio": 0.0}
    config = ADMSConfig(compressed_budget=0, enable_residual_replay=True, replay_budget=1, start_size=0, recent_size=1,
                        compression_interval=1, min_middle_size_for_compress=0, **settings)  # fmt: skip
    layer = LoneLayer(config)
    keys, values = random_states(12)
    for start in range(0, 12, 3):
        part = slice(start, start + 3)
        layer.update(keys[:, :, part], values[:, :, part])
        layer.observe(random_queries(12)[:, :, part], 0.3)
    assert layer.held.valid.sum(-1).max() <= config.expected_max_tokens and layer.held.keys.isfinite().all()
