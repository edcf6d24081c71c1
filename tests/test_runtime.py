"""Where a model runs: inference mode, autograd, threads, data types, devices, and failures in the middle of a pass."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading

import pytest
import torch
from conftest import make_tiny_llama, random_queries, random_states, stream, token_ids
from test_families import make
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from streaming_llm import ADMSConfig, ADMSKVCache, disable_adms_llm, enable_adms_llm, enable_streaming_llm
from streaming_llm.compaction import pipeline
from streaming_llm.evaluation.lone_layer import LoneLayer
from streaming_llm.model.attention import register
from streaming_llm.store.stack import Stack
from streaming_llm.stream.arrival import Arrival

SMALL = {
    "start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8,
    "attention_window": 16, "num_clusters": 4, "min_middle_size_for_compress": 0,
}  # fmt: skip
MODULES = {"sketch_budget": 4, "replay_budget": 2, "energy_replay_threshold": 1.0}
BASE = ADMSConfig(**SMALL)
PLUS = ADMSConfig.adm_plus_plus(**SMALL, **MODULES)
PLUS_PER_LAYER = ADMSConfig.adm_plus_plus(**SMALL, **MODULES, controller_scope="layer")
ADAPTIVE = ADMSConfig(**SMALL, use_adaptive_budget=True, compressor_type="attention_matching")
VQ = ADMSConfig(**SMALL, compressor_type="vq")
CONFIGS = {"base": BASE, "adm++": PLUS, "adm++ per layer": PLUS_PER_LAYER, "adaptive": ADAPTIVE, "vq": VQ}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}

MODEL = make_tiny_llama()


def tensors_in(value, found: dict | None = None) -> dict:
    """Every tensor reachable from an object of the package, by its id."""
    found = {} if found is None else found
    if id(value) in found:
        return found
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            tensors_in(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, found)
    elif type(value).__module__.startswith(("streaming_llm", "transformers.cache_utils")):
        found[id(value)] = None
        tensors_in(vars(value), found)
    return found


def kept(cache) -> list[torch.Tensor]:
    return [tensor for tensor in tensors_in(cache).values() if tensor is not None]


# -- inference mode ------------------------------------------------------------------------------------------------------


@functools.cache
def run_in_modes(config: str, *modes: str) -> torch.Tensor:
    """Logits of a stream whose passes are made in these modes in turn."""
    cache, parts = enable_adms_llm(MODEL, CONFIGS[config]), []
    # Runs of passes, so that a compaction comes first in each mode, and a long pass with its own compaction.
    for number, chunk in enumerate(token_ids(160, 2).split([5] * 22 + [50], dim=1)):
        with MODES[modes[number // 2 % len(modes)]]():
            parts.append(MODEL(chunk, past_key_values=cache).logits.detach().clone())
        assert not any(tensor.is_inference() for tensor in kept(cache))
    assert cache.stats["total_compressions"] > 20
    return torch.cat(parts, dim=1)


ORDERS = ["inference-no_grad", "no_grad-grad-inference", "inference-grad", "grad"]


@pytest.mark.parametrize(
    "config,order",
    [*((name, order) for name in ("base", "adm++") for order in ORDERS), *((name, ORDERS[1]) for name in [*CONFIGS][2:])],
)
def test_one_cache_goes_through_every_mode_with_equal_logits(config, order):
    assert torch.equal(run_in_modes(config, *order.split("-")), run_in_modes(config, "no_grad"))


@EVERY
def test_generation_in_inference_mode_goes_on_outside_and_its_rows_can_move(config):
    ids = token_ids(60, 2)

    def run(modes: list) -> torch.Tensor:
        cache, said = enable_adms_llm(MODEL, config), ids
        for mode in modes:
            with mode():
                said = MODEL.generate(
                    said, attention_mask=torch.ones_like(said), max_new_tokens=9, min_new_tokens=9, past_key_values=cache
                ).clone()
                cache.reorder_cache(torch.tensor([1, 0]))
                said = said.flip(0)
        return said

    mixed = run([torch.inference_mode, contextlib.nullcontext, torch.no_grad, torch.inference_mode, torch.no_grad])
    assert torch.equal(mixed, run([torch.no_grad] * 5))


def test_layers_with_a_sliding_window_go_through_every_mode_too():
    model, ids = make("gemma2", "eager"), token_ids(120)

    def run(modes: list[str]) -> torch.Tensor:
        cache, parts = enable_adms_llm(model, BASE), []
        for number, chunk in enumerate(ids.split(5, dim=1)):
            with MODES[modes[number % len(modes)]]():
                parts.append(model(chunk, past_key_values=cache).logits.detach().clone())
        return torch.cat(parts, dim=1)

    assert torch.equal(run(["inference", "no_grad", "grad"]), run(["no_grad"]))


def test_what_is_done_by_hand_in_inference_mode_goes_on_outside():
    cache = ADMSKVCache(PLUS)
    states = torch.randn(2, 6, 8)

    def once() -> None:
        cache._update_sketch_bank(0, 0, *states, torch.arange(6))
        cache._update_replay_bank(0, 0, *states, torch.arange(6))
        cache._update_calibration_anchors(0, 0, torch.arange(6))
        cache._update_controller_state(0, 0, 0.5, 0.5)

    with torch.inference_mode():
        once()
    once()
    assert len(cache.sketch_bank) == len(cache.replay_bank) == 1


# -- autograd ------------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nothing_kept_is_part_of_a_graph(config, family):
    model = make(family, "eager")
    cache = enable_adms_llm(model, config)
    for chunk in token_ids(104).split([30] + [1] * 12 + [50] + [1] * 12, dim=1):
        assert model(chunk, past_key_values=cache).logits.requires_grad
        assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in kept(cache))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_graph_of_a_pass_does_not_grow_with_the_stream(family):
    def nodes(tensor: torch.Tensor) -> int:
        seen, todo = set(), [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return len(seen)

    model, counts = make(family, "eager"), []
    cache = enable_adms_llm(model, PLUS)
    for token in token_ids(90).T:
        counts.append(nodes(model(token[None], past_key_values=cache).logits))
    assert len(set(counts[60:])) == 1 and counts[-1] <= counts[0] + 30


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_of_the_first_pass_are_the_models_own(implementation):
    model, ids = make("llama", implementation), token_ids(30)
    expected = gradients(model, model(ids, labels=ids).loss)
    got = gradients(model, model(ids, labels=ids, past_key_values=enable_adms_llm(model, BASE)).loss)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("learnt", ["all", "queries only"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_backward_pass_after_later_passes_gives_the_gradients_of_its_own(learnt, implementation):
    # As many KV heads as heads: nothing is repeated, so nothing is copied on the way.
    model, ids = make("llama", implementation, num_key_value_heads=4), token_ids(70)
    if learnt != "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
    found = []
    for late in (False, True):
        cache = enable_adms_llm(model, BASE)
        stream(model, ids[:, :50], cache, 5)
        assert cache.layers[0].compacted
        loss = model(ids[:, 50:52], labels=ids[:, 50:52], past_key_values=cache).loss
        if not late:
            found.append(gradients(model, loss))
        stream(model, ids[:, 52:], cache, 2)
        if late:
            found.append(gradients(model, loss))
    assert any(gradient.abs().sum() > 0 for gradient in found[0])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_is_kept_is_a_constant_to_the_next_pass():
    ids, model = token_ids(24), make_tiny_llama().double()
    cache = enable_adms_llm(model, BASE)
    first = model.get_input_embeddings()(ids[:, :20]).detach().requires_grad_()
    second = model.get_input_embeddings()(ids[:, 20:]).detach().requires_grad_()
    model(inputs_embeds=first, past_key_values=cache)
    loss = model(inputs_embeds=second, past_key_values=cache).logits.logsumexp(-1).sum()
    old, new = torch.autograd.grad(loss, (first, second), allow_unused=True)
    assert old is None
    # The gradient by finite differences, in the direction of the gradient itself.
    step = 1e-4 * new / new.norm()

    def value(shift: torch.Tensor) -> float:
        again = enable_adms_llm(model, BASE)
        with torch.no_grad():
            model(inputs_embeds=first, past_key_values=again)
            return model(inputs_embeds=second + shift, past_key_values=again).logits.logsumexp(-1).sum().item()

    measured = (value(step) - value(-step)) / 2
    assert measured == pytest.approx((new * step).sum().item(), rel=1e-3)


# -- threads -------------------------------------------------------------------------------------------------------------


def at_once(*jobs) -> list:
    """What each job returns, all run at the same time in threads of their own."""
    results, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def run(number: int) -> None:
        try:
            barrier.wait()
            results[number] = jobs[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


NEW = 40


def generate(model, ids: torch.Tensor, cache) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, past_key_values=cache
    )


@pytest.mark.parametrize("config", [BASE, PLUS], ids=["base", "adm++"])
def test_two_threads_generate_with_two_caches_on_one_model(config):
    prompts = [token_ids(50, seed=1), token_ids(35, 2, seed=2)]
    alone = [generate(MODEL, ids, enable_adms_llm(MODEL, config)) for ids in prompts]
    caches = [enable_adms_llm(MODEL, config) for _ in prompts]
    together = at_once(*(lambda pair=pair: generate(MODEL, *pair) for pair in zip(prompts, caches, strict=True)))
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_a_thread_with_another_cache_is_not_disturbed():
    ids, other = token_ids(50, seed=1), token_ids(40, seed=2)
    expected = generate(MODEL, ids, enable_adms_llm(MODEL, PLUS)), generate(make_tiny_llama(), other, None)
    got = at_once(
        lambda: generate(MODEL, ids, enable_adms_llm(MODEL, PLUS)),
        lambda: generate(MODEL, other, DynamicCache(config=MODEL.config)),
    )
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_model_may_be_enabled_while_another_thread_generates():
    ids = token_ids(50, seed=1)
    model = make_tiny_llama()
    enable_adms_llm(model, PLUS)
    expected, plain = generate(model, ids, enable_adms_llm(model, PLUS)), generate(make_tiny_llama(), ids, None)

    def enable_often() -> None:
        for _ in range(30):
            for make_cache in (lambda: enable_adms_llm(model, BASE), lambda: enable_streaming_llm(model, recent_size=20)):
                stream(model, ids[:, :3], make_cache(), 3)

    assert torch.equal(at_once(lambda: generate(model, ids, enable_adms_llm(model, PLUS)), enable_often)[0], expected)
    # Also for the first time, under the feet of a generation without the cache.
    disable_adms_llm(model)
    assert torch.equal(at_once(lambda: generate(model, ids, None), enable_often)[0], plain)


def test_threads_that_enable_a_model_at_the_same_time_wire_it_once():
    for _ in range(5):
        model = make_tiny_llama()
        decoder = model.get_decoder()
        at_once(*[lambda model=model: enable_adms_llm(model, BASE)] * 8)
        assert len(decoder._forward_pre_hooks) == len(decoder._forward_hooks) == 1
        disable_adms_llm(model)
        assert not decoder._forward_pre_hooks and not decoder._forward_hooks


# -- data types ----------------------------------------------------------------------------------------------------------


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_a_query_with_nothing_to_see_gives_finite_numbers(dtype, implementation, strength):
    # A row that is padding only, past its compaction: every slot is unused, and logits are as low as they get.
    layer = LoneLayer(BASE, wired=True)
    register()
    attend = ALL_ATTENTION_FUNCTIONS[f"adms_{implementation}"]
    attention = make("llama", implementation).model.layers[0].self_attn
    for tokens in [8] * 8 + [1] * 4:
        keys = torch.full((2, 2, tokens, 8), strength, dtype=dtype)
        query = -torch.full((2, 4, tokens, 8), strength, dtype=dtype)
        arrival = Arrival(tokens, (0, tokens), real=torch.tensor([[False], [True]]).expand(2, tokens))
        held, values = layer.update(keys, torch.ones_like(keys), arrival=arrival)
        out, _ = attend(attention, query, held, values, None, scaling=8**-0.5, dropout=0.0)
        assert out.isfinite().all()
        if layer.compacted:
            torch.testing.assert_close(out[1], torch.ones_like(out[1]))


@pytest.mark.parametrize("dtype", HALVES)
def test_log_mass_in_half_precision_is_as_good_as_the_type_allows(dtype):
    layer = LoneLayer(BASE, wired=True)
    keys, values = random_states(60, 2)
    for start in range(0, 60, 4):
        part = slice(start, start + 4)
        layer.update(keys[:, :, part].to(dtype), values[:, :, part].to(dtype))
        layer.observe(random_queries(4, 2).to(dtype), 0.3)
    layer.update(keys[:, :, -1:].to(dtype), values[:, :, -1:].to(dtype))
    part = layer.stream.part_of(0)
    beta = part.stack.tokens.beta[:, :, : part.stop]
    assert beta.gt(0.5).any()
    bias = layer.attention_bias(1, 2, dtype)[:, ::2, 0].float()
    finite = beta.isfinite()
    assert ((bias - beta)[finite].abs() <= beta[finite].abs() * torch.finfo(dtype).eps).all()


# -- failures in the middle of a pass ------------------------------------------------------------------------------------


class Broken(RuntimeError):
    """Raised by a test in the middle of a forward pass."""


@contextlib.contextmanager
def failing(model, layer: int, error: type[BaseException] = Broken, after: bool = False):
    """Within, the attention of a layer raises, before or after it has run."""

    def hook(module, *_):
        raise error

    attention = model.model.layers[layer].self_attn
    handle = attention.register_forward_hook(hook) if after else attention.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def give(model, cache, ids: torch.Tensor, chunk: int, error: type[BaseException] | None = None):
    if error is None:
        return stream(model, ids, cache, chunk)
    with pytest.raises(error):
        stream(model, ids, cache, chunk)


@functools.cache
def never_failed(family: str, tokens: int) -> torch.Tensor:
    """Logits of 44 tokens after so many, with no failure between."""
    model = make(family, "eager")
    cache = enable_adms_llm(model, BASE)
    if tokens:
        stream(model, token_ids(tokens), cache, 4)
    return stream(model, token_ids(44, seed=2), cache, 4)


# Every two of family, layer, point of the stream and way to fail meet.
FAILURES = [
    (family, layer, tokens, *((False, Broken), (False, KeyboardInterrupt), (True, KeyboardInterrupt))[(layer + point) % 3])
    for family in ("gemma2", "llama")
    for layer in range(3)
    for point, tokens in enumerate((0, 20, 36, 60))
]


@pytest.mark.parametrize("family,layer,tokens,after,error", FAILURES)
def test_a_failed_pass_is_taken_back_at_every_layer_of_every_kind(family, layer, tokens, after, error):
    model, new = make(family, "eager"), 4
    cache = enable_adms_llm(model, BASE)
    if tokens:
        stream(model, token_ids(tokens), cache, 4)
    with failing(model, layer, error, after):
        give(model, cache, token_ids(new, seed=1), new, error)
    assert cache.get_seq_length() == tokens
    assert torch.equal(stream(model, token_ids(44, seed=2), cache, 4), never_failed(family, tokens))
    assert [each.get_seq_length() for each in cache.layers] == [tokens + 44] * 3


@pytest.mark.parametrize(
    "config,layer,error,compactions,next_chunk",
    [
        (config, layer, error, *((0, 4), (3, 1))[(place + number) % 2])
        for place, config in enumerate(("base", "adm++", "adm++ per layer"))
        for number, (layer, error) in enumerate(
            [(0, Broken), (1, KeyboardInterrupt), (7, Broken), (8, KeyboardInterrupt), (9, KeyboardInterrupt)]
        )
    ],
)
def test_all_layers_are_at_one_point_after_a_pass_that_failed_between_two_groups(
    config, layer, error, compactions, next_chunk
):
    # Ten layers are two groups: a compaction that makes room for the pass has come to one of them, or to both.
    model, ids = make("llama", num_hidden_layers=10), token_ids(200)
    cache, tokens = enable_adms_llm(model, CONFIGS[config]), 0

    def due() -> bool:
        row = cache.layers[0].stack.rows[0]
        return row.compactions >= compactions and row.overfull(cache.config, 4)

    while tokens == 0 or not due():
        stream(model, ids[:, tokens : tokens + 4], cache, 4)
        tokens += 4
    never = copy.deepcopy(cache)
    with failing(model, layer, error):
        give(model, cache, token_ids(4, seed=1), 4, error)
    again = stream(model, token_ids(20, seed=2), cache, next_chunk)
    assert torch.equal(again, stream(model, token_ids(20, seed=2), never, next_chunk))
    rows = [each.stack.rows[0] for each in cache.layers]
    assert len({(row.seen, row.length - row.width, row.compactions) for row in rows}) == 1
    assert rows[0].seen == tokens + 20


# Where a compaction is made, what it did is counted, and it is put into the stack.
STEPS = [
    (pipeline._Compaction, "_compressed", Broken),
    (pipeline._Compaction, "_count", KeyboardInterrupt),
    (Stack, "with_parts", KeyboardInterrupt),
]


@pytest.mark.parametrize("owner,step,error", STEPS)
@pytest.mark.parametrize("config,new", [(BASE, 4), (BASE, 60), (PLUS, 4)], ids=["base-4", "base-60", "adm++-4"])
def test_a_failure_in_the_middle_of_a_compaction_leaves_the_cache_as_it_was(owner, config, step, error, new, monkeypatch):
    model = make("llama", num_hidden_layers=10)
    cache, never = (enable_adms_llm(model, config) for _ in range(2))
    for each in (cache, never):
        stream(model, token_ids(cache.config.expected_max_tokens - 2), each, 4)
    calls, own = [], getattr(owner, step)

    def fail(*args, **kwargs):
        # Not at once: other layers were compacted before.
        calls.append(args)
        if len(calls) < 2:
            return own(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        give(model, cache, token_ids(new, seed=1), new, error)
    assert len(calls) == 2 and cache.stats == never.stats and cache.get_seq_length() == never.get_seq_length()
    ids = token_ids(80)
    assert torch.equal(stream(model, ids, cache, 8), stream(model, ids, never, 8))


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("implementation", ["llama", "gemma2"])
def test_generate_called_again_after_a_failure_says_what_it_would_have_said(implementation, error):
    model, ids = make(implementation, "eager"), token_ids(50)
    expected = generate(model, ids, enable_adms_llm(model, BASE))
    cache, calls = enable_adms_llm(model, BASE), []

    def hook(module, *_):
        calls.append(1)
        if len(calls) == 30:
            raise error

    handle = model.model.layers[2].self_attn.register_forward_pre_hook(hook)
    with pytest.raises(error):
        generate(model, ids, cache)
    handle.remove()
    # 29 passes went well: the prompt's and those of 28 tokens said.
    assert cache.get_seq_length() == 50 + 28
    so_far = expected[:, : 50 + 29]
    again = model.generate(so_far, attention_mask=torch.ones_like(so_far), max_new_tokens=NEW - 29, min_new_tokens=NEW - 29,
                           past_key_values=cache)  # fmt: skip
    assert torch.equal(again, expected)


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select"])
def test_what_comes_between_an_interrupt_and_the_next_pass_finds_the_cache_as_it_was(change):
    changes = {
        "crop": lambda cache: cache.crop(-2),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    }
    caches = [enable_adms_llm(MODEL, BASE) for _ in range(2)]
    for cache in caches:
        stream(MODEL, token_ids(30, 2), cache, 5)
    with failing(MODEL, 1, KeyboardInterrupt):
        give(MODEL, caches[0], token_ids(4, 2, seed=1), 4, KeyboardInterrupt)
    for cache in caches:
        changes[change](cache)
    more = token_ids(40, caches[0].batch_size, seed=2)
    assert torch.equal(*(stream(MODEL, more, cache, 4) for cache in caches))


def test_without_the_hooks_a_cache_half_filled_by_a_failed_pass_says_so():
    model = make("llama", "eager")
    cache = ADMSKVCache(BASE, model_config=model.config)
    stream(model, token_ids(20), cache, 4)
    with failing(model, 2):
        give(model, cache, token_ids(4), 4, Broken)
    with pytest.raises(RuntimeError, match=r"before layer 2.*cache\.reset\(\)"):
        stream(model, token_ids(4), cache, 4)
    with pytest.raises(RuntimeError, match=r"before layer 2.*cache\.reset\(\)"):
        stream(model, token_ids(4), cache, 4)
    cache.reset()
    assert stream(model, token_ids(20), cache, 4).isfinite().all()
