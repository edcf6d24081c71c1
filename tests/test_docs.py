"""The documents tell the truth: their lists are the code's, their snippets run, their commands and links exist.

`python tests/test_docs.py` writes the parts of the documents that are made from the code anew.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama, stream, token_ids
from test_composite import composite_types
from test_families import VARIANTS

import streaming_llm
from streaming_llm import SUPPORTED_MODEL_TYPES, ADMSConfig, compressors, disable_adms_llm, enable_adms_llm, registry
from streaming_llm.evaluation.ablation import Ablation
from streaming_llm.evaluation.cases import Cases
from streaming_llm.evaluation.comparison import Comparison, EveryMethod
from streaming_llm.evaluation.long_stream import LongStream
from streaming_llm.evaluation.memory import Memory
from streaming_llm.evaluation.methods import METHODS, RECALL
from streaming_llm.evaluation.passkey import Passkey
from streaming_llm.evaluation.pictures import Pictures
from streaming_llm.evaluation.ruler import Ruler
from streaming_llm.evaluation.soak import Soak
from streaming_llm.evaluation.speed import Speed
from streaming_llm.model.families import FAMILIES
from streaming_llm.sizing import BOOKKEEPING_BYTES, ORIGINAL_BYTES

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "QUICKSTART.md", "ADM_PLUS_PLUS_IMPLEMENTATION.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def chat_script():
    spec = importlib.util.spec_from_file_location("streaming_chat", ROOT / "examples" / "streaming_chat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_types() -> str:
    return ", ".join(f"`{name}`" for name in SUPPORTED_MODEL_TYPES)


def refused_types() -> str:
    """Those that can't be, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, family in sorted(FAMILIES.items()):
        if family.refused:
            reasons.setdefault(family.refused, []).append(f"`{name}`")
    return "\n" + "".join(f"- {', '.join(names)}: {reason}\n" for reason, names in reasons.items())


def rope_types() -> str:
    """Those that tests/test_families.py tries."""
    parameters = [settings.get("rope_parameters", {}) for _, settings in VARIANTS.values()]
    return ", ".join(f"`{name}`" for name in sorted({one["rope_type"] for one in parameters if "rope_type" in one}))


def flag_table(flags) -> str:
    """The flags that are no settings, as a Markdown table made of the parser's own help."""
    rows = ["| flag | meaning (default) |", "|---|---|"]
    for name, action in flags.items():
        if name not in ADMSConfig.setting_names():
            default = "an empty line" if name == "sep" else action.default
            meaning = (action.help % {"default": default}).replace("|", "\\|")
            rows.append(f"| `--{name}` | {meaning} |")
    return "\n".join(rows)


RUNS = (Comparison, EveryMethod, Ablation, LongStream, Passkey, Soak, Cases, Memory, Pictures, Ruler, Speed)
RUNS = {f"examples/{run.prog}": run for run in RUNS}
# Flags of lm-eval's command.
LM_EVAL = {"model", "model_args", "tasks", "limit", "metadata", "include_path", "apply_chat_template"}


def chat_flags():
    """The chat's flags, less those that say of a module that it is off, which are the other scripts' too."""
    flags = chat_script().parser().flags()
    return {name: action for name, action in flags.items() if not name.startswith("disable_")}


MADE_FROM_CODE = {
    ("README.md", "model types"): model_types,
    ("README.md", "refused types"): refused_types,
    ("README.md", "rope types"): rope_types,
    ("README.md", "vision types"): lambda: composite_types("vision"),
    ("README.md", "audio types"): lambda: composite_types("audio"),
    ("QUICKSTART.md", "flags"): lambda: f"\n{flag_table(Comparison.parser().flags())}\n",
    ("QUICKSTART.md", "chat flags"): lambda: f"\n{flag_table(chat_flags())}\n",
    ("QUICKSTART.md", "settings"): lambda: f"\n{ADMSConfig.describe()}\n",
}


def made_part(part: str) -> re.Pattern:
    return re.compile(f"(<!-- {part} -->)(.*?)(<!-- /{part} -->)", re.DOTALL)


# A constant quoted with its value: `module.NAME = value`.
CONSTANT = re.compile(r"(?<=`)(\w+)\.(_?[A-Z][A-Z_]+) = (.+?)(?=`)", re.DOTALL)


def with_current_constants(text: str) -> str:
    """The text with every quoted constant's value as the module of that name has it."""

    def current(found: re.Match) -> str:
        [path] = Path(streaming_llm.__file__).parent.rglob(f"{found[1]}.py")
        value = re.search(rf"^{found[2]} = (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert value, f"{path.name} has no constant {found[2]}"
        return f"{found[1]}.{found[2]} = {value[1]}"

    return CONSTANT.sub(current, text)


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(f"^```{language}\n(.*?)^```$", read(document), re.DOTALL | re.MULTILINE)


def example_commands() -> list[tuple[str, list[str]]]:
    """Script and arguments of every call of an example in the documents."""
    found = []
    for document in DOCUMENTS:
        for line in re.findall(r"python (examples/[^`\n]*)", read(document)):
            script, *arguments = shlex.split(line, comments=True)
            found.append((script, arguments))
    return found


def message_skeletons() -> str:
    """Every string of the package, one a line, with an ellipsis where a value is filled in."""
    lines = []
    for path in sorted(Path(streaming_llm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                lines.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


@pytest.mark.parametrize(("document", "part"), MADE_FROM_CODE, ids=lambda value: value)
def test_what_is_made_from_the_code_is_what_the_code_says(document, part):
    found = made_part(part).search(read(document))
    assert found, f"{document} has no part marked {part!r}"
    assert found[2] == MADE_FROM_CODE[document, part](), "python tests/test_docs.py writes it anew"


def test_every_flag_in_the_documents_exists():
    flags = {name for run in RUNS.values() for name in run.parser().flags()}
    allowed = {*flags, *(f"no-{name}" for name in flags), *chat_flags(), *LM_EVAL, "help"}
    for document in DOCUMENTS:
        lines = [line for line in read(document).splitlines() if "pip " not in line]
        named = set(re.findall(r"(?<![\w<!-])--([a-z][\w-]*)", "\n".join(lines)))
        assert named <= allowed, document


def test_every_example_in_the_documents_can_be_called_as_it_is_written():
    calls = example_commands()
    assert {script for script, _ in calls} == {
        f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("_")
    }
    for script, argv in calls:
        assert (ROOT / script).is_file()
        if script in RUNS:
            RUNS[script].parse(argv).check()
        else:
            assert script == "examples/streaming_chat.py"
            chat_script().checked(*chat_script().parser().parse(argv))


def test_the_commands_that_ci_takes_from_the_readme_are_there():
    text = read("README.md")
    extras = re.findall(r"^(\w+) = \[", read("pyproject.toml").split("optional-dependencies]")[1], re.MULTILINE)
    for name, end in (("main", "python examples/eval_adms_vs_streaming.py"), ("tests", "python -m pytest")):
        command = re.search(f"^<!-- command: {name} -->\n```bash\n(.*)\n```$", text, re.MULTILINE)
        assert command, name
        assert command[1].endswith(end)
        assert re.search(r'pip install -e "\.\[(\w+)\]"', command[1])[1] in extras
        assert f"readme_command {name}" in read(".ci/run")


def test_links_lead_somewhere():
    def anchors(document):
        headings = re.findall(r"^#+ (.*)$", read(document), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}

    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^):]*))?\)", read(document)):
            assert (ROOT / target).exists(), (document, target)
            if anchor:
                assert anchor in anchors(target or document), (document, anchor)


def test_every_quoted_message_is_one_the_code_has():
    table = read("QUICKSTART.md").split("| message |")[1].split("\n\n")[0]
    quoted = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(quoted) > 10
    skeletons = message_skeletons()
    assert [message for message in quoted if message not in skeletons] == []


def test_constants_in_the_documents_have_the_value_they_have_in_the_code():
    text = read("ADM_PLUS_PLUS_IMPLEMENTATION.md")
    quoted = CONSTANT.findall(text)
    assert len(quoted) > 5
    assert quoted == CONSTANT.findall(with_current_constants(text)), "python tests/test_docs.py writes them anew"
    assert f"{BOOKKEEPING_BYTES} bytes of bookkeeping" in " ".join(read("README.md").split())
    assert f"a key, a value and {ORIGINAL_BYTES} bytes" in " ".join(read("QUICKSTART.md").split())


@pytest.fixture(scope="module")
def run_snippets(tiny_model_folder, tmp_path_factory):
    """Run a document's Python blocks in order, on a tiny model; gives the names they leave and what they print.

    Each document runs once for all tests.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Long enough for what 64 MiB of so small a model are.
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, max_position_embeddings=1 << 20).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"

    @functools.cache
    def run(document):
        names: dict = {}
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr("streaming_llm.evaluation.load_model", lambda: (model, tokenizer))
            patch.setattr("streaming_llm.model.families.FAMILIES", dict(FAMILIES))
            patch.chdir(tmp_path_factory.mktemp("snippets"))
            for number, block in enumerate(code_blocks(document, "python"), start=1):
                exec(compile(block, f"{document}, Python block {number}", "exec"), names)
        return names, printed.getvalue()

    yield run
    for name in compressors.available_compressors():
        if not compressors.get_compressor(name).__module__.startswith("streaming_llm."):  # registered by a snippet
            del registry.COMPRESSORS[name]


def test_the_readme_runs(run_snippets):
    names, output = run_snippets("README.md")
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert "580\n" in output
    config = names["config"]
    assert 63 * 2**20 < config.memory_bytes(names["model"].config, moved=True, compacting=True) <= 64 * 2**20


def test_the_compressor_of_the_readme_compresses(run_snippets, monkeypatch):
    names, _ = run_snippets("README.md")
    compressor, cache = names["LoudestValues"], names["cache"]
    calls = []
    compress = compressor.compress
    monkeypatch.setattr(compressor, "compress", lambda *args, **kwargs: calls.append(1) or compress(*args, **kwargs))
    stream(names["model"], token_ids(400), cache, chunk=32)
    assert calls
    assert cache.held_tokens <= cache.config.expected_max_tokens < 400
    assert cache.layers[0].held.count.sum(-1).eq(400).all()  # every token that came is accounted for
    assert cache.layers[0].held.beta.amax() > 0


def test_the_score_of_the_readme_is_what_the_cache_scores_by(run_snippets):
    names, _ = run_snippets("README.md")
    compressors.check_compressor(names["LastAsked"])
    cache = names["scored"]
    stream(names["model"], token_ids(400), cache, chunk=32)
    plain = enable_adms_llm(names["model"], recent_size=64, compressed_budget=64)
    stream(names["model"], token_ids(400), plain, chunk=32)
    for one, equal in ((cache, True), (plain, False)):
        held = one.layers[0].held
        alone = (held.count == 1) & (held.mass > 0)  # what stands for others has their mass as well
        assert int(alone.sum()) > 50
        assert torch.equal(held.score[alone], held.mass[alone]) is equal


def test_a_family_with_the_row_that_the_readme_says_is_not_probed(monkeypatch, caplog):
    from transformers import LlamaConfig, LlamaForCausalLM

    class MyFamily(LlamaConfig):
        model_type = "my_family"

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(MyFamily(vocab_size=128, num_key_value_heads=2, max_position_embeddings=512, **sizes)).eval()
    enable_adms_llm(model, rank=4)
    assert "probed" in caplog.text
    disable_adms_llm(model)
    caplog.clear()
    own = dict(FAMILIES)
    for module in ("families", "enable"):
        monkeypatch.setattr(f"streaming_llm.model.{module}.FAMILIES", own)
    [snippet] = [block for block in code_blocks("README.md", "python") if "my_family" in block]
    exec(snippet, {})  # noqa: S102
    cache = enable_adms_llm(model, recent_size=32, compressed_budget=16, compression_interval=16, rank=4)
    assert "probed" not in caplog.text
    stream(model, token_ids(200), cache, chunk=16)
    assert cache.held_tokens <= cache.config.expected_max_tokens < 200
    assert torch.equal(cache.layers[0].held.count.sum(-1), torch.full((1, 2), 200, dtype=torch.int64))


def results_rows() -> dict[str, tuple[float, float, float]]:
    """Perplexity, KL and recovered share of each method in README's table of the novel."""
    table = read("README.md").split("<!-- results -->")[1].split("\n\n")[1]
    rows = (line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    return {row[0]: (float(row[1]), float(row[2]), float(row[3].rstrip("%")) / 100) for row in rows}


def test_the_readme_has_a_row_for_every_method_but_recall():
    assert list(results_rows()) == [name for name in METHODS if name != RECALL]


@pytest.mark.slow
def test_the_command_gives_the_rows_that_the_readme_has(smol, tmp_path):
    assert EveryMethod.main(["--device", "cpu", "--decode_tokens", "0", "--output_dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    for method, (perplexity, kl, gap) in results_rows().items():
        one = found[method]
        assert one["perplexity"] == pytest.approx(perplexity, abs=0.015), method
        assert one["kl"] == pytest.approx(kl, abs=1.5e-4), method
        assert one["gap_recovered"] == pytest.approx(gap, abs=0.01), method


def test_the_quickstart_runs(run_snippets):
    names, output = run_snippets("QUICKSTART.md")
    assert set(names["results"]) == {"full", "streaming", "snapkv", "adms"}
    assert "4000 tokens seen" in output
    assert len(names["messages"]) == 4
    assert "True 620\n" in output  # the kept conversation goes on to the bit
    assert names["chat"].cache.get_seq_length() > 64
    stream(names["model"], token_ids(700), names["cache"], chunk=32)
    assert names["cache"].layers[0].compacted


def test_the_parts_called_by_hand_in_the_quickstart_do_what_it_says(run_snippets):
    names, output = run_snippets("QUICKSTART.md")
    for name in ("Dual-Fidelity", "Replay", "Calibration", "Controller"):
        assert f"[ADMS {name} @ 4000]" in output
    parts, where = names["parts"], names["where"]
    assert "3 sketches are left" in output
    assert where.tolist() == list(range(124 - len(where), 124))  # the most recent originals
    assert names["energy"] == pytest.approx(0.25)
    assert "tensor([265., 465.])" in output  # seven tenths of the way to 250 and 450
    assert 16 < parts.controller_budgets[(0, 0)] <= 32
    assert (parts.stats["total_sketch_promotions"], parts.stats["total_replay_triggers"]) == (1, 1)


def test_the_readme_says_the_memory_of_the_originals_as_it_is():
    from transformers import LlamaConfig

    smol = LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, head_dim=64)
    sizes = {"recent_size": 256, "compressed_budget": 208}

    def mebibytes(**changed):
        return ADMSConfig.adm_plus_plus(**sizes, **changed).memory_bytes(smol, "float32") / 2**20

    without = mebibytes(enable_dual_fidelity=False, sketch_budget=0, enable_residual_replay=False, replay_budget=0)
    without += (32 + 16) * 30 * 3 * (64 * 2 * 4 + BOOKKEEPING_BYTES) / 2**20
    assert (round(mebibytes() - without), round(without), round(mebibytes(sketch_originals=64) - without)) == (12, 32, 3)
    text = " ".join(read("README.md").split())
    assert "12 MiB beside 32 MiB" in text
    assert "`sketch_originals=64` makes that 3 MiB" in text


def update() -> None:
    """Write the parts of the documents that are made from the code."""
    architecture = "ADM_PLUS_PLUS_IMPLEMENTATION.md"
    (ROOT / architecture).write_text(with_current_constants(read(architecture)), encoding="utf-8")
    for (document, part), make in MADE_FROM_CODE.items():
        text = made_part(part).sub(lambda found, make=make: found[1] + make() + found[3], read(document))
        (ROOT / document).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    update()


def test_the_first_example_of_readme_runs_without_a_warning(monkeypatch, tiny_model_folder, caplog):
    import warnings

    from transformers import AutoTokenizer

    from streaming_llm import evaluation

    model, tokenizer = make_tiny_llama(vocab_size=256), AutoTokenizer.from_pretrained(tiny_model_folder)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    monkeypatch.setattr(evaluation, "load_model", lambda: (model, tokenizer))
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(code_blocks("README.md", "python")[0].replace("recent_size=256", "recent_size=16, rank=8"), names)  # noqa: S102
    assert names["output"].shape[1] == names["inputs"]["input_ids"].shape[1] + 64
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]
