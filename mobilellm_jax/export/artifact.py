"""Exported folders: their contents, their checksums, and the runtime that loads their model.

An exported folder is sealed (`sealing.py`). Its `manifest.json` describes the model file and
contains the SHA-256 of every file. The checksums are compared first, so a runtime in C++ never
reads damaged bytes.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mobilellm_jax.config import Config, DataConfig, near_miss
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime
from mobilellm_jax.storage import rundir, sealing, strict_json

VERSION = 1
EXTRA = "pip install 'mobilellm-jax[export]'"


class _Opener(NamedTuple):
    """The function that loads a model file in the runtime of its format."""

    load: Callable[[Path, ArtifactInfo], Runtime]
    package: str  # the library that the runtime needs


def _load_gguf(file: Path, info: ArtifactInfo) -> Runtime:
    from mobilellm_jax.export.gguf import runtime

    return runtime.load(file, info)


def _load_onnx(file: Path, info: ArtifactInfo) -> Runtime:
    from mobilellm_jax.export.onnx import runtime

    return runtime.load(file, info)


def _load_stablehlo(file: Path, info: ArtifactInfo) -> Runtime:
    from mobilellm_jax.export.stablehlo import runtime

    return runtime.load(file, info)


def _load_executorch(file: Path, info: ArtifactInfo) -> Runtime:
    from mobilellm_jax.export.executorch import runtime

    return runtime.load(file, info)


def _load_litert(file: Path, info: ArtifactInfo) -> Runtime:
    from mobilellm_jax.export.litert import runtime

    return runtime.load(file, info)


RUNTIMES = {
    "gguf": _Opener(_load_gguf, "llama_cpp"),
    "onnx": _Opener(_load_onnx, "onnxruntime"),
    "stablehlo": _Opener(_load_stablehlo, "flatbuffers"),  # jax.export imports it
    "executorch": _Opener(_load_executorch, "executorch"),
    "litert": _Opener(_load_litert, "ai_edge_litert"),
}


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An exported folder whose files match its manifest."""

    folder: Path
    info: ArtifactInfo
    sha256: str = ""  # SHA-256 of the manifest; "" before there is a manifest

    @property
    def file(self) -> Path:
        return self.folder / self.info.file

    @property
    def model_bytes(self) -> int:
        """Bytes that a device stores: the model file and the files beside it with the same stem."""
        stem = self.file.stem
        return sum(f.stat().st_size for f in self.folder.iterdir() if f.stem.split(".")[0] == stem)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)

    def load(self) -> Runtime:
        """Loads the model in its runtime.

        Raises:
          UserError: if the runtime is not installed, or refuses the file.
        """
        return self.loader()()

    def loader(self) -> Callable[[], Runtime]:
        """Returns the function that loads the model, and imports the library of the runtime.

        Raises:
          UserError: if the library is not installed.
        """
        opener = RUNTIMES[self.info.format]
        if not is_installed(self.info.format):
            raise UserError(
                f"{self.file} runs in {opener.package}, which is not installed; {EXTRA}."
            )
        return lambda: opener.load(self.file, self.info)


def is_installed(format_name: str) -> bool:
    """Returns whether the runtime of a format is installed."""
    return importlib.util.find_spec(RUNTIMES[format_name].package) is not None


def seal_artifact(folder: Path, info: ArtifactInfo) -> None:
    """Writes the manifest over all files of `folder`, which makes the folder an export."""
    sealing.seal(epath.Path(folder), {"artifact": VERSION, **dataclasses.asdict(info)})


def open_artifact(path: str | Path) -> Artifact:
    """Opens an exported folder, or the model file in it, and verifies every byte.

    Raises:
      MissingFileError: if the path does not exist.
      UserError: if the folder is not an export, or is damaged.
    """
    given = Path(path)
    if not given.exists():
        names = [p.name for p in given.parent.iterdir()] if given.parent.is_dir() else []
        raise MissingFileError(
            f"artifact={str(path)!r} does not exist.{near_miss(given.name, names)}"
        )
    folder = given if given.is_dir() else given.parent
    if not (folder / sealing.MANIFEST).is_file():
        raise UserError(
            f"artifact={str(path)!r} must be a folder that mobilellm export made, or the model "
            f"file in it; {folder} has no {sealing.MANIFEST}."
        )
    content = sealing.verify(epath.Path(folder))
    checksum = hashlib.sha256((folder / sealing.MANIFEST).read_bytes()).hexdigest()
    info = _info(content, folder)
    if given.is_file() and given.name != info.file:
        raise UserError(f"artifact={str(path)!r}: the model file of {folder} is {info.file}.")
    return Artifact(folder, info, checksum)


def _info(content: dict[str, Any], folder: Path) -> ArtifactInfo:
    where = str(folder / sealing.MANIFEST)
    if "artifact" not in content:
        raise UserError(f"{where} is not that of an export, but of something else.")
    version = content.pop("artifact")
    if version != VERSION:
        raise UserError(
            f"{where} has format version {strict_json.shown(version)}, and this program reads "
            f"{VERSION}; export again."
        )
    files = content.pop("files")
    info = strict_json.as_type(content, ArtifactInfo, where)
    assert isinstance(info, ArtifactInfo), "what it was asked for"
    Config(model=info.model, data=DataConfig(seq_len=1))  # its rules
    if info.format not in RUNTIMES or info.file not in files:
        raise UserError(
            f"{where} names the format {strict_json.shown(info.format)} and the model file "
            f"{strict_json.shown(info.file)}; the formats are {', '.join(RUNTIMES)}, and the file "
            "must be one of the folder's."
        )
    if not any(name in files for name in rundir.TOKENIZER_FILES):
        raise UserError(f"{where} names no tokenizer; export again.")
    return info
