"""Each ADM++ module does what it is for on the case made for it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from streaming_llm.evaluation import cases


@pytest.fixture(scope="module")
def found():
    """The cases by what they measured, in the order of the table."""
    return {case.measured.split(":")[0].split(",")[0]: case for case in cases.run_cases(seeds=3)}


def test_sketches_keep_what_dropping_loses(found):
    case = found["attention output error"]
    assert 0 < case.with_module < 0.6 * case.without


def test_a_promoted_sketch_has_its_originals_attended_to_again(found):
    case = found["attention to a sketched token once it is asked for"]
    assert case.without == 0 and case.with_module > 0.005


def test_replay_lowers_the_error_when_it_triggers(found):
    case = found["attention output error before / after eight originals are re-injected"]
    assert case.with_module < case.without


def test_replay_triggers_where_compaction_loses_energy_and_hardly_elsewhere(found):
    case = found["compactions that trigger"]
    assert case.without < 0.2 and case.with_module > 0.8


def test_calibration_lowers_the_position_error_on_a_drifted_stream(found):
    case = found["mean error of synthetic positions"]
    assert case.with_module < 0.4 * case.without


def test_the_controller_gives_more_to_those_who_lose_more_and_the_total_stays(found):
    case, total = (
        found["budget of a layer that loses ten times as much as the other (equal"],
        found["budgets of both together"],
    )
    assert case.with_module > 1.5 * case.without and total.with_module == total.without


def test_the_example_prints_the_table(capsys):
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["module_cases.py"])
        runpy.run_path(str(Path(__file__).parent.parent / "examples" / "module_cases.py"), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("\n|") == len(cases.run_cases(1)) + 1


def test_fewer_than_one_seed_is_refused(capsys):
    with pytest.raises(ValueError, match="seeds=0 must be at least 1"):
        cases.run_cases(0)
    assert cases.Cases.main(["--seeds", "0"]) == 2
    assert capsys.readouterr().err == "module_cases.py: error: seeds=0 must be at least 1\n"
