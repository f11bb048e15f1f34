"""The names of the files in a run folder, and functions that never leave a partial file.

A run folder holds `config.json`, the tokenizer, `checkpoints/STEP/`, `metrics.jsonl`,
`tensorboard/`, `loss.png` and sometimes `samples.txt`, `profile/`, `changes.jsonl` and
`messages.txt`.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import file_kind, strict_json

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LOSS_PLOT = "loss.png"
PROFILE = "profile"
SAMPLES = "samples.txt"
CHANGES = "changes.jsonl"  # Settings that a resumed run changed: the step, old and new values.
MESSAGES = "messages.txt"  # Messages of `train` that standard error could not take.
OUTCOME = "outcome.json"  # Result and resources of a run; only `sweep` writes it.
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_FILES = (SENTENCEPIECE_MODEL, TOKENIZER_JSON)


class WholeFile:
    """A file that is absent or unchanged until `complete` puts all written content in place.

    This also holds after a crash. If the `with` block ends without a call of `complete`, the new
    content is deleted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        handle, self._temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        self._file = os.fdopen(handle, "wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            Path(self._temporary).unlink(missing_ok=True)

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def complete(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        Path(self._temporary).chmod(0o644)
        os.replace(self._temporary, self._path)


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes `content`; after a crash, `path` holds all of `content` or is unchanged."""
    with WholeFile(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.complete()


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, and renames it to `path` after the block.

    If the block raises an error, the temporary folder is deleted. All users can read the files,
    also those of libraries (safetensors) that deny other users access.

    Raises:
      UserError: if `path` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists; give a new folder, or delete this one first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_outcome(folder: Path) -> dict[str, Any]:
    """Returns the object in `outcome.json`, or {} if the file is missing or has no object."""
    file = folder / OUTCOME
    found = strict_json.read(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def tokenizer_file(folder: Path) -> Path | None:
    """Returns the tokenizer file in `folder` or None; prefers a SentencePiece file."""
    return next((folder / n for n in TOKENIZER_FILES if file_kind.is_there(folder / n)), None)
