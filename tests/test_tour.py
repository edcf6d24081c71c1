"""The notebook of examples/: it runs from the first cell to the last, and what is committed is what such a run gave."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is in the extra `test`")
nbclient = pytest.importorskip("nbclient", reason="nbclient is in the extra `test`")
pytest.importorskip("ipykernel", reason="ipykernel is in the extra `test`")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "examples" / "adm_plus_plus_tour.ipynb"
# Has the notebook's `load_model` give a tiny random model, with a tokenizer that knows a chat.
TINY = """
import streaming_llm.evaluation
from transformers import AutoModelForCausalLM, AutoTokenizer

def load_model():
    model = AutoModelForCausalLM.from_pretrained({folder!r}).eval()
    tokenizer = AutoTokenizer.from_pretrained({folder!r})
    tokenizer.chat_template = "{{% for m in messages %}}{{{{ m['role'] }}}}: {{{{ m['content'] }}}}\\n{{% endfor %}}"
    tokenizer.chat_template += "{{% if add_generation_prompt %}}assistant: {{% endif %}}"
    return model, tokenizer

streaming_llm.evaluation.load_model = load_model
"""


def outputs(notebook) -> list[list[str]]:
    """The kinds of output of each code cell, in order."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = [one for one in cell.outputs if one.get("name") != "stderr"]
            found.append([one.get("name") or sorted(one.data)[-1] for one in shown])
    return found


def printed(notebook) -> str:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(
        one.text for cell in cells for one in cell.outputs if one.output_type == "stream" and one.name == "stdout"
    )


def run(monkeypatch, first: str = ""):
    """The notebook after a run, with a cell put before the others."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(TOUR, as_version=4)
    if first:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    return notebook


def test_the_committed_notebook_has_been_run_and_holds_no_error():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    text, shown = printed(notebook), outputs(notebook)
    assert "equal: True" in text and "tokens seen" in text
    assert sum(kinds == ["text/plain"] or "image/png" in str(kinds) for kinds in shown) > 1
    assert not any(one.output_type == "error" for cell in notebook.cells for one in cell.get("outputs", ()))
    assert "/tmp" not in text and "/home" not in text
    assert TOUR.stat().st_size < 1 << 20


def test_the_notebook_runs_on_a_tiny_model(monkeypatch, tiny_model_folder):
    text = printed(run(monkeypatch, TINY.format(folder=str(tiny_model_folder))))
    assert "1,200 tokens seen" in text
    assert "equal: True" in text


@pytest.mark.slow
def test_the_notebook_gives_what_is_committed(monkeypatch, smol):
    committed, again = nbformat.read(TOUR, as_version=4), run(monkeypatch)
    assert outputs(again) == outputs(committed)
    assert "equal: True" in printed(again)
