"""The speed benchmark on a tiny model: what it measures and how often, never how long it took."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_tiny_llama
from transformers import DynamicCache

from streaming_llm import enable_adms_llm
from streaming_llm.evaluation import pace, speed
from streaming_llm.evaluation.pace import Lane, Lap
from streaming_llm.evaluation.speed import Speed

SIZES = ["--recent_size", "24", "--compressed_budget", "12", "--sketch_budget", "8", "--replay_budget", "4"]
SIZES += ["--rank", "4", "--compression_interval", "16", "--steps", "16", "--rounds", "2", "--recall_budget", "4"]


def small_cache(model):
    return enable_adms_llm(model, recent_size=16, compressed_budget=16, compression_interval=16, rank=4)


@pytest.fixture
def run(tiny_model_folder, tmp_path):
    """Run the command on the tiny model; gives its exit code and its output directory."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")

    def start(*argv):
        base = ["--model_name_or_path", str(tiny_model_folder), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
        return Speed.main([*base, *SIZES, *argv]), tmp_path / "out"

    return start


def test_each_cache_is_measured_at_each_history_and_chunk(run, capsys):
    threads = torch.get_num_threads()
    argv = ["--histories", "64", "128", "--read_tokens", "96", "--chunk_sizes", "32", "48", "--full_tokens", "100"]
    code, output = run(*argv, "--threads", "1", "--clock", "process", "--batches", "1", "2-different", "--markdown")
    assert code == 0 and torch.get_num_threads() == threads
    document = json.loads((output / "speed.json").read_text())
    assert document["timing"]["machine"]["threads"] == 1
    assert "1 threads" in capsys.readouterr().out
    cases = [(row["method"], row["batch"], row["tokens"], row["chunk_size"]) for row in document["results"]]
    bounded = [name for name in speed.METHODS if name not in speed.UNBOUNDED]
    expected = []
    for batch in ("1", "2-different"):
        expected += [(name, batch, 64, 1) for name in speed.METHODS] + [(name, batch, 128, 1) for name in bounded]
        expected += [(name, batch, 96, chunk) for chunk in (32, 48) for name in speed.METHODS]
    assert cases == expected
    assert len(document["timing"]["rows"]) == len(cases)
    for row, timing in zip(document["results"], document["timing"]["rows"], strict=True):
        assert row["peak_bytes"] > row["cache_bytes"] > 0
        assert timing["longest"] >= 1 and timing["tokens_per_second"] > 0
        assert len(timing["curve"]) == (0 if row["chunk_size"] == 1 else -(-96 // row["chunk_size"]))
        assert (timing["ratios"].get("full") == 1.0) == (row["method"] == "full")
        assert ("short" in timing["ratios"]) == (row["chunk_size"] == 1)
    assert (output / "speed.png").stat().st_size > 10_000


@pytest.mark.parametrize("different", [False, True])
def test_a_made_history_leaves_the_cache_as_full_as_a_read_one(different):
    model, generator = make_tiny_llama(), torch.Generator().manual_seed(0)
    made, read = (Lane(model, small_cache(model), 2, different, 400) for _ in range(2))
    made.fill(300, generator)
    ids = pace.random_ids(model, 2, 300, generator)
    for part in ids.split(pace.FILL, dim=1):
        read.feed(part)
    assert made.cache.get_seq_length() == read.cache.get_seq_length() == made.seen == 300
    assert made.cache.held_tokens == read.cache.held_tokens
    made.feed(ids[:, :1])
    assert made.cache.get_seq_length() == 301


def test_lanes_take_turns_and_each_makes_every_step():
    model = make_tiny_llama()
    lanes = {"full": Lane(model, DynamicCache(config=model.config)), "own": Lane(model, small_cache(model))}
    order = []
    for name, lane in lanes.items():
        lane.feed = lambda ids, name=name: order.append(name) or Lap(1.0, 1.0, 0.0)
    laps = pace.turns(lanes, torch.zeros(1, 4, dtype=torch.int64), rounds=2, steps=3)
    assert order == ["full"] * 3 + ["own"] * 6 + ["full"] * 3
    assert {name: [len(own) for own in found] for name, found in laps.items()} == {"full": [3, 3], "own": [3, 3]}


def test_tokens_taken_back_can_come_again():
    model = make_tiny_llama()
    lane = Lane(model, DynamicCache(config=model.config))
    for _ in range(2):
        lane.feed(torch.ones(1, 7, dtype=torch.int64))
        lane.back(3)
        lane.feed(torch.ones(1, 1, dtype=torch.int64))
    assert lane.seen == lane.cache.get_seq_length() == 10


def test_a_pace_is_made_of_the_rounds():
    rounds = [[Lap(1.0, 0.5, 0.25), Lap(3.0, 0.5, 0.0)], [Lap(2.0, 0.5, 0.25), Lap(2.0, 0.5, 0.5)]]
    other = [[Lap(2.0, 1.0, 0.0)] * 2, [Lap(4.0, 1.0, 0.0)] * 2]
    found = pace.pace(rounds, 2, "wall", {"full": other})
    assert (found.tokens_per_second, found.slowest, found.fastest) == (1.0, 1.0, 1.0)
    assert found.ratios == {"full": 1.5}
    assert found.compaction == pytest.approx(1.0 / 7.0)
    # By place the fastest: 1 and 2 seconds, whose lower one is the median torch gives.
    assert (found.longest, found.longest_of_all) == (2.0, 1.5)


def test_peak_bytes_count_what_is_given_back_again():
    def work():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second * 2

    assert pace.peak_bytes(work, torch.device("cpu")) == 8000
    kept = []
    assert pace.peak_bytes(lambda: kept.append(torch.zeros(500)), torch.device("cpu")) == 2000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "h2o"], "method 'h2o' is not known"),
        (["--batches", "8-equal"], "batches '8-equal' must be a number of rows"),
        (["--batches", "0"], "batches '0' must be a number of rows"),
        (["--clock", "sun"], "clock='sun' must be one of wall, process"),
        (["--shape", "gpt-9"], "shape='gpt-9' is not known"),
        (["--dtype", "float8"], "dtype='float8' is not known"),
        (["--chunk_sizes", "0"], "chunk_sizes=0 is too small"),
        (["--histories", "100", "--batches", "4-different"], "must be more than 111"),
        (["--shape", "llama-3-8b"], "give one of them"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_loaded(run, capsys, argv, message):
    code, output = run(*argv)
    assert code == 2 and not output.exists()
    assert message in capsys.readouterr().err


def test_a_case_without_a_free_core_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr(pace, "free_cores", lambda: (2, 0.5))
    argv = ["--histories", "40", "--read_tokens", "0", "--methods", "adms_low_rank", "--rounds", "1"]
    assert run(*argv, "--threads", "1")[0] == 0
    assert "warning: 1 threads and 0.5 free cores" in " ".join(capsys.readouterr().out.split())


def test_a_random_model_has_the_shape_asked_for():
    model = speed.models.random_model("smollm2-135m", "bfloat16", torch.device("cpu"))
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config.num_hidden_layers == 30
    assert 130e6 < sum(parameter.numel() for parameter in model.parameters()) < 140e6
