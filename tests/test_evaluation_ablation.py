"""The ablation of the four ADM++ modules: equal tokens for every variant, and the command end to end on a tiny model."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from conftest import make_tiny_llama
from test_families import make as make_family

from streaming_llm import ADMSConfig
from streaming_llm.evaluation import ablation, cache_factory, models, streaming
from streaming_llm.evaluation.methods import FEATURES
from streaming_llm.evaluation.streaming import Curve, MethodResult, Timing

BUDGETS = (36, 52)


@pytest.fixture
def without_rope():
    """A tiny GPT-2."""
    return make_family("gpt2", vocab_size=256, n_embd=64)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(" ".join(f"Sentence {number} says {number * number}." for number in range(60)))
    return path


@pytest.fixture
def run(tiny_model_folder, text_file, tmp_path):
    """Run the command on the tiny model and the short text; gives its exit code and its output directory."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")

    def start(*argv):
        base = ["--model_name_or_path", str(tiny_model_folder), "--device", "cpu", "--num_eval_tokens", "300"]
        base += ["--texts", str(text_file), "--budgets", *map(str, BUDGETS), "--output_dir", str(tmp_path / "out")]
        base += ["--log_every", "0", "--set", "rank=4", "compression_interval=16", "min_importance_tokens=1"]
        return ablation.Ablation.main([*base, *argv]), tmp_path / "out"

    return start


def held(settings) -> int:
    config = ADMSConfig(**{"compressed_budget": 0} | settings)  # StreamingLLM's have none
    return config.expected_max_tokens - config.compression_interval


def plans(names=ablation.VARIANTS, budget=516, **settings):
    return {plan.method.name: plan for plan in ablation.plan_variants(list(names), budget, settings)}


def on(settings) -> list[str]:
    return [name for name, feature in ablation.MODULES.items() if settings[feature]]


def test_the_variants_are_base_each_module_alone_and_the_levels_up_to_adm_plus_plus():
    names = ["dual_fidelity", "replay", "calibration", "controller"]
    found = {name: on(plan.settings) for name, plan in plans().items() if name not in ablation.REFERENCES}
    assert found == {
        "base": [],
        **{name: [name] for name in names},
        "+replay": names[:2],
        "+calibration": names[:3],
        "+controller": names,
    }
    levels = [found[name] for name in ablation.LEVELS]
    assert levels == [names[:count] for count in range(5)]
    last = ADMSConfig(**plans()["+controller"].settings)
    assert last == ADMSConfig.adm_plus_plus(recent_size=256, compressed_budget=256 - 32 - 16)


@pytest.mark.parametrize("budget", [72, 260, 261, 516, 1028])
@pytest.mark.parametrize("settings", [{}, {"start_size": 0}, {"sketch_budget": 5, "replay_budget": 7}])
def test_every_variant_promises_the_same_tokens_a_head(budget, settings):
    for name, plan in plans(budget=budget, **settings).items():
        if name == "full":
            assert plan.total_tokens is None
        else:
            assert (name, held(plan.settings), plan.total_tokens) == (name, budget, budget)


def test_half_of_what_the_sinks_leave_is_recent_and_the_sketches_scale_with_the_middle():
    for budget, recent, sketches, replay in ((516, 256, 32, 16), (260, 128, 16, 8), (1028, 512, 64, 32), (24, 10, 1, 1)):
        settings = plans(budget=budget)["+replay"].settings
        assert settings["recent_size"] == recent
        assert (settings["sketch_budget"], settings["replay_budget"]) == (sketches, replay)
    given = plans(budget=260, sketch_budget=20, energy_replay_threshold=0.5)["+replay"].settings
    assert (given["sketch_budget"], given["replay_budget"], given["energy_replay_threshold"]) == (20, 8, 0.5)


def test_a_module_s_settings_reach_only_the_variants_that_have_it_on():
    found = plans(controller_gain=0.1, sketch_budget=8, rank=8)
    assert found["base"].settings["sketch_budget"] == 0
    assert "controller_gain" not in found["replay"].settings
    assert found["controller"].settings["controller_gain"] == 0.1
    assert {plan.settings["rank"] for plan in found.values() if plan.method.kind == "adms"} == {8}


def test_the_caches_take_the_plans():
    model = make_tiny_llama()
    for plan in ablation.plan_variants(list(ablation.VARIANTS), 72, {"rank": 4}):
        cache = cache_factory(model, plan)()
        if plan.method.name != "full":
            assert cache.config.expected_max_tokens - cache.config.compression_interval == 72


def test_without_rope_calibration_is_left_out_by_default_and_refused_where_it_was_named(without_rope, caplog):
    everything = next(plan for plan in ablation.plan_variants(ablation.VARIANTS, 72) if plan.method.name == "+controller")
    full = cache_factory(without_rope, everything)().config
    assert full.enable_adaptive_controller and not full.enable_position_calibration
    assert [record.getMessage() for record in caplog.records] == [
        "position calibration is off: model type 'gpt2' has no RoPE"
    ]
    named = next(plan for plan in ablation.plan_variants(["calibration"], 72) if plan.method.name == "calibration")
    with pytest.raises(ValueError, match="enable_position_calibration=True can't be"):
        cache_factory(without_rope, named)()


def result(name, kl, seconds, memory, stats=None):
    return MethodResult(
        method=name,
        scored_tokens=10,
        nll=1.0,
        perplexity=2.0,
        kl=kl,
        gap_recovered=None,
        held_tokens=5,
        cache_bytes=1000,
        memory=memory,
        stats=stats or {},
        curve=Curve(),
        timing=Timing(forward_seconds=seconds),
    )


def test_rows_are_relative_to_base_and_name_the_originals_apart():
    stats = {stat: number for number, stat in enumerate(ablation.COUNTERS.values(), start=1)}
    results = {
        "full": result("full", 0.0, 1.0, {}),
        "base": result("base", 0.2, 4.0, {"attended": 400, "sliding": 100}),
        "replay": result("replay", 0.15, 5.0, {"attended": 600, "originals": 300, "sliding": 0}, stats),
    }
    full, base, replay = ablation.summarize(results)
    assert (base.kl_change, base.time_ratio, base.bytes_ratio, base.originals_bytes, base.level) == (0, 1, 1, 0, 0)
    assert replay.kl_change == pytest.approx(-0.25)
    assert (replay.time_ratio, replay.cache_bytes, replay.bytes_ratio) == (1.25, 600, 1.2)
    assert (replay.originals_bytes, replay.level) == (300, None)
    assert list(replay.counters.values()) == [1, 2, 3, 4, 5]
    assert (full.cache_bytes, full.kl_change, full.counters, full.time_ratio) == (1000, None, None, 0.25)


def test_a_run_writes_both_files_and_repeats_to_the_digit_apart_from_timing(run, capsys):
    code, out = run("--markdown")
    printed = capsys.readouterr().out
    assert code == 0
    assert sorted(os.listdir(out)) == ["ablation.json", "ablation.png"]
    first = json.loads((out / "ablation.json").read_text())
    assert [(section["text"], section["budget"]) for section in first["results"]] == [("short.txt", 36), ("short.txt", 52)]
    for section in first["results"]:
        rows = section["rows"]
        assert list(rows) == ["full", "streaming", *ablation.VARIANTS]
        assert rows["full"]["kl"] == 0 == rows["base"]["kl_change"]
        assert rows["streaming"]["kl"] > 0 < rows["base"]["kl"]
        # The controller moves tokens between layers, where the most that any one holds says nothing of the total.
        counts = {name: row["held_tokens"] for name, row in rows.items() if name != "full" and "controller" not in name}
        assert counts["base"] == counts["streaming"] == max(counts.values()) <= section["budget"] + 16
        assert section["score_from"] == 100
    table = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert table == ["variant", "---", "full", "streaming", *ablation.VARIANTS] * 2

    code, out = run("--markdown")
    second = json.loads((out / "ablation.json").read_text())
    assert code == 0
    timing = first.pop("timing")
    assert [list(section["rows"]) for section in timing] == [list(section["rows"]) for section in first["results"]]
    assert timing[0]["rows"]["base"]["forward_seconds"] > 0
    second.pop("timing")
    assert first == second


def test_chosen_variants_are_run_beside_base_on_each_text_and_files_of_one_name_are_told_apart(run, text_file, tmp_path):
    other = tmp_path / "other" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text()[::-1])
    code, out = run("--variants", "+replay,controller", "--budgets", "36", "--texts", str(text_file), str(other))
    assert code == 0
    found = json.loads((out / "ablation.json").read_text())["results"]
    assert [section["text"] for section in found] == ["short.txt", str(other)]
    assert [list(section["rows"]) for section in found] == [["full", "streaming", "base", "controller", "+replay"]] * 2
    assert found[0]["rows"]["base"]["kl"] != found[1]["rows"]["base"]["kl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--variants", "base", "sketches"], "variant 'sketches' is not known; choose from base, dual_fidelity"),
        (["--budgets", "9"], "budget=9 is too small for variant '+replay': 4 sinks, 3 recent, 1 sketch"),
        (["--budgets", "2"], "budget=2 is too small for variant 'base'"),
        (["--budgets", "-5"], "budget=-5 is too small"),
        (["--budgets", "290"], "too few for budget=290; nothing is compacted before token 307"),
        (["--set", "min_importance_tokens=40"], "must be at least 40"),
        (["--set", "rnak=8"], "unknown setting 'rnak' (did you mean rank?)"),
        (["--set", "rank"], "--set 'rank' must have the form name=value"),
        (["--set", "rank=many"], "--set rank='many' must be of type int"),
        (["--set", "rank=0"], "rank=0"),
        (["--set", "protect_exact=1"], "protect_exact='1' must be true or false"),
        (["--set", "controller_scope=head", "--variants", "base"], "controller_scope='head' must be one of"),
        (["--set", "recent_size=5"], "recent_size can't be given as a setting: --budgets sets it"),
        (["--set", "enable_residual_replay=true"], "enable_residual_replay can't be given as a setting: --variants"),
        (["--set", "seed=5"], "--seed sets it"),
        (["--set", "use_adaptive_budget=true"], "use_adaptive_budget=True and enable_adaptive_controller=True"),
        (["--chunk_size", "0"], "chunk_size=0"),
        (["--score_from", "300"], "score_from=300 leaves nothing to score"),
        (["--seed", "-1"], "seed=-1"),
        (["--device", "nonsense"], "device='nonsense'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2_before_anything_is_loaded(run, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(models, "_load_folder", lambda *_: pytest.fail("the model was loaded"))
    code, _ = run(*argv)
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert message in error


def test_a_text_that_is_missing_or_too_short_is_one_line_and_code_1(run, capsys, tmp_path):
    code, _ = run("--texts", "missing.txt")
    assert code == 1
    assert "there is no text file missing.txt" in capsys.readouterr().err
    short = tmp_path / "tiny.txt"
    short.write_text("Fifty letters are fewer than any budget needs.")
    code, _ = run("--texts", str(short))
    assert code == 1
    assert "46 tokens are too few for budget=36" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing_and_says_so_in_one_line(run, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "evaluate_streams", interrupt)
    code, out = run()
    assert code == 130
    assert os.listdir(out) == []
    assert capsys.readouterr().err.strip() == "ablation.py: interrupted"


def test_what_a_finished_budget_found_is_there_when_the_next_one_fails(run, monkeypatch):
    whole = streaming.evaluate_streams
    calls = []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(streaming, "evaluate_streams", fail)
    code, out = run("--variants", "base")
    assert code == 130
    [only] = json.loads((out / "ablation.json").read_text())["results"]
    assert only["budget"] == BUDGETS[0]


def section(base_kl, streaming_kl):
    results = {name: result(name, base_kl, 1.0, {"attended": 1}) for name in ablation.VARIANTS}
    references = {"full": result("full", 0.0, 1.0, {}), "streaming": result("streaming", streaming_kl, 1.0, {})}
    return ablation.Section("text", 300, 36, 100, {}, ablation.summarize(references | results))


@pytest.mark.parametrize(("streaming_kl", "inside"), [(0.3, True), (2.0, False)])
def test_bars_start_at_zero_and_a_far_off_streaming_line_is_named_not_drawn(streaming_kl, inside):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    ablation._panel(axes, section(0.2, streaming_kl), named=True)
    low, high = axes.get_xlim()
    assert low == 0
    assert {bar.get_x() for bar in axes.patches} == {0}
    assert (high > streaming_kl) == inside
    assert ("StreamingLLM: 2.0000, beyond the scale" in axes.get_title(loc="left")) != inside
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *list(ablation.VARIANTS)[:-1],
        "+controller = ADM++",
    ]


def test_a_picture_can_be_drawn_where_nothing_diverges(tmp_path):
    pytest.importorskip("matplotlib")
    ablation.plot(tmp_path / "plot.png", [section(0.0, 0.0)], "title")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_example_script_starts(monkeypatch, capsys):
    script = Path(__file__).parent.parent / "examples" / "ablation.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 0
    assert "--budgets" in capsys.readouterr().out


def test_what_variants_recall_comes_out_of_their_tokens():
    plans = ablation.plan_variants(list(ablation.VARIANTS), 260, {"enable_recall": True, "recall_budget": 30})
    for plan in plans:
        if plan.method.name in ablation.VARIANTS:
            config = ADMSConfig(**plan.settings)
            assert config.expected_max_tokens - config.compression_interval + 30 == plan.total_tokens == 260
    streaming = next(plan for plan in plans if plan.method.name == "streaming")
    assert streaming.settings["start_size"] + streaming.settings["recent_size"] == streaming.total_tokens == 260
    with pytest.raises(ValueError, match="30 recalled leave 0 for compressed_budget"):
        ablation.plan_variants(["base"], 64, {"enable_recall": True, "recall_budget": 30})


def test_every_feature_of_the_config_is_a_module():
    assert tuple(ablation.MODULES.values()) == FEATURES
    assert {name for name in ADMSConfig.setting_names() if name.startswith("enable_")} - set(FEATURES) == {
        "enable_pos_shift",
        "enable_dynamic_sink",
        "enable_recall",
    }
