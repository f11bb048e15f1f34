"""Seals and opens exported folders, and loads their models in the runtimes of their formats.

An exported folder has a manifest with checksums (`sealing.py`). Opening a folder compares all
checksums, so a runtime in C++ never reads damaged bytes.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from etils import epath

from mobilellm_jax.config import ConfigError, near_miss
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.export.formats import FORMATS
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime
from mobilellm_jax.storage import rundir, sealing, strict_json
from mobilellm_jax.storage.user_path import user_path

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An exported folder whose files match its manifest."""

    folder: Path
    info: ArtifactInfo
    sha256: str  # SHA-256 of the manifest.

    @property
    def file(self) -> Path:
        return self.folder / self.info.file

    @property
    def model_bytes(self) -> int:
        return model_bytes(self.folder)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder, ours=True)

    def load(self) -> Runtime:
        """Loads the model in its runtime; raises a `UserError` if this fails."""
        self.check_runtime()
        return FORMATS[self.info.format].load(self.folder, self.info)

    def check_runtime(self) -> None:
        form = FORMATS[self.info.format]
        if not form.can_run:
            raise UserError(
                f"{self.file} runs in {form.run_packages[0]}, which is not installed; "
                f"{form.install}."
            )


def model_bytes(folder: Path) -> int:
    """Returns the size in bytes of the weights and programs, without tokenizer and model card."""
    return sum(file.stat().st_size for file in folder.glob("model[.-]*"))


def seal_artifact(folder: Path, info: ArtifactInfo) -> None:
    """Writes the manifest, with a checksum of every file in `folder`; this completes the export."""
    sealing.seal(epath.Path(folder), {"artifact": VERSION, **dataclasses.asdict(info)})


def open_artifact(path: str | Path) -> Artifact:
    """Opens an exported folder, or the model file in it, and verifies every byte.

    Raises:
      MissingFileError: if the path does not exist.
      UserError: if the folder is not an export, or is damaged.
    """
    given = user_path("artifact", path)
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
        raise UserError(
            f"{where} does not describe an export; give a folder of `mobilellm export`."
        )
    version = content.pop("artifact")
    if version != VERSION:
        raise UserError(
            f"{where} has format version {strict_json.shown(version)}, and this program reads "
            f"{VERSION}; export again."
        )
    files = content.pop("files")
    try:
        info: ArtifactInfo = strict_json.as_type(content, ArtifactInfo, where)
    except ConfigError as error:
        raise UserError(f"{where} describes a model that cannot be: {error}") from error
    form = FORMATS.get(info.format)
    if form is None or info.file != form.file or info.file not in files:
        raise UserError(
            f"{where} names the format {strict_json.shown(info.format)} and the model file "
            f"{strict_json.shown(info.file)}; the formats are "
            f"{', '.join(name for name in FORMATS if FORMATS[name].file)}, and the file must be "
            "one of the folder's."
        )
    if info.precision not in form.precisions:
        raise UserError(
            f"{where} names the precision {strict_json.shown(info.precision)}; --format="
            f"{info.format} has {', '.join(form.precisions)}."
        )
    if not any(name in files for name in rundir.TOKENIZER_FILES):
        raise UserError(f"{where} names no tokenizer; export again.")
    return info
