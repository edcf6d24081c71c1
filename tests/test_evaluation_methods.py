"""The methods of a comparison: their names, and that all of them hold as many tokens a head."""

from __future__ import annotations

import pytest
from transformers import DynamicCache

from streaming_llm import ADMSConfig
from streaming_llm.evaluation import METHODS, cache_factory, methods, plan_methods, resolve_settings

BOUNDED = [name for name in METHODS if name != "full"]


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
    ],
)
def test_every_method_but_full_holds_as_many_tokens(settings):
    plans = plan_methods(list(METHODS), resolve_settings(settings))
    start = settings.get("start_size", 4)
    total = start + settings.get("recent_size", 256) + settings.get("compressed_budget", 256)
    assert [plan.method.name for plan in plans] == list(METHODS)
    for plan in plans:
        if plan.method.name == "full":
            assert plan.settings == {}
            continue
        budget = plan.settings.get("compressed_budget", 0)
        assert plan.settings.get("start_size", 4) + plan.settings["recent_size"] + budget == total == plan.total_tokens
    streaming = next(plan for plan in plans if plan.method.name == "streaming")
    assert streaming.settings["recent_size"] == total - start


def test_the_caches_themselves_promise_the_same_bound(tiny_llama):
    settings = resolve_settings({"recent_size": 24, "compressed_budget": 40, "rank": 4, "compression_interval": 16})
    bounds = {}
    for plan in plan_methods(list(METHODS), settings):
        cache = cache_factory(tiny_llama, plan)()
        if plan.method.name == "full":
            assert type(cache) is DynamicCache
        else:
            bounds[plan.method.name] = cache.config.expected_max_tokens
    assert bounds == {name: 4 + 24 + 40 + 16 for name in BOUNDED}


def test_the_default_comparison_is_516_tokens_with_the_library_s_other_settings():
    settings = resolve_settings({})
    assert settings == {"recent_size": 256, "compressed_budget": 256}
    (plan,) = plan_methods(["adms"], settings)
    assert plan.total_tokens == 516
    assert plan.settings == settings


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


def test_features_that_are_on_bring_their_recommended_budgets(monkeypatch):
    """Sketches and replayed tokens come out of the middle tokens: the comparison stays at 516 tokens."""

    class Recommended:
        sketch_budget, replay_budget, energy_replay_threshold = 32, 16, 0.88
        controller_gain, controller_group_size = 0.35, 2

    monkeypatch.setattr(ADMSConfig, "adm_plus_plus", classmethod(lambda cls: Recommended), raising=False)
    settings = resolve_settings({"enable_dual_fidelity": True, "enable_residual_replay": True})
    assert settings["sketch_budget"] == 32
    assert settings["energy_replay_threshold"] == 0.88
    assert settings["compressed_budget"] == 256 - 32 - 16
    assert "controller_gain" not in settings
    given = resolve_settings({"enable_dual_fidelity": True, "sketch_budget": 8, "compressed_budget": 100})
    assert (given["sketch_budget"], given["compressed_budget"]) == (8, 100)
    with pytest.raises(ValueError, match="together are 300 tokens"):
        resolve_settings({"enable_dual_fidelity": True, "sketch_budget": 300})


def test_default_features_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(methods, "DEFAULT_FEATURES", methods.FEATURES)
    off = dict.fromkeys(methods.FEATURES, False)
    assert resolve_settings(off) == {**off, "recent_size": 256, "compressed_budget": 256}
