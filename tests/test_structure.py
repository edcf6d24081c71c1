"""The house: imports point down, nothing of the library knows the evaluation, and no part of it grows too long to read."""

from __future__ import annotations

import ast
import inspect
import logging
from pathlib import Path

import pytest

import streaming_llm
from streaming_llm import ADMSLayer

PACKAGE = Path(streaming_llm.__file__).parent
MOST_LINES, MOST_LAYER_LINES = 400, 200


def library_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "evaluation" not in path.relative_to(PACKAGE).parts]


@pytest.fixture
def loggers_as_they_were():
    """The linter sets logging up anew, which switches off every logger there is: they are on again for later tests."""
    own = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before, level = [logger.disabled for logger in own], logging.root.level
    handlers = list(logging.root.handlers)
    yield
    for logger, disabled in zip(own, before, strict=True):
        logger.disabled = disabled
    logging.root.handlers[:], logging.root.level = handlers, level


@pytest.mark.usefixtures("loggers_as_they_were")
def test_each_room_imports_only_from_those_below_it(monkeypatch, capsys):
    lint = pytest.importorskip("importlinter.cli", reason="import-linter needs Python 3.11")
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    assert lint.lint_imports(no_cache=True) == lint.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def imports_ours(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "streaming_llm" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.level > 0 or node.module.split(".")[0] == "streaming_llm")


def test_every_import_of_the_library_s_own_files_is_at_the_top_of_a_file():
    for path in library_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        hidden = [node.lineno for node in ast.walk(tree) if imports_ours(node) and node not in tree.body]
        assert hidden == [], path.relative_to(PACKAGE)
        assert "import_module" not in path.read_text(encoding="utf-8"), path.relative_to(PACKAGE)


def test_no_file_of_the_library_is_longer_than_four_hundred_lines():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in library_files()}
    assert len(lengths) > 30
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_a_layer_fits_into_two_hundred_lines():
    assert len(inspect.getsource(ADMSLayer).splitlines()) <= MOST_LAYER_LINES
