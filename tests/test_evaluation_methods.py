"""The methods of a comparison: their names, and that all of them hold as many tokens a head."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import stream, token_ids
from test_families import make as make_family
from transformers import DynamicCache

from streaming_llm import ADMSConfig
from streaming_llm.evaluation import METHODS, cache_factory, methods, plan_methods, resolve_settings
from streaming_llm.evaluation.methods import plan_equal_bytes

BOUNDED = [name for name in METHODS if name != "full"]
PLUS_PLUS = ADMSConfig.adm_plus_plus()


@pytest.fixture
def without_rope():
    """A tiny GPT-2."""
    return make_family("gpt2", vocab_size=256, n_embd=64)


def attended_after_compaction(settings) -> int:
    config = ADMSConfig(**settings)
    recalled = config.recall_budget if config.enable_recall else 0
    return config.expected_max_tokens - config.compression_interval + recalled


def test_the_documented_methods_can_be_named():
    assert {"full", "streaming", "h2o", "snapkv", "tova", "adms"} <= set(METHODS)
    assert [name for name, method in METHODS.items() if name != method.name] == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recent_size": 100, "compressed_budget": 60},
        {"start_size": 0, "compressed_budget": 8},
        {"start_size": 16, "compression_interval": 32},
        {"sketch_budget": 100, "replay_budget": 60},
        dict.fromkeys(methods.FEATURES, False),
        {"recall_budget": 100},
        {"enable_recall": True},
        {"enable_recall": True, "recall_budget": 16, "compressed_budget": 60},
    ],
)
def test_every_method_but_full_attends_to_as_many_tokens(settings):
    resolved = resolve_settings(settings)
    plans = plan_methods(list(METHODS), resolved)
    total = attended_after_compaction(resolved)
    assert [plan.method.name for plan in plans] == list(METHODS)
    for plan in plans:
        if plan.method.name == "full":
            assert plan.settings == {}
            continue
        tiers = ("compressed_budget", "sketch_budget", "replay_budget")
        middle = sum(plan.settings.get(tier, 0) for tier in tiers)
        if plan.settings.get("enable_recall"):
            middle += plan.settings["recall_budget"]
        assert plan.settings.get("start_size", 4) + plan.settings["recent_size"] + middle == total == plan.total_tokens
    streaming = next(plan for plan in plans if plan.method.name == "streaming")
    assert streaming.settings["recent_size"] == total - settings.get("start_size", 4)


def test_the_caches_themselves_promise_the_same_bound(tiny_llama):
    settings = resolve_settings({"recent_size": 24, "compressed_budget": 40, "rank": 4, "compression_interval": 16})
    bounds = {}
    for plan in plan_methods(list(METHODS), settings):
        made = cache_factory(tiny_llama, plan)()
        if plan.method.name == "full":
            assert type(made) is DynamicCache
        else:
            recalled = made.config.recall_budget if made.config.enable_recall else 0
            bounds[plan.method.name] = made.config.expected_max_tokens + recalled
    assert bounds == {name: 4 + 24 + 40 + 32 + 16 + 16 for name in BOUNDED}


def test_the_default_comparison_is_adm_plus_plus_at_516_tokens_with_the_library_s_other_settings():
    settings = resolve_settings({})
    (plan,) = plan_methods(["adms"], settings)
    assert plan.total_tokens == 516
    assert plan.settings == settings
    assert ADMSConfig(**settings) == ADMSConfig.adm_plus_plus(recent_size=256, compressed_budget=256 - 32 - 16)


def test_recall_takes_its_tokens_from_the_compressed_budget_and_leaves_all_else_as_it_is():
    adms, recall = plan_methods(["adms", "adms_recall"], resolve_settings({}))
    changed = {"enable_recall": True, "recall_budget": 64, "compressed_budget": 208 - 64}
    assert recall.settings == adms.settings | changed
    assert recall.total_tokens == adms.total_tokens == 516


@pytest.mark.parametrize(("budget", "recalled"), [(208, 64), (100, 50), (9, 4), (6, 2), (4, 0), (0, 0)])
def test_of_a_small_budget_recall_takes_half_and_leaves_what_is_kept_by_importance(budget, recalled):
    (plan,) = plan_methods(["adms_recall"], resolve_settings({"compressed_budget": budget}))
    assert (plan.settings["recall_budget"], plan.settings["compressed_budget"]) == (recalled, budget - recalled)


def test_more_recalled_tokens_than_there_is_budget_are_refused():
    with pytest.raises(ValueError, match="recall_budget=70 must not exceed compressed_budget=60"):
        plan_methods(["adms_recall"], resolve_settings({"recall_budget": 70, "compressed_budget": 60}))
    with pytest.raises(ValueError, match="sketch_budget, replay_budget and recall_budget together are 268 tokens"):
        resolve_settings({"enable_recall": True, "recall_budget": 220})


@pytest.mark.parametrize("name", ["adms_low_rank", "adms_vq", "adms_attention_matching"])
def test_the_presets_of_a_compressor_are_base_adms_with_the_whole_middle(name):
    (plan,) = plan_methods([name], resolve_settings({"controller_gain": 0.2}))
    (beside_recall,) = plan_methods([name], resolve_settings({"controller_gain": 0.2, "enable_recall": True}))
    assert not ADMSConfig(**beside_recall.settings).enable_recall
    assert beside_recall.settings["compressed_budget"] == plan.settings["compressed_budget"]
    compressor = name.removeprefix("adms_")
    config = ADMSConfig(**plan.settings)
    assert [feature for feature in methods.FEATURES if getattr(config, feature)] == []
    assert (config.compressor_type, config.compressed_budget, config.middle_allocation) == (compressor, 256, 256)


def test_presets_override_the_settings_they_stand_for():
    plans = {plan.method.name: plan for plan in plan_methods(["adms", "adms_vq"], resolve_settings({"rank": 8}))}
    assert plans["adms_vq"].settings["compressor_type"] == "vq"
    assert plans["adms_vq"].settings["rank"] == plans["adms"].settings["rank"] == 8
    assert "compressor_type" not in plans["adms"].settings


def test_a_method_named_twice_runs_once():
    assert [plan.method.name for plan in plan_methods(["adms", "full", "adms"], resolve_settings({}))] == [
        "adms",
        "full",
    ]


def test_unknown_methods_and_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="method 'lru' is not known; choose from full, streaming"):
        plan_methods(["full", "lru"], resolve_settings({}))
    with pytest.raises(ValueError, match="methods is empty"):
        plan_methods([], resolve_settings({}))
    with pytest.raises(ValueError, match="recent_size"):
        plan_methods(["adms"], resolve_settings({"recent_size": 0}))


def test_features_that_are_on_bring_their_recommended_settings():
    """Sketches and replayed tokens come out of the middle tokens: the comparison stays at 516 tokens."""
    off = dict.fromkeys(methods.FEATURES, False)
    settings = resolve_settings(off | {"enable_dual_fidelity": True, "enable_residual_replay": True})
    assert settings["sketch_budget"] == PLUS_PLUS.sketch_budget == 32
    assert settings["energy_replay_threshold"] == PLUS_PLUS.energy_replay_threshold
    assert settings["compressed_budget"] == 256 - 32 - 16
    assert "controller_gain" not in settings
    controlled = resolve_settings(off | {"enable_adaptive_controller": True})
    assert controlled["controller_scope"] == PLUS_PLUS.controller_scope != ADMSConfig().controller_scope
    assert controlled["compressed_budget"] == 256
    given = resolve_settings({"enable_dual_fidelity": True, "sketch_budget": 8, "compressed_budget": 100})
    assert (given["sketch_budget"], given["compressed_budget"]) == (8, 100)


def test_features_that_leave_too_little_of_the_middle_are_refused():
    with pytest.raises(ValueError, match="together are 316 tokens"):
        resolve_settings({"sketch_budget": 300})
    with pytest.raises(ValueError, match="min_importance_tokens=4 must not exceed compressed_budget=2"):
        plan_methods(["adms"], resolve_settings({"sketch_budget": 238}))


def test_default_features_can_be_turned_off():
    off = dict.fromkeys(methods.FEATURES, False)
    assert resolve_settings(off) == {**off, "recent_size": 256, "compressed_budget": 256}


def test_the_variance_based_budget_alone_takes_the_controller_s_place(tiny_llama):
    settings = resolve_settings({"use_adaptive_budget": True})
    config = ADMSConfig(**settings)
    assert [feature for feature in methods.FEATURES if getattr(config, feature)] == list(methods.FEATURES[:3])
    assert "controller_gain" not in settings
    small = resolve_settings({"use_adaptive_budget": True, "recent_size": 24, "compressed_budget": 40, "rank": 4})
    assert {plan.total_tokens for plan in plan_methods(list(BOUNDED), small)} == {4 + 24 + 40 + 32 + 16}
    for plan in plan_methods(["adms", "adms_vq"], small):
        assert cache_factory(tiny_llama, plan)().config.use_adaptive_budget


def test_the_variance_based_budget_and_the_controller_asked_for_together_are_refused():
    both = resolve_settings({"use_adaptive_budget": True, "enable_adaptive_controller": True})
    with pytest.raises(ValueError, match="use_adaptive_budget=True and enable_adaptive_controller=True"):
        plan_methods(["adms"], both)


def test_without_rope_calibration_by_default_is_off_and_told_once(without_rope, caplog):
    (plan,) = plan_methods(["adms"], resolve_settings({}))
    make = cache_factory(without_rope, plan)
    configs = [make().config for _ in range(3)]
    assert configs == [ADMSConfig(**{**plan.settings, "enable_position_calibration": False})] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "position calibration is off: model type 'gpt2' has no RoPE"
    ]


@pytest.mark.parametrize("resolve", [resolve_settings, dict], ids=["resolved", "plain"])
def test_without_rope_calibration_that_was_asked_for_is_refused_by_name(without_rope, resolve):
    asked = {"enable_position_calibration": True, "recent_size": 24, "compressed_budget": 40}
    (plan,) = plan_methods(["adms"], resolve(asked))
    with pytest.raises(ValueError, match="enable_position_calibration=True can't be: model type 'gpt2' has no RoPE"):
        cache_factory(without_rope, plan)()
    (base,) = plan_methods(["adms_low_rank"], resolve(asked))
    assert not cache_factory(without_rope, base)().config.enable_position_calibration


SMALL = {"recent_size": 24, "compressed_budget": 40, "rank": 4, "compression_interval": 16, "sketch_originals": 16}


@pytest.mark.parametrize("settings", [{}, {"recall_bits": 8}, {"recall_tokens": 200}], ids=str)
def test_equal_bytes_are_the_most_tokens_that_fit_into_what_recall_takes(tiny_llama, settings):
    resolved = resolve_settings(SMALL | settings)
    plans = plan_equal_bytes(list(METHODS), resolved, tiny_llama.config, "float32", 600)
    recall = next(plan for plan in plans if plan.method.name == "adms_recall")
    assert recall.config.recall_bits == settings.get("recall_bits", 4)
    assert recall.config.recall_tokens == settings.get("recall_tokens", 600 - 4 - 24)
    (equal_tokens,) = plan_methods(["adms_recall"], resolved)
    assert recall.total_tokens == equal_tokens.total_tokens
    size = recall.config.memory_bytes(tiny_llama.config, "float32")
    for plan in plans:
        if plan.method.name == "full":
            assert plan.settings == {}
            continue
        config = plan.config
        assert config.memory_bytes(tiny_llama.config, "float32") <= size
        if plan is recall:
            continue
        larger = dataclasses.replace(config, recent_size=config.recent_size + 1)
        assert larger.memory_bytes(tiny_llama.config, "float32") > size
        if plan.method.name in ("streaming", "adms_low_rank"):
            assert plan.total_tokens > recall.total_tokens
        assert cache_factory(tiny_llama, plan)().config.expected_max_tokens == plan.total_tokens + 16


def test_equal_bytes_hold_for_the_caches_at_the_end_of_the_stream(tiny_llama):
    plans = plan_equal_bytes(
        ["streaming", "adms_low_rank", "adms_recall"], resolve_settings(SMALL), tiny_llama.config, "float32", 600
    )
    size = plans[-1].config.memory_bytes(tiny_llama.config, "float32")
    for plan in plans:
        cache = cache_factory(tiny_llama, plan)()
        stream(tiny_llama, token_ids(600), cache, 16)
        assert 0.85 * size < cache.nbytes <= size, plan.method.name


def test_at_equal_bytes_adms_told_to_recall_is_as_large_as_the_method_that_does(tiny_llama):
    resolved = resolve_settings(SMALL | {"enable_recall": True, "recall_budget": 16})
    adms, recall = plan_equal_bytes(["adms", "adms_recall"], resolved, tiny_llama.config, "float32", 600)
    assert adms.settings == recall.settings and adms.settings["recall_bits"] == 4


def test_equal_bytes_that_are_too_few_for_a_method_are_refused(tiny_llama):
    tiny = resolve_settings(SMALL | {"recent_size": 1, "compressed_budget": 0})
    with pytest.raises(ValueError, match="is too little for this model and these settings"):
        plan_equal_bytes(["adms_attention_matching"], tiny | {"attention_window": 4096}, tiny_llama.config, "float32", 100)
