"""Originals outside the attended set, and what the middle's tiers hold in a stream: nothing counted twice, nothing altered.

A small language model streams through caches with sketches and replay on; every key and value it computed is recorded.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import make_tiny_llama, memory_of, random_states, stream, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_llm import WeightedTokens, disable_adms_llm, enable_adms_llm
from streaming_llm.compaction.originals import Originals, is_original, spread_pick, stand_in_error, take_off
from streaming_llm.data.tokens import EXACT, PRECISION, RECENT, REPLAY, SINK, SKETCH, UNUSED

FIELDS = ("keys", "values", "pos", "share", "score", "parent", "order")


def compacted(members: int = 12, clusters: int = 4, batch: int = 2, heads: int = 3, dim: int = 5, seed: int = 0):
    """Random tokens, stand-ins that hold their mass and mean value, and all of them as originals."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = random_states(members, batch, heads, dim, seed)
    tokens = WeightedTokens.new(keys, values, torch.arange(members)[None, None])
    tokens.mass = 0.05 + torch.rand(batch, heads, members, generator=generator)
    tokens.score = torch.rand(batch, heads, members, generator=generator)
    assigned = torch.randint(clusters, (batch, heads, members), generator=generator)
    assigned[..., :clusters] = torch.arange(clusters)
    member = torch.nn.functional.one_hot(assigned, clusters).float()
    total = torch.einsum("bhmc,bhm->bhc", member, tokens.mass)
    share = tokens.mass / total.gather(2, assigned)
    made = WeightedTokens.new(
        torch.randn(batch, heads, clusters, dim, generator=generator),
        torch.einsum("bhmc,bhm,bhmd->bhcd", member, share, values),
        torch.arange(clusters)[None, None],
    )
    made.mass, made.count = total, member.sum(2).to(torch.int32)
    made.beta = torch.randn(batch, heads, clusters, generator=generator)
    made.tier = torch.full_like(made.tier, PRECISION)
    originals = Originals.empty(keys, values, members)
    originals.store(tokens, share, assigned, 0, members)
    return tokens, made, originals, assigned


def leaving_by_position(originals: Originals, leaves: torch.Tensor) -> torch.Tensor:
    """`leaves [batch, heads, members]` is by position; the store's slots are in no order."""
    return leaves.gather(2, originals.pos.long()) & originals.valid


def same(left: dict, right: dict) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


# What comes back is taken off its stand-in


@given(seed=st.integers(0, 10_000), portion=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
@settings(deadline=None, max_examples=60)
def test_count_and_mass_go_down_by_exactly_what_leaves(seed, portion):
    tokens, made, originals, assigned = compacted(seed=seed)
    leaves = torch.rand(tokens.beta.shape, generator=torch.Generator().manual_seed(seed)) < portion
    gone = torch.zeros_like(made.mass).scatter_add_(2, assigned, tokens.mass * leaves)
    left = made.count - torch.zeros_like(made.count).scatter_add_(2, assigned, leaves.int())
    after = take_off(made, originals, leaving_by_position(originals, leaves))
    assert torch.equal(after.count, left)
    assert (after.count.sum(-1) + leaves.sum(-1)).eq(tokens.length).all()
    assert torch.equal(after.valid, left > 0)
    # A remainder is never less than a thousandth of what was there.
    enough = after.valid & (gone < 0.999 * made.mass)
    rest = 1 - gone / made.mass
    torch.testing.assert_close(after.mass[enough], (made.mass - gone)[enough], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after.beta[enough], (made.beta + rest.log())[enough], rtol=1e-3, atol=1e-3)
    untouched = left == made.count
    for name in WeightedTokens.field_names():
        assert torch.equal(getattr(after, name)[untouched], getattr(made, name)[untouched]), name
    # The originals that stay have the same mass as before, of a stand-in that has less.
    stay = originals.valid
    assert stay.sum() == (~leaves).sum()
    mass = originals.share * after.mass.gather(2, originals.parent)
    expected = tokens.mass.gather(2, originals.pos.long())
    certain = stay & enough.gather(2, originals.parent)
    torch.testing.assert_close(mass[certain], expected[certain], rtol=2e-3, atol=1e-5)


def test_where_at_least_half_stays_the_value_is_the_mean_of_what_stays():
    tokens, made, originals, assigned = compacted(members=16)
    leaves = torch.zeros_like(tokens.valid)
    leaves[..., 6:9] = True
    after = take_off(made, originals, leaving_by_position(originals, leaves))
    weight = tokens.mass * ~leaves
    total = torch.zeros_like(made.mass).scatter_add_(2, assigned, weight)
    spread = assigned[..., None].expand(tokens.values.shape)
    mean = torch.zeros_like(made.values).scatter_add_(2, spread, tokens.values * weight[..., None]) / total[..., None]
    half = (total / made.mass >= 0.51) & (after.count != made.count)
    less = (total / made.mass < 0.49) & (after.count != made.count)
    assert half.any() and less.any()
    torch.testing.assert_close(after.values[half], mean[half], rtol=1e-4, atol=1e-4)
    assert torch.equal(after.values[less], made.values[less])
    assert torch.equal(after.keys, made.keys)


def test_a_sketch_keeps_its_key_and_value_when_an_original_leaves_it():
    _, made, originals, _ = compacted()
    made.tier.fill_(SKETCH)
    leaves = torch.zeros_like(originals.valid)
    leaves[..., 5] = True
    after = take_off(made, originals, leaves)
    assert torch.equal(after.keys, made.keys) and torch.equal(after.values, made.values)
    assert (after.mass < made.mass).any() and (after.beta < made.beta).any()


def test_a_stand_in_nothing_is_left_of_becomes_an_unused_slot():
    _, made, originals, _ = compacted()
    after = take_off(made, originals, originals.valid & (originals.parent == 2))
    assert not after.valid[..., 2].any() and after.valid[..., [0, 1, 3]].all()
    assert after.beta[..., 2].eq(-torch.inf).all() and after.tier[..., 2].eq(UNUSED).all()
    for name in ("count", "mass", "score", "square"):
        assert getattr(after, name)[..., 2].eq(0).all(), name
    assert not (originals.valid & (originals.parent == 2)).any()


def test_without_log_mass_beta_stays():
    _, made, originals, _ = compacted()
    made.beta.zero_()
    leaves = torch.zeros_like(originals.valid)
    leaves[..., :3] = True
    after = take_off(made, originals, leaves, log_mass=False)
    assert after.beta[after.valid].eq(0).all() and (after.count < made.count).any()


def test_leaving_one_by_one_is_leaving_together():
    for seed in range(10):
        _, made, together, _ = compacted(seed=seed)
        _, _, alone, _ = compacted(seed=seed)
        leaves = torch.zeros_like(together.valid)
        leaves[..., 2:5] = True
        one = take_off(made, together, leaves)
        several = made
        for slot in range(2, 5):
            single = torch.zeros_like(leaves)
            single[..., slot] = True
            several = take_off(several, alone, single)
        assert torch.equal(one.count, several.count)
        sure = one.valid & (one.mass > 0.05 * made.mass)
        torch.testing.assert_close(one.mass[sure], several.mass[sure], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.beta[sure], several.beta[sure], rtol=1e-3, atol=1e-3)


# The store


@given(
    slots=st.integers(0, 6),
    newest=st.integers(0, 6),
    passes=st.lists(st.lists(st.booleans(), max_size=9), max_size=5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=200)
def test_kept_are_the_newest_and_then_those_of_highest_score(slots, newest, passes, seed):
    newest = min(newest, slots)
    generator = torch.Generator().manual_seed(seed)
    like = torch.zeros(2, 2, 0, 1)
    store = Originals.empty(like, like, slots)
    known: dict[tuple[int, int], list[tuple[int, float]]] = {(row, head): [] for row in range(2) for head in range(2)}
    order = 0
    for real in passes:
        count = len(real)
        keys = torch.arange(order, order + count).float()[None, None, :, None].expand(2, 2, count, 1)
        tokens = WeightedTokens.new(keys, -keys, keys[..., 0] + 0.5)
        tokens.score = torch.rand(2, 2, count, generator=generator)
        valid = torch.tensor(real, dtype=torch.bool)[None, None].expand(2, 2, count).clone()
        valid[1] = valid[1].flip(-1)
        tokens = tokens.where_valid(valid)
        store.store(tokens, tokens.score, tokens.pos.long(), order, newest)
        for (row, head), held in known.items():
            held += [(order + i, float(tokens.score[row, head, i])) for i in range(count) if valid[row, head, i]]
            held.sort(reverse=True)
            held[:] = held[:newest] + sorted(held[newest:], key=lambda pair: -pair[1])[: slots - len(held[:newest])]
        order += 100
        for (row, head), held in known.items():
            part = store.part(row, head)
            own = part.valid[0, 0]
            assert sorted(part.order[0, 0][own].tolist()) == sorted(number for number, _ in held)
            # Every field of a slot is of the same token.
            assert torch.equal(part.keys[0, 0, own, 0].long(), part.order[0, 0][own])
            assert torch.equal(part.values[0, 0, own, 0], -part.keys[0, 0, own, 0])
            assert torch.equal(part.pos[0, 0][own], part.keys[0, 0, own, 0] + 0.5)
            assert torch.equal(part.parent[0, 0][own], part.order[0, 0][own])
            assert torch.equal(part.share[0, 0][own], part.score[0, 0][own])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_original_comes_out_as_it_went_in(dtype):
    keys, values = random_states(7, 2, 3, 8, dtype=dtype)
    tokens = WeightedTokens.new(keys, values, torch.arange(7.0)[None, None])
    store = Originals.empty(keys, values, 9)
    store.store(tokens, tokens.beta, tokens.count.long(), 0, 9)
    index = store.order.argsort(dim=2)[..., 2:]
    out = store.take(index, torch.ones_like(index, dtype=torch.bool), REPLAY)
    assert out.keys.dtype == dtype and torch.equal(out.keys, keys) and torch.equal(out.values, values)
    assert torch.equal(out.pos, tokens.pos) and out.count.eq(1).all() and out.beta.eq(0).all()
    assert out.tier.eq(REPLAY).all()
    hidden = store.take(index, torch.zeros_like(index, dtype=torch.bool), REPLAY)
    assert not hidden.valid.any() and hidden.count.eq(0).all()


def test_the_mass_of_an_original_stays_when_its_stand_in_is_merged_into_another():
    tokens, made, originals, assigned = compacted(members=12, clusters=5)
    again = torch.randint(2, made.beta.shape, generator=torch.Generator().manual_seed(4))
    total = torch.zeros(*made.mass.shape[:2], 2).scatter_add_(2, again, made.mass)
    originals.follow(again, made.mass, total)
    assert torch.equal(originals.parent, again.gather(2, assigned).gather(2, originals.pos.long()))
    mass = originals.share * total.gather(2, originals.parent)
    torch.testing.assert_close(mass, tokens.mass.gather(2, originals.pos.long()), rtol=1e-5, atol=1e-6)


def test_a_store_of_no_slots_takes_nothing():
    keys, values = random_states(4)
    store = Originals.empty(keys, values, 0)
    tokens = WeightedTokens.new(keys, values, torch.arange(4)[None, None])
    store.store(tokens, tokens.beta, tokens.count.long(), 0, 3)
    assert store.slots == 0 and not store.valid.any()


def test_freed_slots_hold_nothing_and_are_used_again():
    tokens, _, originals, assigned = compacted(members=6)
    originals.free(originals.pos < 3)
    assert originals.valid.sum(-1).eq(3).all() and originals.share[~originals.valid].eq(0).all()
    later = dataclasses.replace(tokens, pos=tokens.pos + 50)
    originals.store(later, tokens.mass, assigned, 100, 0)
    assert originals.valid.all() and (originals.pos >= 50).sum(-1).ge(3).all()


# Picking, and the error of stand-ins


@given(valid=st.lists(st.booleans(), min_size=1, max_size=20), width=st.integers(1, 12), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=150)
def test_every_n_th_is_picked_where_there_are_too_many(valid, width, seed):
    mask = torch.tensor(valid)[None, None]
    priority = torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed)).float()[None, None]
    index, picked = spread_pick(priority, mask, width)
    assert index.shape == picked.shape and index.shape[-1] <= width
    chosen = index[picked]
    assert len(set(chosen.tolist())) == len(chosen) == min(sum(valid), width)
    assert mask[0, 0][chosen].all()
    ranked = sorted((i for i in range(len(valid)) if valid[i]), key=lambda i: -priority[0, 0, i])
    places = [ranked.index(i) for i in chosen.tolist()]
    assert places == sorted(places)
    gaps = [b - a for a, b in zip([-1, *places], [*places, len(ranked)], strict=True)]
    assert not places or max(gaps) <= math.ceil(len(ranked) / min(width, len(ranked)))


def test_the_error_of_a_stand_in_is_summed_over_its_originals():
    _, made, originals, _ = compacted(members=9, clusters=3, batch=1, heads=2)
    originals.free(originals.pos == 4)
    error, norm = stand_in_error(made, originals)
    for head in range(2):
        own = originals.part(0, head)
        levels = [t[0, 0][own.valid[0, 0]].square().sum(-1).mean() for t in (own.keys, own.values)]
        for cluster in range(3):
            mine = own.valid[0, 0] & (own.parent[0, 0] == cluster)
            expected, size = 0.0, 0.0
            for kept, stand_in, level in zip((own.keys, own.values), (made.keys, made.values), levels, strict=True):
                expected += (kept[0, 0][mine] - stand_in[0, head, cluster]).square().sum() / level
                size += kept[0, 0][mine].square().sum() / level
            torch.testing.assert_close(error[0, head, cluster], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(norm[0, head, cluster], size, rtol=1e-4, atol=1e-5)


def test_only_a_token_that_stands_for_itself_alone_is_original():
    tokens = WeightedTokens.new(*random_states(5, heads=1), torch.arange(5)[None, None])
    tokens.count[..., 1] = 2
    tokens.beta[..., 2] = 0.1
    tokens.tier[..., 3] = SKETCH
    tokens = tokens.where_valid(torch.tensor([True, True, True, True, False])[None, None])
    assert is_original(tokens)[0, 0].tolist() == [True, False, False, False, False]


def test_rows_and_heads_are_independent():
    def after(order_rows, order_heads):
        _, made, originals, _ = compacted()
        made = made.map(lambda t: t[order_rows][:, order_heads])
        originals = originals.map(lambda t: t[order_rows][:, order_heads])
        extra = WeightedTokens.new(*random_states(5, 2, 3, 5, 9), torch.arange(20.0, 25)[None, None])
        extra.score = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(3))
        extra = extra.map(lambda t: t[order_rows][:, order_heads])
        taken = take_off(made, originals, originals.valid & (originals.pos % 3 == 0))
        originals.store(extra, extra.score, extra.count.long(), 50, 2)
        return taken.tensors(), originals.tensors()

    base = after([0, 1], [0, 1, 2])
    moved = after([1, 0], [2, 0, 1])
    for left, right in zip(base, moved, strict=True):
        assert same({name: tensor[[1, 0]][:, [2, 0, 1]] for name, tensor in left.items()}, right)


# In a stream

SMALL = {
    "start_size": 4, "recent_size": 24, "compressed_budget": 16, "compression_interval": 16, "rank": 4, "num_clusters": 8,
    "min_importance_tokens": 2, "min_middle_size_for_compress": 0, "attention_window": 32,
}  # fmt: skip
BOTH = {"enable_dual_fidelity": True, "sketch_budget": 6, "enable_residual_replay": True, "replay_budget": 4}


class Recorded:
    """A cache of a tiny model, and every key and value each of its layers was given."""

    def __init__(self, model, **chosen):
        self.cache = enable_adms_llm(model, **{**SMALL, **chosen})
        self.given: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for layer in self.cache.layers:
            self._record(layer)

    def _record(self, layer) -> None:
        mine: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.given.append(mine)
        update = layer.update

        def recording(keys, values, *args, **kwargs):
            mine.append((keys.clone(), values.clone()))
            return update(keys, values, *args, **kwargs)

        layer.update = recording

    def check(self, seen: int) -> dict[int, int]:
        """All that holds between two forward passes; how many tokens of the middle each tier has."""
        config, tiers = self.cache.config, {}
        assert self.cache.held_tokens <= config.expected_max_tokens
        for layer, fed in zip(self.cache.layers, self.given, strict=True):
            held = layer.held
            assert layer.stack.columns <= config.expected_max_tokens
            assert held.valid.sum(-1).max() <= config.expected_max_tokens
            assert held.count.sum(-1).eq(seen).all()
            for tensor in (held.keys, held.values, held.mass, held.score, held.square, held.beta[held.valid]):
                assert tensor.isfinite().all()
            states = [torch.cat(part, dim=2) for part in zip(*fed, strict=True)]
            own = held.valid & (held.count == 1) & (held.beta == 0)
            own &= torch.isin(held.tier, torch.tensor([EXACT, REPLAY, RECENT, SINK], dtype=torch.int8))
            assert own[held.tier == REPLAY].all()
            assert torch.equal(held.pos[own], held.pos[own].round())
            place = held.pos.long().clamp(0, seen - 1)[..., None]
            for mine, all_of_them in zip((held.keys, held.values), states, strict=True):
                expected = all_of_them.gather(2, place.expand(*place.shape[:3], mine.shape[-1]))
                assert torch.equal(mine[own], expected[own])
            # Nothing is there twice.
            marks = torch.zeros(*own.shape[:2], seen, dtype=torch.int64).scatter_add_(2, place[..., 0], own.long())
            assert marks.max() <= 1
            bank, width = memory_of(layer).originals, layer.stack.rows[0].width
            if bank is not None:
                for mine, all_of_them in zip((bank.keys, bank.values), states, strict=True):
                    spot = bank.pos.long()[..., None]
                    expected = all_of_them.gather(2, spot.expand(*spot.shape[:3], mine.shape[-1]))
                    assert torch.equal(mine[bank.valid], expected[bank.valid])
                assert ((bank.share >= 0) & (bank.share <= 1)).all()
                stored = torch.zeros_like(marks).scatter_add_(2, bank.pos.long(), bank.valid.long())
                assert stored.max() <= 1
                if layer.compacted:
                    # What stands for an original is there, stands for at least as many as it has, and is no original.
                    first = config.dynamic_start_size
                    count = held.slice(first, first + width).count
                    led = torch.zeros_like(count).scatter_add_(2, bank.parent, bank.valid.int())
                    assert (led <= count).all()
                    assert not (marks.bool() & stored.bool()).any()
            if layer.compacted:
                first = config.dynamic_start_size
                middle = held.slice(first, first + width)
                assert middle.valid.sum(-1).max() <= config.middle_allocation
                valid = middle.valid
                assert (valid[..., 1:] <= valid[..., :-1]).all()
                assert ((middle.pos < seen) & (middle.pos >= 0))[valid].all()
                assert (middle.pos[..., 1:] >= middle.pos[..., :-1])[valid[..., 1:]].all()
                for tier in middle.tier.unique().tolist():
                    tiers[tier] = tiers.get(tier, 0) + int((middle.tier == tier).sum())
        return tiers


MODES = {
    "sketches": {"enable_dual_fidelity": True, "sketch_budget": 8},
    "first members": {"enable_dual_fidelity": True, "sketch_budget": 8, "sketch_reduction": "first"},
    "few originals": {"enable_dual_fidelity": True, "sketch_budget": 8, "sketch_originals": 5},
    "no originals": {"enable_dual_fidelity": True, "sketch_budget": 8, "sketch_originals": 0},
    "replay": {"enable_residual_replay": True, "replay_budget": 6, "energy_replay_threshold": 1.0},
    "both": {**BOTH, "energy_replay_threshold": 1.0, "sketch_reduction": "sum"},
    "no precision tier": {**BOTH, "compressed_budget": 0, "min_importance_tokens": 0},
}


COMPRESSORS = ("low_rank", "vq", "attention_matching")


@pytest.mark.parametrize(
    "compressor,mode",
    # Each mode with a compressor in turn, and both tiers with all of them.
    [*((COMPRESSORS[number % 3], mode) for number, mode in enumerate(MODES)), ("low_rank", "both"), ("vq", "both")],
)
def test_a_stream_keeps_its_bound_and_alters_and_doubles_no_token(compressor, mode):
    model, mode = make_tiny_llama(), MODES[mode]
    recorded = Recorded(model, compressor_type=compressor, **mode)
    ids = token_ids(214, batch=2)
    seen, tiers = 0, {}
    for chunk in [3] * 20 + [16] * 4 + [70] + [1] * 20:
        stream(model, ids[:, seen : seen + chunk], recorded.cache, chunk)
        seen += chunk
        for tier, count in recorded.check(seen).items():
            tiers[tier] = tiers.get(tier, 0) + count
    assert seen == 214
    assert tiers.get(SKETCH, 0) > 0 or "sketch_budget" not in mode
    assert tiers.get(REPLAY, 0) > 0 or mode.get("energy_replay_threshold") != 1.0


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_the_switches_with_budgets_of_0_are_base_adms_to_the_bit(compressor):
    model, ids = make_tiny_llama(), token_ids(200)
    shape = {**SMALL, "compressor_type": compressor}
    base = stream(model, ids, enable_adms_llm(model, **shape), 7)
    zero = {"enable_dual_fidelity": True, "sketch_budget": 0, "enable_residual_replay": True, "replay_budget": 0}
    assert torch.equal(stream(model, ids, enable_adms_llm(model, **shape, **zero), 7), base)
    assert not torch.equal(stream(model, ids, enable_adms_llm(model, **shape, **BOTH), 7), base)
    disable_adms_llm(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_in_half_precision_stays_finite(dtype):
    model = make_tiny_llama().to(dtype)
    recorded = Recorded(model, **BOTH, energy_replay_threshold=1.0)
    ids = token_ids(200)
    for start in range(0, 200, 8):
        logits = stream(model, ids[:, start : start + 8], recorded.cache, 8)
        assert logits.isfinite().all()
        recorded.check(start + 8)


@pytest.mark.parametrize("chunk", [1, 11])
def test_each_row_of_a_batch_is_as_if_it_were_alone(chunk):
    model, ids = make_tiny_llama(), token_ids(100, batch=2)
    chosen = {**SMALL, **BOTH, "energy_replay_threshold": 1.0}
    together = stream(model, ids, enable_adms_llm(model, **chosen), chunk)
    for row in range(2):
        alone = stream(model, ids[row : row + 1], enable_adms_llm(model, **chosen), chunk)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


def test_a_prefill_longer_than_the_buffer_becomes_sketches_and_goes_on():
    model, ids = make_tiny_llama(), token_ids(340)
    recorded = Recorded(model, **BOTH, energy_replay_threshold=1.0)
    stream(model, ids[:, :300], recorded.cache, 300)
    tiers = recorded.check(300)
    assert tiers[SKETCH] > 0 and recorded.cache.stats["total_sketch_tokens"] > 0
    for start in range(300, 340):
        stream(model, ids[:, start : start + 1], recorded.cache, 1)
        recorded.check(start + 1)


@pytest.mark.parametrize("mode", ["replay", "both"])
def test_a_token_that_comes_back_has_the_score_it_left_with(mode):
    # Nothing is forgotten, so a token's score only rises while it is held; away it stays what it was.
    model, ids = make_tiny_llama(), token_ids(200, 2)
    cache = enable_adms_llm(model, **SMALL, **MODES[mode], score_decay=1.0)
    highest = torch.zeros(len(cache.layers), 2, 2, 200)
    returned = stored = 0
    for start in range(0, 200, 4):
        stream(model, ids[:, start : start + 4], cache, 4)
        for layer, least in zip(cache.layers, highest, strict=True):
            held, bank = layer.held, memory_of(layer).originals
            for own, tokens in ((is_original(held), held), (bank.valid, bank)):
                before = least.gather(2, tokens.pos.long())
                assert (tokens.score >= before)[own].all()
                least.scatter_reduce_(2, tokens.pos.long(), tokens.score * own, "amax")
            returned += int(((held.tier == REPLAY) & (held.score > 0)).sum())
            stored += int((bank.valid & (bank.score > 0)).sum())
    assert returned > 20 and stored > 20 and (mode == "replay" or cache.stats["total_sketch_promotions"])


def test_when_there_is_no_room_sketches_originals_stay_and_scores_are_only_compared():
    like = torch.zeros(1, 1, 0, 1)
    store, sketches = Originals.empty(like, like, 3), torch.tensor([[[False, True]]])
    for order, scores, parents in ((0, [0.9, 0.1], [0, 1]), (10, [0.8, 0.2], [0, 1])):
        tokens = WeightedTokens.new(*random_states(2, 1, 1, 1), torch.arange(order, order + 2)[None, None])
        tokens.score = torch.tensor([[scores]])
        store.store(tokens, tokens.score, torch.tensor([[parents]]), order, 0, sketches)
    assert sorted(zip(store.pos[0, 0].tolist(), store.score[0, 0].tolist(), strict=True)) == [
        (0, pytest.approx(0.9)), (1, pytest.approx(0.1)), (11, pytest.approx(0.2)),
    ]  # fmt: skip
