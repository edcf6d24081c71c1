"""Wiring a model and undoing it; what is refused, by name."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
import transformers
from conftest import make_tiny_llama, stream, token_ids
from transformers import BertConfig, BertModel, DynamicCache, GenerationConfig, LlamaForCausalLM

from streaming_llm import (
    ADMSConfig,
    ADMSKVCache,
    ADMSLayer,
    disable_adms_llm,
    enable_adms_llm,
    enable_adms_low_rank,
    enable_adms_vq,
    enable_streaming_llm,
)
from streaming_llm.model import enable as wiring
from streaming_llm.model.attention import WiredConfig
from streaming_llm.model.enable import is_enabled

SMALL = {"start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8}


def hooks_of(model) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunk", [1, 30])
def test_an_enabled_model_with_another_cache_is_what_it_was_to_the_bit(implementation, chunk):
    model, ids = make_tiny_llama(), token_ids(60, 2)
    model.set_attn_implementation(implementation)
    with_cache = stream(model, ids, DynamicCache(config=model.config), chunk)
    with torch.no_grad():
        without = model(ids, use_cache=False).logits
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    enable_adms_llm(model, **SMALL)
    assert torch.equal(stream(model, ids, DynamicCache(config=model.config), chunk), with_cache)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, without)
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6), said)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_disabling_restores_everything(implementation):
    model, ids = make_tiny_llama(), token_ids(60)
    model.set_attn_implementation(implementation)
    expected = stream(model, ids, DynamicCache(config=model.config), 7)
    attributes, hooks = set(model.__dict__), hooks_of(model)
    forward = model.forward
    stream(model, ids, enable_adms_llm(model, **SMALL), 7)
    assert is_enabled(model) and hooks_of(model) != hooks
    assert model.config._attn_implementation == implementation
    assert model.model.layers[0].self_attn.config._attn_implementation == f"adms_{implementation}"
    disable_adms_llm(model)
    assert not is_enabled(model) and hooks_of(model) == hooks and set(model.__dict__) == attributes
    assert model.config._attn_implementation == implementation and model.forward == forward
    assert all(getattr(module, "config", model.config) is model.config for module in model.modules())
    assert torch.equal(stream(model, ids, DynamicCache(config=model.config), 7), expected)
    disable_adms_llm(model)


def test_disabling_a_model_that_was_never_enabled_is_harmless(tiny_llama):
    before = hooks_of(tiny_llama)
    disable_adms_llm(tiny_llama)
    assert hooks_of(tiny_llama) == before


def test_enabling_again_takes_other_settings_and_adds_no_second_hook(tiny_llama):
    first = enable_adms_llm(tiny_llama, **SMALL)
    hooks = hooks_of(tiny_llama)
    second = enable_adms_llm(tiny_llama, recent_size=24, compressor_type="vq")
    assert hooks_of(tiny_llama) == hooks
    assert first is not second and (first.recent_size, second.recent_size) == (16, 24)
    assert second.config.compressor_type == "vq"
    ids = token_ids(80)
    expected = stream(tiny_llama, ids, enable_adms_llm(tiny_llama, **SMALL), 7)
    assert torch.equal(stream(tiny_llama, ids, first, 7), expected)


def test_two_caches_on_one_model_in_turn_do_not_disturb_each_other(tiny_llama):
    ids, others = token_ids(100), token_ids(100, seed=5)
    settings = {**SMALL, "compressor_type": "attention_matching"}
    expected = stream(tiny_llama, ids, enable_adms_llm(tiny_llama, **SMALL), 5)
    expected_other = stream(tiny_llama, others, enable_adms_llm(tiny_llama, **settings), 5)
    one, two = enable_adms_llm(tiny_llama, **SMALL), enable_adms_llm(tiny_llama, **settings)
    got = [[], []]
    for start in range(0, 100, 5):
        for cache, tokens, parts in ((one, ids, got[0]), (two, others, got[1])):
            parts.append(stream(tiny_llama, tokens[:, start : start + 5], cache, 5))
    assert torch.equal(torch.cat(got[0], dim=1), expected)
    assert torch.equal(torch.cat(got[1], dim=1), expected_other)


def test_a_change_of_implementation_by_the_user_is_kept(tiny_llama):
    enable_adms_llm(tiny_llama, **SMALL)
    tiny_llama.set_attn_implementation("eager")
    disable_adms_llm(tiny_llama)
    assert tiny_llama.config._attn_implementation == "eager"
    tiny_llama.set_attn_implementation("sdpa")
    enable_adms_llm(tiny_llama, **SMALL)
    tiny_llama.set_attn_implementation("eager")
    cache = enable_adms_llm(tiny_llama, **SMALL)
    assert tiny_llama.model.layers[0].self_attn.config._attn_implementation == "adms_eager"
    stream(tiny_llama, token_ids(80), cache, 5)
    disable_adms_llm(tiny_llama)
    assert tiny_llama.config._attn_implementation == "eager"


@pytest.mark.parametrize("enable", [enable_adms_llm, enable_adms_low_rank, enable_adms_vq, enable_streaming_llm])
def test_an_unknown_setting_is_refused_with_the_closest_one_and_nothing_changed(tiny_llama, enable):
    before = hooks_of(tiny_llama)
    with pytest.raises(ValueError, match="'compresed_budget'.*did you mean compressed_budget"):
        enable(tiny_llama, compresed_budget=3)
    assert not is_enabled(tiny_llama) and hooks_of(tiny_llama) == before
    assert tiny_llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrong", [{"recent_size": 0}, {"rank": 17}, {"rank": "big"}, {"sketch_budget": 4}])
def test_a_wrong_setting_is_refused_and_nothing_changed(tiny_llama, wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        enable_adms_llm(tiny_llama, **wrong)
    assert not is_enabled(tiny_llama) and tiny_llama.config._attn_implementation == "sdpa"


def test_a_model_without_a_cache_of_its_text_is_refused_by_name():
    bert = BertModel(BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                num_attention_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match="'bert'"):
        enable_adms_llm(bert)


def test_what_is_no_model_is_refused():
    for wrong in (None, "llama", torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="PreTrainedModel"):
            enable_adms_llm(wrong)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_an_attention_without_a_place_for_log_mass_is_refused_with_advice(tiny_llama, name):
    tiny_llama.config._attn_implementation_internal = name
    with pytest.raises(ValueError) as error:
        enable_adms_llm(tiny_llama)
    assert name in str(error.value) and "set_attn_implementation('sdpa')" in str(error.value)
    assert not is_enabled(tiny_llama)


def test_config_and_settings_together_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="recent_size"):
        enable_adms_llm(tiny_llama, ADMSConfig(), recent_size=3)
    config = ADMSConfig(**SMALL)
    assert enable_adms_llm(tiny_llama, config).config is config


def test_the_entry_points_choose_their_compressor_and_settings(tiny_llama):
    low_rank = enable_adms_low_rank(tiny_llama, rank=5, recent_size=9)
    assert (low_rank.config.compressor_type, low_rank.config.rank, low_rank.recent_size) == ("low_rank", 5, 9)
    vq = enable_adms_vq(tiny_llama, num_clusters=7)
    assert (vq.config.compressor_type, vq.config.num_clusters) == ("vq", 7)
    assert enable_adms_low_rank(tiny_llama).config.rank == 16 and enable_adms_vq(tiny_llama).config.num_clusters == 64
    plain = enable_streaming_llm(tiny_llama)
    assert (plain.start_size, plain.recent_size, plain.middle_allocation) == (4, 2000, 0)


def test_a_bare_decoder_can_be_enabled_too(tiny_llama):
    decoder, ids = tiny_llama.model, token_ids(100)
    with torch.no_grad():
        expected = decoder(ids[:, :10]).last_hidden_state
    cache = enable_adms_llm(decoder, **SMALL)
    with torch.no_grad():
        first = decoder(ids[:, :10], past_key_values=cache).last_hidden_state
        for start in range(10, 100, 5):
            decoder(input_ids=ids[:, start : start + 5], past_key_values=cache)
    assert torch.equal(first, expected)
    assert cache.get_seq_length() == 100 and cache.held_tokens <= cache.config.expected_max_tokens
    disable_adms_llm(decoder)


def test_input_embeddings_work_in_place_of_tokens(tiny_llama):
    ids = token_ids(90)
    expected = stream(tiny_llama, ids, enable_adms_llm(tiny_llama, **SMALL), 5)
    cache, parts = enable_adms_llm(tiny_llama, **SMALL), []
    with torch.no_grad():
        embedded = tiny_llama.get_input_embeddings()(ids)
        for start in range(0, 90, 5):
            parts.append(tiny_llama(inputs_embeds=embedded[:, start : start + 5], past_key_values=cache).logits)
    assert torch.equal(torch.cat(parts, dim=1), expected)


def test_a_cache_of_a_model_no_longer_enabled_says_so(tiny_llama):
    cache, ids = enable_adms_llm(tiny_llama, **SMALL), token_ids(90)
    stream(tiny_llama, ids[:, :60], cache, 5)
    disable_adms_llm(tiny_llama)
    with pytest.raises(RuntimeError, match="enable_adms_llm"):
        stream(tiny_llama, ids[:, 60:], cache, 5)


def test_only_full_attention_layers_become_adms_layers(tiny_llama):
    cache = enable_adms_llm(tiny_llama)
    assert isinstance(cache, ADMSKVCache) and len(cache.layers) == 2
    assert cache.wired and all(isinstance(layer, ADMSLayer) for layer in cache.layers)
    assert all(layer.stream is cache.stream for layer in cache.layers)


def trained_to(positions: int):
    """A tiny random Llama trained to so many positions."""
    from streaming_llm.evaluation.soak import tiny_model

    return tiny_model(positions)


@pytest.mark.parametrize("enable", [enable_adms_llm, enable_adms_low_rank, enable_adms_vq, enable_streaming_llm])
def test_the_default_settings_work_on_a_model_of_any_trained_length(enable, caplog):
    for positions in (256, 2048, 4096):
        caplog.clear()
        cache = enable(trained_to(positions), **({"rank": 8} if enable is not enable_adms_low_rank else {}))
        assert cache.config.most_slots <= positions
        assert cache.recent_size == 2000 or cache.config.most_slots == positions
        assert [f"recent_size is {cache.recent_size}:" in said for said in caplog.messages] == [True] * (
            cache.recent_size < 2000
        )
    cache = enable_adms_llm(trained_to(2048), ADMSConfig.adm_plus_plus())
    assert cache.config.most_slots == 2048


@pytest.mark.parametrize("modules", [{}, {"enable_adaptive_controller": True, "controller_scope": "model"}])
def test_the_largest_budgets_that_are_taken_stream_past_the_trained_length(modules):
    model, shape = trained_to(64), {**SMALL, **modules}
    with pytest.raises(ValueError, match="recent_size=64 does not fit.*made for 64 positions") as error:
        enable_adms_llm(model, **{**shape, "recent_size": 64})
    most = int(str(error.value).split("recent_size=")[2].split()[0])
    cache = enable_adms_llm(model, **{**shape, "recent_size": most})
    stream(model, token_ids(400), cache, SMALL["compression_interval"])
    assert cache.current_length == 400
    with pytest.raises(ValueError, match=f"recent_size={most + 1} does not fit"):
        enable_adms_llm(model, **{**shape, "recent_size": most + 1})


@pytest.mark.parametrize("settings", [{"recent_size": 5000}, {"compressed_budget": 5000}, {"compression_interval": 5000}])
def test_budgets_that_can_not_fit_are_refused_by_name_and_nothing_changed(tiny_llama, settings):
    before = hooks_of(tiny_llama)
    with pytest.raises(ValueError, match="does not fit: .*made for 4096 positions"):
        enable_adms_llm(tiny_llama, rank=8, **settings)
    assert not is_enabled(tiny_llama) and hooks_of(tiny_llama) == before
    assert tiny_llama.config._attn_implementation == "sdpa"
    assert enable_adms_llm(tiny_llama, rank=8, position_policy="absolute", **settings).config.most_slots > 4096


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        | {"original_max_position_embeddings": 128},
    ],
    ids=lambda rope: rope.get("rope_type"),
)
def test_the_limit_that_is_planned_with_is_the_one_that_holds(rope):
    model = trained_to(256)
    if rope:
        config = model.config
        config.rope_parameters = {"rope_theta": 10000.0, **rope}
        model = type(model)(config).eval()
    cache = enable_adms_llm(model, **SMALL)
    assert cache.config.position_limit(model.config) == cache.window.limit


def traces_of(model) -> list:
    """Everything enabling could leave behind in a model; kvpress, once imported, leaves a mark of its own at any forward."""
    parts = [
        (sorted({*vars(module)} - {"masked_key_indices"}), vars(module).get("config"), type(module).forward)
        for module in model.modules()
    ]
    implementations = [config._attn_implementation for _, config, _ in parts if config is not None]
    return [*[(names, id(config), forward) for names, config, forward in parts], *implementations, *hooks_of(model)]


class Failure(BaseException):
    """What a step of the wiring fails with."""


@pytest.mark.parametrize("function", ["wire", "_wire_decoder", "_wire_head"])
def test_enabling_that_fails_at_any_step_leaves_nothing_behind(function):
    model, code = make_tiny_llama(), getattr(wiring, function).__code__
    before, failures = traces_of(model), 0

    def failing_at(line: int):
        def fail(frame, event, _):
            if frame.f_code is code and event == "line" and frame.f_lineno == line:
                raise Failure
            return fail if frame.f_code is code else None

        return fail

    for line in {line for _, _, line in code.co_lines() if line is not None}:
        earlier = sys.gettrace()
        sys.settrace(failing_at(line))
        try:
            enable_adms_llm(model, **SMALL)
        except Failure:
            failures += 1
        finally:
            sys.settrace(earlier)
        if is_enabled(model):  # a line that is not reached
            disable_adms_llm(model)
        assert traces_of(model) == before, line
    assert failures >= 5


def test_the_config_is_never_changed_and_the_attention_sees_what_is_set_in_it(tiny_llama):
    model, ids = tiny_llama, token_ids(60)
    before = copy.deepcopy(model.config.__dict__)
    cache = enable_adms_llm(model, **SMALL)
    assert model.config.__dict__ == before and model.config is model.model.config
    seen = model.model.layers[0].self_attn.config
    model.config.hidden_act = "gelu"
    assert isinstance(seen, WiredConfig) and seen.hidden_act == "gelu"
    seen.hidden_act = "silu"
    assert model.config.hidden_act == "silu"
    sdpa = stream(model, ids[:, :30], cache, 5)
    model.set_attn_implementation("eager")
    assert seen._attn_implementation == "adms_eager"
    eager = stream(model, ids[:, 30:], cache, 5)
    assert sdpa.isfinite().all() and eager.isfinite().all()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*set_attn_implementation"):
        stream(model, ids[:, :5], cache, 5)
    assert cache.get_seq_length() == 60
    model.set_attn_implementation("sdpa")
    assert stream(model, ids[:, :5], cache, 5).isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_two_models_of_one_config_are_enabled_and_disabled_each_by_itself(implementation):
    one = make_tiny_llama()
    two, ids = LlamaForCausalLM(one.config).eval(), token_ids(60)
    two.load_state_dict(one.state_dict())
    one.set_attn_implementation(implementation)
    before = traces_of(two)
    expected = stream(one, ids, enable_adms_llm(one, **SMALL), 5)
    assert traces_of(two) == before
    cache = enable_adms_llm(two, **SMALL)
    disable_adms_llm(one)
    assert torch.equal(stream(two, ids, cache, 5), expected) and is_enabled(two) and not is_enabled(one)
    disable_adms_llm(two)
    assert traces_of(two) == before


def test_a_copy_of_an_enabled_model_is_enabled_and_disabled_by_itself(tiny_llama):
    ids, before = token_ids(60), hooks_of(tiny_llama)
    expected = stream(tiny_llama, ids, enable_adms_llm(tiny_llama, **SMALL), 5)
    twin = copy.deepcopy(tiny_llama)
    disable_adms_llm(tiny_llama)
    assert torch.equal(stream(twin, ids, enable_adms_llm(twin, **SMALL), 5), expected)
    assert twin.model.layers[0].self_attn.config.config is twin.config
    disable_adms_llm(twin)
    assert hooks_of(twin) == hooks_of(tiny_llama) == before
    assert all(getattr(module, "config", twin.config) is twin.config for module in twin.modules())


def test_a_model_and_its_decoder_may_both_be_enabled(tiny_llama):
    ids, before = token_ids(60), traces_of(tiny_llama)
    expected = stream(tiny_llama, ids, enable_adms_llm(tiny_llama, **SMALL), 5)
    hooks = hooks_of(tiny_llama)
    enable_adms_llm(tiny_llama.model, **SMALL)
    assert hooks_of(tiny_llama) == hooks
    disable_adms_llm(tiny_llama.model)
    assert not is_enabled(tiny_llama)
    assert torch.equal(stream(tiny_llama, ids, enable_adms_llm(tiny_llama, **SMALL), 5), expected)
    disable_adms_llm(tiny_llama)
    assert traces_of(tiny_llama) == before


@pytest.mark.parametrize("positional", [True, False])
def test_a_model_not_enabled_refuses_an_enabled_models_cache_at_the_first_pass(positional):
    model, other, ids = make_tiny_llama(), make_tiny_llama(), token_ids(8)
    for wrong in (other, other.model, model, model.model):
        cache = enable_adms_llm(model, **SMALL)
        if wrong in (model, model.model):
            disable_adms_llm(model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"not \(or no longer\) enabled.*enable_adms_llm"), torch.no_grad():
                wrong(*([ids] if positional else []), **({} if positional else {"input_ids": ids}), past_key_values=cache)
        assert cache.get_seq_length() == 0
        enable_adms_llm(model)
        assert stream(model, ids, cache, 4).isfinite().all() and cache.get_seq_length() == 8


def test_continuous_batching_of_an_enabled_model_says_what_it_says_without():
    model = make_tiny_llama()
    model.set_attn_implementation("eager")
    asked = [token_ids(7, seed=1)[0].tolist(), token_ids(9, seed=2)[0].tolist()]
    settings = {"num_blocks": 8, "max_batch_tokens": 64}
    options = {}
    if hasattr(transformers, "ContinuousBatchingConfig"):
        own = transformers.ContinuousBatchingConfig(**settings, page_size=16, max_requests_per_batch=4)
        options = {"continuous_batching_config": own, "warmup": False}
    else:
        model.generation_config.update(**settings)

    def said() -> list[list[int]]:
        chosen = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=2)
        found = model.generate_batch(inputs=asked, generation_config=chosen, **options)
        # Releases before 5.3 leave the implementation changed.
        model.set_attn_implementation("eager")
        return [answer.generated_tokens for answer in found.values()]

    expected = said()
    cache = enable_adms_llm(model, **SMALL)
    assert said() == expected
    assert stream(model, token_ids(60), cache, 5).isfinite().all() and cache.stats["total_compressions"] > 0


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_of_the_cache_are_taken_without_a_warning(tiny_llama, name):
    ids = token_ids(40)
    inputs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "min_new_tokens": 20}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        cache = enable_adms_llm(tiny_llama, **SMALL)
        said = tiny_llama.generate(ids, **inputs, **{name: cache})
        assert said.shape[1] == 60 and cache.get_seq_length() == 59 and cache.stats["total_compressions"] > 0
        for model in (tiny_llama, tiny_llama.model):
            for given in ((ids,), ()):
                cache = enable_adms_llm(tiny_llama, **SMALL)
                model(*given, **({} if given else {"input_ids": ids}), **{name: cache})
                assert cache.get_seq_length() == 40
