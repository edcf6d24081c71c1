"""What a run leaves behind: the table, the files, and that no file is ever half-written."""

from __future__ import annotations

import json
import os

import pytest

from streaming_llm.evaluation import plots, report
from streaming_llm.evaluation.streaming import Curve, MethodResult, Timing
from streaming_llm.stats import format_bytes


def result(method: str, **changes) -> MethodResult:
    curve = Curve([64, 128, 192], [None, 21.5, 20.25], [1024, 2048, 2048], [64, 128, 128])
    timing = Timing(2.0, 96.0, 0.1, 0.0526, 8, 12.5, 0.0123)
    values = dict(
        method=method,
        scored_tokens=100,
        nll=3.0,
        perplexity=20.0855,
        kl=0.04321,
        gap_recovered=0.625,
        held_tokens=1580,
        cache_bytes=3 * 2**20,
        memory={"attended": 2**20},
        stats={"total_compressions": 7},
        curve=curve,
        timing=timing,
    )
    return MethodResult(**{**values, **changes})


@pytest.fixture
def results():
    bare = Timing(2.0, 96.0)
    return {
        "full": result("full", kl=0.0, gap_recovered=1.0, timing=bare),
        "adms": result("adms"),
        "alone": result("alone", kl=None, gap_recovered=None),
    }


def test_the_terminal_tables_hold_every_figure_in_80_columns(results):
    rich = pytest.importorskip("rich.console")
    results["adms_attention_matching"] = result("adms_attention_matching", archive_bytes=2**20)
    console = rich.Console(width=80, record=True, file=open(os.devnull, "w"))
    report.print_tables(results, "A title", "A caption", console)
    lines = console.export_text().splitlines()
    found = [line.split() for line in lines if line.startswith("adms_attention_matching ")]
    assert found[0][1:] == ["20.09", "0.0432", "62.5%", "2.0", "MiB", "1.0", "MiB"]
    assert found[1][1:] == ["1,580", "96", "5.3%", "12.5", "1.23%"]
    assert next(line.split() for line in lines if line.startswith("alone"))[1:4] == ["20.09", "-", "-"]
    assert lines[1].startswith("A title")
    assert any(line.startswith("A caption") for line in lines)


def test_the_markdown_table_has_one_row_a_method(results):
    lines = report.markdown_table(results).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| full | 20.09 | 0.0000 | 100.0% | 3.0 MiB | - | 1,580 | 96 | - | - | - |")


def test_the_archive_is_counted_apart_from_what_is_attended(results):
    results["recall"] = result("recall", archive_bytes=2**20)
    line = report.markdown_table(results).splitlines()[-1]
    assert line.startswith("| recall | 20.09 | 0.0432 | 62.5% | 2.0 MiB | 1.0 MiB | 1,580 |")
    entry = report.results_document(results, {}, "cpu")["results"]["recall"]
    assert (entry["cache_bytes"], entry["archive_bytes"]) == (3 * 2**20, 2**20)


def test_all_that_changes_from_run_to_run_is_under_timing(results):
    document = report.results_document(results, {"seed": 0}, "cpu")
    slower = {name: result(**{**vars(one), "timing": Timing(9.0, 1.0)}) for name, one in results.items()}
    other = report.results_document(slower, {"seed": 0}, "cpu")
    assert document.pop("timing") != other.pop("timing")
    assert document == other
    assert document["results"]["adms"]["kl"] == 0.04321
    assert document["results"]["adms"]["curve"]["perplexity"] == [None, 21.5, 20.25]
    assert document["environment"]["transformers"]


def test_results_are_written_as_json_that_reads_back(tmp_path, results):
    document = report.results_document(results, {"sep": "\n", "name": "naïve"}, "cpu")
    report.write_json(tmp_path / "results.json", document)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == document


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "results.json"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        report.write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")

    def replace(*_):
        raise PermissionError

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        report.write_json(path, {"new": 1})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_figure_that_is_no_number_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        report.write_json(tmp_path / "results.json", {"perplexity": float("nan")})
    assert os.listdir(tmp_path) == []


def test_the_picture_is_a_png_with_a_line_a_method_in_both_panels(tmp_path, results, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib.figure")
    results |= {str(number): result(str(number)) for number in range(20)}
    drawn = []
    save = matplotlib.Figure.savefig
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    plots.plot_perplexity(tmp_path / "perplexity.png", results, "A title", 96)
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert os.listdir(tmp_path) == ["perplexity.png"]
    upper, lower = drawn[0].axes
    assert [line.get_label() for line in upper.lines] == [line.get_label() for line in lower.lines] == list(results)
    assert list(upper.lines[0].get_xdata()) == [128, 192]
    assert list(lower.lines[0].get_ydata()) == [1024 / 2**20, 2048 / 2**20, 2048 / 2**20]
    assert "MiB" in lower.get_ylabel()
    assert lower.get_xlabel() == "tokens read"
    assert len({(line.get_color(), line.get_linestyle()) for line in upper.lines}) == len(results)


def test_an_output_directory_is_made_or_refused_before_the_run(tmp_path):
    from streaming_llm.evaluation import EvaluationError

    report.prepare_output(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="can't write to output_dir .*file"):
        report.prepare_output(tmp_path / "file")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (47185920, "45.0 MiB"), (2**41, "2048.0 GiB")]
)
def test_sizes_are_readable(size, text):
    assert format_bytes(size) == text


def test_files_of_an_earlier_run_are_kept_under_one_number(tmp_path):
    paths = [tmp_path / "results.json", tmp_path / "perplexity.png"]
    assert report.keep_earlier(paths) == []
    for number in (1, 2):
        for path in paths:
            path.write_text(str(number))
        kept = dict(report.keep_earlier(paths))
        assert [kept[path].name for path in paths] == [f"results-{number}.json", f"perplexity-{number}.png"]
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["1", "1", "2", "2"]
