"""The command line of the evaluation scripts, end to end on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from test_families import make as make_family

import streaming_llm
from streaming_llm import ADMSConfig
from streaming_llm.evaluation import METHODS, resolve_settings, streaming
from streaming_llm.evaluation.comparison import Comparison, EveryMethod
from streaming_llm.evaluation.methods import FEATURES

EXAMPLES = Path(__file__).parent.parent / "examples"
DOCUMENTED = """model_name_or_path dataset_name task split text_field num_samples num_eval_tokens concat_stream
    concat_limit min_seq_len sep output_dir log_every disable_dual_fidelity disable_residual_replay
    disable_position_calibration disable_adaptive_controller methods chunk_size score_from dtype device seed
    config""".split()


@pytest.fixture
def without_rope():
    """A tiny GPT-2."""
    return make_family("gpt2", vocab_size=256, n_embd=64)


@pytest.fixture
def parser():
    return Comparison.parser()


def settings(parser, *argv):
    return parser.parse(argv)[1]


@pytest.fixture
def run(tiny_model_folder, tmp_path):
    """Run a script on the tiny model; gives its exit code and its output directory."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")

    def start(*argv, command=Comparison):
        base = ["--model_name_or_path", str(tiny_model_folder), "--device", "cpu", "--num_eval_tokens", "300"]
        base += ["--recent_size", "24", "--compressed_budget", "12", "--sketch_budget", "8", "--replay_budget", "4"]
        base += ["--rank", "4", "--compression_interval", "16"]
        base += ["--decode_tokens", "0", "--output_dir", str(tmp_path / "out")]
        return command.main([*base, *argv]), tmp_path / "out"

    return start


def test_every_setting_and_every_documented_flag_is_there(parser):
    flags = parser.flags()
    assert [field.name for field in dataclasses.fields(ADMSConfig) if field.name not in flags] == []
    assert [name for name in DOCUMENTED if name not in flags] == []
    assert [name for name, action in flags.items() if not action.help] == []
    assert "compressed_budget" in parser.format_help()


def test_help_names_each_flag_as_it_is_documented(parser):
    named = [option for action in parser.flags().values() for option in action.option_strings]
    assert [option for option in named if "-" in option.removeprefix("--no-").removeprefix("--")] == []
    switches = [field.name for field in dataclasses.fields(ADMSConfig) if isinstance(field.default, bool)]
    assert switches and {f"--no-{name}" for name in [*switches, "concat_stream"]} <= set(named)


def test_hyphens_do_for_underscores(parser):
    assert settings(parser, "--no-enable-pos-shift", "--attention-blend=0.5", "--enable-dynamic-sink") == {
        "enable_pos_shift": False,
        "attention_blend": 0.5,
        "enable_dynamic_sink": True,
    }
    assert not parser.parse(["--no-concat-stream"])[0].concat_stream


def test_settings_not_given_are_left_to_the_library(parser):
    assert settings(parser) == {}
    assert settings(parser, "--rank", "8", "--importance_ratio", "0.25") == {"rank": 8, "importance_ratio": 0.25}
    assert settings(parser, "--no-enable_pos_shift") == {"enable_pos_shift": False}


def test_the_help_tells_the_defaults_that_are_in_force(parser):
    resolved = resolve_settings({})
    helps = {name: action.help for name, action in parser.flags().items()}
    assert "(208: 256 less sketch_budget and replay_budget)" in helps["compressed_budget"]
    assert resolved["compressed_budget"] == 208
    for name in ADMSConfig.setting_names():
        default = resolved.get(name, getattr(ADMSConfig(), name))
        assert re.search(rf"\({re.escape(str(default))}\b", helps[name]), name


def test_every_setting_is_parsed_to_the_type_of_its_default(parser):
    for field in dataclasses.fields(ADMSConfig):
        if isinstance(field.default, bool):
            argv = [f"--{field.name}"]
        elif field.default is None:
            continue
        else:
            argv = [f"--{field.name}={field.default}"]
        value = settings(parser, *argv)[field.name]
        assert type(value) is type(field.default), field.name
        if not isinstance(field.default, bool):
            assert value == field.default


def test_features_are_turned_off_by_their_disable_flags(parser):
    for name in ("dual_fidelity", "residual_replay", "position_calibration", "adaptive_controller"):
        assert settings(parser, f"--disable_{name}") == {f"enable_{name}": False}
        assert settings(parser, f"--disable_{name}", f"--enable_{name}") == {f"enable_{name}": True}


def test_a_file_gives_flags_and_settings_and_the_command_line_wins(parser, tmp_path):
    path = tmp_path / "run.json"
    content = {"rank": 8, "seed": 3, "methods": ["adms", "tova"], "enable_pos_shift": False, "task": None}
    content |= {"disable_dual_fidelity": True, "concat_stream": False, "attention_blend": 0.5}
    path.write_text(json.dumps(content))
    arguments, given = parser.parse(["--config", str(path), "--rank", "4", "--dtype", "bfloat16"])
    expected = {"rank": 4, "seed": 3, "enable_pos_shift": False, "enable_dual_fidelity": False, "attention_blend": 0.5}
    assert given == expected
    assert (arguments.methods, arguments.concat_stream) == (["adms", "tova"], False)
    assert (arguments.dtype, arguments.task) == ("bfloat16", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rnak": 8, "seed": 1}, "unknown names: rnak"),
        ({"config": "other.json"}, "unknown names: config"),
        ([1], "must hold one JSON object"),
        ("{", "no valid JSON"),
        ({"rank": True}, "rank can't be true"),
        ({"rank": 8.5}, "--rank: invalid int value: '8.5'"),
        ({"enable_pos_shift": "yes"}, "enable_pos_shift must be true or false"),
        ({"seed": [1]}, r"seed can't be \[1\]"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(parser, tmp_path, capsys, content, message):
    path = tmp_path / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit) as caught:
        parser.parse([f"--config={path}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "full", "lru"], "method 'lru' is not known"),
        (["--recent_size", "0"], "recent_size"),
        (["--chunk_size", "0"], "chunk_size=0"),
        (["--score_from", "300"], "score_from=300"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "nonsense"], "device='nonsense'"),
        (["--concat_limit", "9", "--no-concat_stream"], "concat_limit"),
        (["--skip_tokens", "9", "--no-concat_stream"], "skip_tokens"),
        (["--skip_tokens", "-1"], "skip_tokens=-1"),
        (["--log_every", "-1"], "log_every=-1"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2_before_anything_is_loaded(run, capsys, monkeypatch, argv, message):
    from streaming_llm.evaluation import models

    monkeypatch.setattr(models, "_load_folder", lambda *_: pytest.fail("the model was loaded"))
    code, out = run(*argv)
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert message in error


def test_each_module_can_be_disabled_and_the_variance_based_budget_stands_alone(run):
    replay_off = ("--disable_residual_replay", "--replay_budget", "0")
    code, out = run("--methods", "full", "adms", "--use_adaptive_budget", *replay_off)
    assert code == 0
    used = json.loads((out / "results.json").read_text())["settings"]["methods"]["adms"]
    assert [used[name] for name in FEATURES] == [True, False, True, False]


@pytest.fixture
def gpt2_run(without_rope, tiny_model_folder, tmp_path, run):
    """`run` on a tiny GPT-2, a model without RoPE."""
    from transformers import AutoTokenizer

    folder = tmp_path / "gpt2"
    without_rope.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return lambda *argv: run("--model_name_or_path", str(folder), "--methods", "full", "adms", *argv)


def test_a_model_without_rope_runs_with_one_line_about_the_calibration(gpt2_run, caplog):
    code, _ = gpt2_run("--concat_limit", "150")  # two streams, a cache each
    assert code == 0
    told = [record.getMessage() for record in caplog.records if "calibration" in record.getMessage()]
    assert told == ["position calibration is off: model type 'gpt2' has no RoPE"]


def test_calibration_asked_for_on_a_model_without_rope_is_one_line_and_code_2(gpt2_run, capsys):
    code, _ = gpt2_run("--enable_position_calibration")
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "enable_position_calibration=True can't be: model type 'gpt2' has no RoPE" in error


def test_an_unknown_flag_is_one_line_and_code_2(run, capsys):
    with pytest.raises(SystemExit) as caught:
        run("--rnak", "8")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--rnak" in error


def test_a_run_prints_the_table_and_writes_both_files_and_repeats_to_the_digit(run, capsys):
    code, out = run("--log_every", "128", "--seed", "5")
    printed = capsys.readouterr().out
    assert code == 0
    assert sorted(os.listdir(out)) == ["perplexity.png", "results.json"]
    assert "every method but full keeps 52 tokens a head" in " ".join(printed.split())
    assert "128 tokens: perplexity" in printed
    first = json.loads((out / "results.json").read_text())
    found = first["results"]
    assert list(found) == ["full", "streaming", "adms", "adms_recall"]
    assert found["full"]["kl"] == 0
    assert found["adms"]["kl"] > 0
    assert found["adms"]["held_tokens"] <= 52 + 16 < found["full"]["held_tokens"] == 300
    assert first["settings"]["score_from"] == 100
    assert first["settings"]["methods"]["adms"]["rank"] == 4

    code, out = run("--log_every", "128", "--seed", "5")
    second = json.loads((out / "results.json").read_text())
    assert code == 0
    assert first.pop("timing").keys() == second.pop("timing").keys()
    assert first == second


def test_every_method_runs_and_is_printed_in_markdown(run, capsys):
    code, out = run("--decode_tokens", "16", command=EveryMethod)
    assert code == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(METHODS)
    timing = json.loads((out / "results.json").read_text())["timing"]
    assert timing["adms"]["decode_compaction_share"] > 0
    assert timing["adms"]["compaction_share"] > 0


def test_equal_bytes_give_the_others_as_many_as_recall_with_its_archive_has(run, capsys):
    code, out = run("--equal_bytes", "--methods", "streaming", "adms_recall", "--decode_tokens", "0", command=EveryMethod)
    assert code == 0
    printed = " ".join(capsys.readouterr().out.split())
    document = json.loads((out / "results.json").read_text())
    settings = document["settings"]["methods"]
    assert settings["adms_recall"]["recall_bits"] == 4
    sinks_and_recent = 4 + settings["streaming"]["recent_size"]
    assert sinks_and_recent > 52
    assert f"streaming {sinks_and_recent}, adms_recall 52" in printed and "Equal bytes" in printed
    found = document["results"]
    assert found["adms_recall"]["archive_bytes"] > found["streaming"]["archive_bytes"] == 0
    assert found["streaming"]["cache_bytes"] == pytest.approx(found["adms_recall"]["cache_bytes"], rel=0.15)


def test_the_note_tells_what_the_queries_of_a_chunk_share(run, capsys):
    def printed(*argv):
        assert run("--methods", "adms_recall", "--recall_budget", "5", "--decode_tokens", "0", *argv)[0] == 0
        return " ".join(capsys.readouterr().out.split())

    assert (
        "5 of its tokens are recalled ones, where tokens come one by one; the queries of a chunk of 4 share 20"
        in printed("--chunk_size", "4")
    )
    assert "the queries of a chunk of 4 share 9" in printed("--chunk_size", "4", "--recall_chunk_budget", "9")
    assert "share" not in printed("--chunk_size", "1")


def test_samples_can_be_streams_of_their_own(run, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A short text of its own. " * 20)
    code, out = run("--dataset_name", str(path), "--concat_limit", "100", "--chunk_size", "32", "--methods", "full")
    assert code == 0
    document = json.loads((out / "results.json").read_text())
    assert document["settings"]["text"] == {"name": "text.txt", "tokens": 300, "streams": 3}
    assert document["results"]["full"]["held_tokens"] == 100


def test_an_interrupted_run_leaves_nothing_and_says_so_in_one_line(run, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "evaluate_streams", interrupt)
    code, out = run()
    assert code == 130
    assert os.listdir(out) == []
    assert capsys.readouterr().err.strip() == "eval_adms_vs_streaming.py: interrupted"


def test_an_interrupt_while_the_picture_is_drawn_leaves_nothing(run, monkeypatch):
    import matplotlib.figure

    def half(self, path, **_):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", half)
    code, out = run()
    assert code == 130
    assert os.listdir(out) == []


def test_what_is_missing_is_one_line_and_code_1(run, capsys):
    code, _ = run("--dataset_name", "missing.txt")
    assert code == 1
    assert "there is no text file missing.txt" in capsys.readouterr().err


def test_nothing_of_the_library_imports_the_evaluation():
    package = Path(streaming_llm.__file__).parent
    library = [path for path in package.rglob("*.py") if "evaluation" not in path.relative_to(package).parts]
    assert len(library) > 30
    assert [
        path for path in library if re.search(r"^\s*(from|import) .*\bevaluation\b", path.read_text(), re.MULTILINE)
    ] == []


@pytest.mark.parametrize("name", ["eval_adms_vs_streaming.py", "compare_methods.py"])
def test_the_example_scripts_start(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert caught.value.code == 0
    assert "--compressed_budget" in capsys.readouterr().out


MINE = """
from streaming_llm import Compressor, register_compressor
from streaming_llm.compressors.merge import keep_best


class Mine(Compressor):
    def compress(self, tokens, reference, width, budget=None, least=None):
        return keep_best(tokens, reference, reference.weight, width, budget, width if least is None else least)


register_compressor("mine_from_a_file", Mine)
"""


def test_a_script_imports_a_compressor_of_the_users_own(run, tmp_path, capsys):
    path = tmp_path / "my_own_compressor.py"
    path.write_text(MINE)
    argv = ["--methods", "adms", "--compressor_type", "mine_from_a_file"]
    try:
        assert run(*argv)[0] == 2
        code, output = run("--import", str(path), *argv)
        assert code == 0
        assert json.loads((output / "results.json").read_text())["settings"]["compressor_type"] == "mine_from_a_file"
    finally:
        sys.modules.pop("my_own_compressor", None)
        streaming_llm.registry.COMPRESSORS.pop("mine_from_a_file", None)
    with pytest.raises(SystemExit) as caught:
        run("--import", str(tmp_path / "nowhere.py"))
    assert caught.value.code == 2
    assert "can't import" in capsys.readouterr().err


def test_the_help_begins_with_examples(parser):
    begin = parser.format_help().splitlines()[:12]
    assert begin[0] == "usage: eval_adms_vs_streaming.py [flags]"
    assert sum("python examples/eval_adms_vs_streaming.py" in line for line in begin) == 3


def test_a_second_run_keeps_the_first_one_s_results(run, capsys):
    for _ in range(2):
        assert run("--methods", "adms")[0] == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of an earlier run is now results-1.json" in printed
    assert "which is ADM++" in printed
