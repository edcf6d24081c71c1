"""`ADMSConfig`: every setting is checked, every size is what the cache really takes."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig

from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm

NAMES = ADMSConfig.setting_names()
REFERENCE_DEFAULTS = {
    "start_size": 4, "recent_size": 2000, "compressed_budget": 128, "compressor_type": "low_rank", "rank": 16,
    "num_clusters": 64, "svd_max_tokens": 512, "anchor_mode": "mean", "enable_pos_shift": True,
    "max_seq_length": 32768, "enable_dynamic_sink": False, "compression_interval": 64,
    "min_middle_size_for_compress": 64, "importance_ratio": 0.5, "min_importance_tokens": 4,
    "importance_metric": "attention", "attention_window": 256, "attention_blend": 1.0, "coverage_segments": 4,
    "coverage_priority": 0.0, "enable_dual_fidelity": False, "sketch_budget": 0, "sketch_reduction": "mean",
    "enable_residual_replay": False, "replay_budget": 0, "energy_replay_threshold": 0.9,
    "enable_position_calibration": False, "calibration_window": 512, "calibration_regularization": 0.1,
    "enable_adaptive_controller": False, "controller_gain": 0.3, "controller_energy_floor": 0.8,
    "controller_energy_ceiling": 0.97, "controller_group_size": 1, "use_adaptive_budget": False,
    "adaptive_budget_floor": 0.5, "adaptive_budget_cap": 2.5, "adaptive_variance_smoothing": 0.1,
}  # fmt: skip
OUT_OF_RANGE = [
    ("recall_budget", -1),
    ("recall_chunk_budget", -1),
    ("recall_tokens", 0),
    ("recall_rank", 0),
    ("start_size", -1), ("recent_size", 0), ("recent_size", -5), ("compressed_budget", -1), ("rank", 0),
    ("num_clusters", 0), ("svd_max_tokens", 0), ("max_seq_length", 0), ("compression_interval", 0),
    ("min_middle_size_for_compress", -1), ("importance_ratio", -0.1), ("importance_ratio", 1.1),
    ("min_importance_tokens", -1), ("attention_window", 0), ("attention_blend", 1.5), ("attention_blend", -0.5),
    ("coverage_segments", 0), ("coverage_priority", 2.0), ("coverage_priority", -1.0), ("sketch_budget", -1),
    ("replay_budget", -1), ("energy_replay_threshold", 0.0), ("energy_replay_threshold", 1.01),
    ("calibration_window", 0), ("calibration_regularization", -0.1), ("controller_gain", 1.2),
    ("controller_gain", -0.2), ("controller_energy_floor", -0.1), ("controller_energy_ceiling", 1.5),
    ("controller_group_size", 0), ("adaptive_budget_floor", -0.1), ("adaptive_budget_floor", 1.1),
    ("adaptive_budget_cap", 0.9), ("adaptive_variance_smoothing", 0.0), ("adaptive_variance_smoothing", 1.1),
    ("score_decay", -0.1), ("score_decay", 1.1),
    ("mass_decay", -0.1), ("mass_decay", 1.1), ("sketch_originals", -1), ("promotion_budget", -1), ("seed", -1),
    ("compaction_bytes", 0),
]  # fmt: skip
UNKNOWN_WORDS = {
    "compressor_type": "low_rank", "anchor_mode": "hybrid", "importance_metric": "value_norm",
    "sketch_reduction": "first", "controller_scope": "model",
}  # fmt: skip


def test_the_defaults_are_those_of_the_reference_table():
    config = ADMSConfig()
    assert {name: getattr(config, name) for name in REFERENCE_DEFAULTS} == REFERENCE_DEFAULTS


def test_adm_plus_plus_has_the_values_of_the_reference_table_and_takes_overrides():
    config = ADMSConfig.adm_plus_plus(replay_budget=8, rank=4)
    assert config.enable_dual_fidelity and config.enable_residual_replay
    assert config.enable_position_calibration and config.enable_adaptive_controller
    assert (config.sketch_budget, config.replay_budget, config.energy_replay_threshold) == (32, 8, 0.88)
    assert (config.controller_gain, config.controller_group_size, config.rank) == (0.35, 2, 4)
    assert config.controller_scope == "model"
    with pytest.raises(ValueError, match="'rnak'.*did you mean rank"):
        ADMSConfig.adm_plus_plus(rnak=4)


@pytest.mark.parametrize("name,value", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_setting_value_and_limits(name, value):
    with pytest.raises(ValueError) as error:
        ADMSConfig(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert ">" in str(error.value) or "<" in str(error.value)


def test_every_number_has_a_limit_that_was_tested():
    fields = [item for item in dataclasses.fields(ADMSConfig) if "options" not in item.metadata]
    numbers = {item.name for item in fields if type(item.default) in (int, float)}
    assert numbers == {name for name, _ in OUT_OF_RANGE}


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_wrong_type_is_refused_by_setting_value_and_type(name):
    default = getattr(ADMSConfig(), name)
    wrong = {bool: [1, "yes", None], int: [1.5, "4", True, None], float: ["0.5", False, None], str: [3, None]}
    for value in wrong[type(default)]:
        with pytest.raises(TypeError) as error:
            ADMSConfig(**{name: value})
        assert f"{name}={value!r}" in str(error.value)
        assert type(default).__name__ in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_float_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="importance_ratio=.*finite"):
        ADMSConfig(importance_ratio=value)


def test_a_whole_number_is_taken_where_a_float_is_meant():
    config = ADMSConfig(importance_ratio=1)
    assert config.importance_ratio == 1.0 and isinstance(config.importance_ratio, float)


@pytest.mark.parametrize("name,allowed", UNKNOWN_WORDS.items())
def test_an_unknown_word_is_refused_with_those_allowed(name, allowed):
    with pytest.raises(ValueError) as error:
        ADMSConfig(**{name: "nonsense"})
    assert f"{name}='nonsense'" in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(
    "wrong,named",
    [
        ({"sketch_budget": 8}, ["sketch_budget=8", "enable_dual_fidelity"]),
        ({"replay_budget": 8}, ["replay_budget=8", "enable_residual_replay"]),
        (
            {"controller_energy_floor": 0.9, "controller_energy_ceiling": 0.9},
            ["controller_energy_floor=0.9", "controller_energy_ceiling=0.9"],
        ),
        ({"enable_adaptive_controller": True, "use_adaptive_budget": True}, ["use_adaptive_budget", "adaptive_controller"]),
        ({"min_importance_tokens": 20, "compressed_budget": 10}, ["min_importance_tokens=20", "compressed_budget=10"]),
    ],
)
def test_settings_that_make_no_sense_together_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError) as error:
        ADMSConfig(**wrong)
    assert all(words in str(error.value) for words in named)


def test_a_rank_above_head_dim_is_refused_once_the_model_is_known():
    model_config = make_tiny_llama().config
    ADMSConfig(rank=16).check_model(model_config)
    ADMSConfig(rank=17, compressor_type="vq").check_model(model_config)
    with pytest.raises(ValueError, match="rank=17.*head_dim=16"):
        ADMSConfig(rank=17).check_model(model_config)
    with pytest.raises(ValueError, match="rank=17.*head_dim=16"):
        ADMSKVCache(ADMSConfig(rank=17), model_config=model_config)


@st.composite
def configs(draw):
    budget = draw(st.integers(0, 300))
    dual, replay = draw(st.booleans()), draw(st.booleans())
    return ADMSConfig(
        start_size=draw(st.integers(0, 8)),
        recent_size=draw(st.integers(1, 500)),
        compressed_budget=budget,
        min_importance_tokens=draw(st.integers(0, budget)),
        compressor_type=draw(st.sampled_from(["low_rank", "vq", "attention_matching"])),
        importance_ratio=draw(st.floats(0, 1)),
        score_decay=draw(st.floats(0, 1)),
        mass_decay=draw(st.floats(0, 1)),
        importance_metric=draw(st.sampled_from(["attention", "value_norm", "key_norm", "mixed"])),
        enable_dual_fidelity=dual,
        sketch_budget=draw(st.integers(0, 50)) if dual else 0,
        enable_residual_replay=replay,
        replay_budget=draw(st.integers(0, 50)) if replay else 0,
        use_adaptive_budget=draw(st.booleans()),
        enable_dynamic_sink=draw(st.booleans()),
    )


@given(config=configs())
@settings(deadline=None, max_examples=30)
def test_a_config_survives_dict_and_json(config):
    assert ADMSConfig.from_dict(config.to_dict()) == config
    assert ADMSConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == config.to_dict()


def test_a_config_survives_a_json_file(tmp_path):
    config = ADMSConfig(rank=7, importance_ratio=0.25)
    config.to_json(tmp_path / "config.json")
    assert ADMSConfig.from_json(tmp_path / "config.json") == config
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        ADMSConfig.from_json(tmp_path / "list.json")


def test_an_unknown_setting_is_refused_with_the_closest_one():
    with pytest.raises(ValueError, match="'recent_sise'.*did you mean recent_size"):
        ADMSConfig.from_dict({"recent_sise": 3})
    with pytest.raises(ValueError, match="'xyzzy'.*the settings are start_size"):
        ADMSConfig.from_dict({"xyzzy": 3})


def test_describe_lists_every_setting_with_its_default_and_meaning():
    table = ADMSConfig.describe().splitlines()[2:]
    assert len(table) == len(NAMES)
    for row, name in zip(table, NAMES, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == f"`{name}`" and cells[1] == str(getattr(ADMSConfig(), name)) and len(cells[2]) > 10


@given(config=configs())
@settings(deadline=None, max_examples=30)
def test_expected_max_tokens_is_the_sum_of_the_tiers_and_the_interval(config):
    sinks = max(config.start_size, 327) if config.enable_dynamic_sink else config.start_size
    assert config.dynamic_start_size == sinks
    assert config.middle_allocation == config.compressed_budget + config.sketch_budget + config.replay_budget
    assert config.expected_max_tokens == sinks + config.middle_allocation + config.recent_size + 64


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"compressor_type": "vq"},
        {"compressor_type": "attention_matching"},
        {"use_adaptive_budget": True},
        {"compressed_budget": 0, "min_importance_tokens": 0},
        {"start_size": 0},
        {"enable_dynamic_sink": True, "max_seq_length": 900},
    ],
)
@pytest.mark.parametrize("dtype,batch", [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 1)])
def test_memory_bytes_is_what_a_filled_cache_takes_to_the_byte(chosen, dtype, batch):
    model = make_tiny_llama().to(dtype)
    shape = {"recent_size": 20, "compressed_budget": 16, "compression_interval": 8, "attention_window": 12}
    config = ADMSConfig(**{**shape, "rank": 8, **chosen})
    cache = enable_adms_llm(model, config)
    stream(model, token_ids(120, batch), cache, 10)
    assert cache.nbytes == config.memory_bytes(model.config, dtype, batch)
    assert cache.nbytes == config.memory_bytes(model.config, str(dtype).removeprefix("torch."), batch)


def test_memory_bytes_counts_the_sliding_layers_of_a_mixed_model():
    model = Gemma3ForCausalLM(tiny_gemma3()).eval()
    config = ADMSConfig(recent_size=20, compressed_budget=16, compression_interval=8, rank=8)
    cache = enable_adms_llm(model, config)
    stream(model, token_ids(120), cache, 10)
    assert cache.memory_report()["sliding"] > 0
    assert cache.nbytes == config.memory_bytes(model.config, torch.float32)


def tiny_gemma3() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, max_position_embeddings=512,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip


def test_memory_bytes_takes_the_models_own_dtype_where_none_is_given():
    model_config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, dtype="bfloat16")
    config = ADMSConfig()
    assert config.memory_bytes(model_config) == config.memory_bytes(model_config, torch.bfloat16)
    assert config.memory_bytes(model_config) < config.memory_bytes(model_config, torch.float32)
    with pytest.raises(ValueError, match="dtype='float33'"):
        config.memory_bytes(model_config, "float33")


@given(
    size=st.integers(20_000, 40_000_000),
    chosen=st.sampled_from(
        [
            {},
            {"recent_size": 16},
            {"compressed_budget": 24},
            {"compressor_type": "vq", "attention_window": 32},
            {"use_adaptive_budget": True},
            {"start_size": 0, "compression_interval": 4},
            {"min_importance_tokens": 9},
        ]
    ),
)
@settings(deadline=None, max_examples=40)
def test_from_memory_fits_and_one_token_more_does_not(size, chosen):
    model_config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, dtype="float32",
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    try:
        config = ADMSConfig.from_memory(model_config, size, **chosen)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        assert least > size
        assert (
            ADMSConfig.from_memory(model_config, least, **chosen).memory_bytes(model_config, moved=True, compacting=True)
            <= least
        )
        return
    assert config.memory_bytes(model_config, moved=True, compacting=True) <= size
    assert all(getattr(config, name) == value for name, value in chosen.items())
    for name in ("recent_size", "compressed_budget"):
        if name not in chosen:
            larger = dataclasses.replace(config, **{name: getattr(config, name) + 1})
            # Half a token of each half may be left over, a whole token of both never.
            if "recent_size" in chosen or "compressed_budget" in chosen:
                assert larger.memory_bytes(model_config, moved=True, compacting=True) > size
    if not {"recent_size", "compressed_budget"} & set(chosen):
        least = config.compressed_budget == chosen.get("min_importance_tokens")
        assert least or abs(config.recent_size - config.compressed_budget) <= 1
        both = dataclasses.replace(
            config, recent_size=config.recent_size + 1, compressed_budget=config.compressed_budget + 1
        )
        assert both.memory_bytes(model_config, moved=True, compacting=True) > size


def test_from_memory_says_how_much_is_needed_at_least():
    model_config = make_tiny_llama().config
    with pytest.raises(ValueError, match=r"bytes=10 .*at least \d+"):
        ADMSConfig.from_memory(model_config, 10)
    for wrong in (0, -1, 1.5, True, "1GB"):
        with pytest.raises(ValueError, match="bytes="):
            ADMSConfig.from_memory(model_config, wrong)


@pytest.mark.parametrize("name,value", [("recent_size", "3"), ("compressed_budget", None), ("min_importance_tokens", 1.5)])
def test_from_memory_refuses_a_wrong_setting_by_name(name, value):
    with pytest.raises(TypeError, match=f"{name}={value!r}"):
        ADMSConfig.from_memory(make_tiny_llama().config, 10**7, **{name: value})
    with pytest.raises(ValueError, match="'recent_sise'"):
        ADMSConfig.from_memory(make_tiny_llama().config, 10**7, recent_sise=3)


def test_from_memory_gives_a_cache_that_really_takes_no_more():
    model = make_tiny_llama()
    config = ADMSConfig.from_memory(model.config, 200_000, compacting=False, rank=8)
    cache = enable_adms_llm(model, config)
    stream(model, token_ids(3 * config.expected_max_tokens), cache, 32)
    assert cache.nbytes == config.memory_bytes(model.config)
    assert 190_000 < cache.nbytes <= 200_000


def test_from_memory_with_everything_fixed_only_checks():
    model_config = make_tiny_llama().config
    config = ADMSConfig.from_memory(model_config, 10**7, recent_size=30, compressed_budget=10)
    assert (config.recent_size, config.compressed_budget) == (30, 10)
    with pytest.raises(ValueError, match="too little"):
        ADMSConfig.from_memory(model_config, 10**4, recent_size=300, compressed_budget=100)


@pytest.mark.parametrize(
    "switch,budget,tokens", [("enable_dual_fidelity", "sketch_budget", 32), ("enable_residual_replay", "replay_budget", 16)]
)
def test_a_module_switched_on_without_a_budget_has_its_own_and_a_budget_given_stays(switch, budget, tokens):
    before = NAMES.index(switch)
    defaults = [getattr(ADMSConfig(), name) for name in NAMES[:before]]
    for config in (
        ADMSConfig(**{switch: True}),
        ADMSConfig(*defaults, True),
        ADMSConfig.from_dict({switch: True}),
        ADMSConfig.from_json(json.dumps({switch: True})),
        enable_adms_llm(make_tiny_llama(), **{switch: True}).config,
        ADMSConfig.from_memory(make_tiny_llama().config, 10**7, **{switch: True}),
        ADMSConfig.adm_plus_plus(),
    ):
        assert getattr(config, budget) == tokens
        assert ADMSConfig.from_dict(config.to_dict()) == ADMSConfig.from_json(config.to_json()) == config
    assert getattr(ADMSConfig(**{switch: False}), budget) == getattr(ADMSConfig(), budget) == 0
    assert getattr(ADMSConfig.adm_plus_plus(**{switch: False}), budget) == 0
    for own in (0, 5):
        config = ADMSConfig(**{switch: True, budget: own})
        assert getattr(config, budget) == getattr(dataclasses.replace(config, rank=3), budget) == own
        assert ADMSConfig.from_json(config.to_json()) == config


def test_a_module_switched_on_with_a_budget_of_0_is_told_when_enabled(caplog):
    enable_adms_llm(make_tiny_llama(), enable_dual_fidelity=True)
    assert not caplog.records
    enable_adms_llm(make_tiny_llama(), dataclasses.replace(ADMSConfig(), enable_dual_fidelity=True))
    assert [record.getMessage() for record in caplog.records] == [
        "enable_dual_fidelity=True does nothing with sketch_budget=0"
    ]


@pytest.mark.parametrize("make", [ADMSConfig, ADMSConfig.adm_plus_plus])
@pytest.mark.parametrize(
    "wrong,near", [("recent_sise", "recent_size"), ("rnak", "rank"), ("enable_adm_plus_plus", "ADMSConfig.adm_plus_plus")]
)
def test_the_constructors_refuse_a_misspelt_setting_with_the_closest_one(make, wrong, near):
    with pytest.raises(ValueError, match=rf"unknown setting '{wrong}' \(did you mean {near}") as error:
        make(**{wrong: True})
    assert "the settings are start_size, recent_size" in str(error.value)


def test_each_misspelt_setting_has_its_own_hint():
    with pytest.raises(ValueError, match=r"'rnak', 'xyzzy', 'sede' \(did you mean rank, seed\?\)"):
        ADMSConfig(rnak=3, xyzzy=1, sede=2)


def test_a_config_shows_its_settings_where_an_editor_asks_for_them():
    import inspect

    assert tuple(inspect.signature(ADMSConfig).parameters) == NAMES


@pytest.mark.parametrize(
    "wrong,way", [({"rank": 4}, "from_dict"), ("run.json", "from_json"), (256, "not int"), (ADMSConfig, "not type")]
)
@pytest.mark.parametrize("take", [lambda wrong: ADMSKVCache(wrong), lambda wrong: enable_adms_llm(make_tiny_llama(), wrong)])
def test_a_config_of_another_type_is_refused_with_the_way_to_make_one(take, wrong, way):
    with pytest.raises(TypeError, match="config=.* must be an ADMSConfig, not ") as error:
        take(wrong)
    assert way in str(error.value)


def test_settings_that_are_no_dict_are_refused():
    with pytest.raises(TypeError, match="settings=3 must be a dict of settings by name, not int"):
        ADMSConfig.from_dict(3)


def test_numbers_of_numpy_are_taken_as_the_plain_ones_they_are():
    given = {
        "rank": np.int64(4),
        "importance_ratio": np.float32(0.25),
        "protect_exact": np.bool_(True),
        "attention_blend": np.int8(1),
    }
    config = ADMSConfig(**given)
    assert config == ADMSConfig(rank=4, importance_ratio=0.25, protect_exact=True, attention_blend=1)
    assert ADMSConfig.from_json(config.to_json()) == config
    for wrong in ({"rank": np.float64(4)}, {"rank": np.bool_(True)}, {"rank": torch.tensor(4)}):
        with pytest.raises(TypeError, match="rank=.* must be of type int"):
            ADMSConfig(**wrong)


SHAPES = [
    {}, {"use_adaptive_budget": True}, {"enable_adaptive_controller": True},
    {"enable_adaptive_controller": True, "controller_scope": "model"}, {"enable_dynamic_sink": True},
]  # fmt: skip


@given(limit=st.integers(40, 400), recent=st.integers(1, 500), budget=st.integers(0, 300), shape=st.sampled_from(SHAPES))
@settings(deadline=None, max_examples=60)
def test_what_can_never_fit_is_refused_by_name_with_the_most_that_does(limit, recent, budget, shape):
    config = ADMSConfig(recent_size=recent, compressed_budget=budget, min_importance_tokens=0, max_seq_length=900, **shape)
    if config.most_slots <= limit:
        assert config.fit_positions(limit) is config
        return
    with pytest.raises(ValueError) as error:
        config.fit_positions(limit)
    name, larger = ("recent_size", recent) if recent >= budget else ("compressed_budget", budget)
    said = str(error.value)
    assert said.startswith(f"{name}={larger} does not fit") and f"for {limit} positions" in said
    if "smaller budgets" in said:
        assert dataclasses.replace(config, **{name: 1 if name == "recent_size" else 0}).most_slots > limit
        return
    most = int(said.split(f"{name}=")[2].split()[0])
    assert dataclasses.replace(config, **{name: most}).fit_positions(limit)
    assert dataclasses.replace(config, **{name: most + 1}).most_slots > limit


@given(size=st.integers(40_000, 10_000_000), trained=st.integers(100, 2000), shape=st.sampled_from(SHAPES[:-1]))
@settings(deadline=None, max_examples=30)
def test_from_memory_stays_inside_the_trained_length(size, trained, shape):
    model_config = make_tiny_llama().config
    model_config.max_position_embeddings = 1 << 30
    free = ADMSConfig.from_memory(model_config, size, compression_interval=8, **shape)
    model_config.max_position_embeddings = trained
    config = ADMSConfig.from_memory(model_config, size, compression_interval=8, **shape)
    assert config.fit_positions(trained) is config
    if free.most_slots <= trained:
        assert config == free
    else:
        assert config.most_slots > trained - 8
    with pytest.raises(ValueError, match=f"recent_size={trained} does not fit.*for {trained} positions"):
        ADMSConfig.from_memory(model_config, 10**9, recent_size=trained)


def test_what_sizes_are_asked_of_is_refused_by_name_where_it_is_of_another_type():
    model, config = make_tiny_llama(), ADMSConfig(rank=8)
    for ask in (config.memory_bytes, lambda model, **given: ADMSConfig.from_memory(model, 10**7, **given)):
        with pytest.raises(TypeError, match="model_config is a LlamaForCausalLM and must be .*model.config"):
            ask(model)
        with pytest.raises(TypeError, match="dtype=16 must be a torch dtype or its name, not int"):
            ask(model.config, dtype=16)
        for wrong in (0, -1, 1.5, True, "2", None):
            with pytest.raises(ValueError, match="batch_size=.* must be a positive whole number of rows"):
                ask(model.config, batch_size=wrong)
    assert config.memory_bytes(model.config, batch_size=np.int64(2)) == 2 * config.memory_bytes(model.config)
    assert ADMSConfig.from_memory(model.config, np.int64(10**7)) == ADMSConfig.from_memory(model.config, 10**7)


def test_a_message_about_a_wrong_config_stays_short_whatever_it_was():
    for wrong in (make_tiny_llama(), {name: "x" * 100 for name in NAMES}):
        with pytest.raises(TypeError, match="must be an ADMSConfig, not") as error:
            ADMSKVCache(wrong)
        assert len(str(error.value)) < 400


def test_a_setting_is_never_changed_in_place():
    config = ADMSConfig(compressed_budget=32)
    cache = ADMSKVCache(config)
    for name in ("compressed_budget", "enable_dual_fidelity"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=rf"{name}=64 .*dataclasses.replace\(config, {name}=64\)"):
            setattr(cache.config, name, 64)
    with pytest.raises(ValueError, match="did you mean compressed_budget"):
        cache.config.compresed_budget = 64
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"compressed_budget can't be deleted"):
        del config.compressed_budget
    with pytest.raises(AttributeError, match=r"cache.config can't be replaced.* enable_adms_llm\(model, config\)"):
        cache.config = ADMSConfig()
    assert cache.config is config and config == ADMSConfig(compressed_budget=32)
    assert hash(config) == hash(dataclasses.replace(config)) and dataclasses.replace(config, rank=8).rank == 8


def test_a_frozen_config_is_copied_and_pickled_and_takes_what_is_converted():
    config = ADMSConfig(importance_ratio=1, compressor_type="vq")
    assert type(config.importance_ratio) is float
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and type(twin) is ADMSConfig
