"""The names of the files in a run folder, and functions that never leave a partial file.

A run folder holds `config.json`, the tokenizer, `checkpoints/STEP/`, `metrics.jsonl`,
`tensorboard/`, `loss.png` and sometimes `samples.txt`, `profile/`, `changes.jsonl` and
`messages.txt`.
"""

import errno
import os
import shutil
import tempfile
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
MESSAGES = "messages.txt"  # Messages of `train` that could not be written to stderr.
OUTCOME = "outcome.json"  # Result and resources of a run; only `sweep` writes it.
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_FILES = (SENTENCEPIECE_MODEL, TOKENIZER_JSON)


def is_run(folder: Path) -> bool:
    """Returns whether a folder has a run's `config.json`; an older version may have written it."""
    try:
        groups = strict_json.read(folder / CONFIG)
    except UserError:
        return False
    return isinstance(groups, dict) and all(
        isinstance(groups.get(name), dict) for name in ("model", "train")
    )


def is_special(path: Path) -> bool:
    """Returns whether `path` is a device, a pipe or an open file, which no rename may replace."""
    is_open_file = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return is_open_file or (path.exists() and not path.is_file())


class WholeFile:
    """A file that is absent or unchanged until `complete` puts all written content in place.

    This also holds after a crash. If the `with` block ends without a call of `complete`, the new
    content is deleted. If the path is a link, the link stays, and its target gets the content. A
    device or a pipe has no earlier content to keep, so the content is written into it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path if is_special(path) else Path(os.path.realpath(path))
        folder = None if is_special(path) else self._path.parent
        handle, self._temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
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
        if is_special(self._path):
            # The file may be a standard output with earlier content, which mode `ab` keeps.
            with open(self._temporary, "rb") as content, self._path.open("ab") as target:
                shutil.copyfileobj(content, target)
            return
        Path(self._temporary).chmod(0o644)
        try:
            os.replace(self._temporary, self._path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(self._temporary, self._path)  # A mounted file keeps its place.


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes `content`; after a crash, `path` holds all of `content` or is unchanged."""
    with WholeFile(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.complete()


def read_outcome(folder: Path) -> dict[str, Any]:
    """Returns the object in `outcome.json`, or {} if the file is missing or has no object."""
    file = folder / OUTCOME
    found = strict_json.read(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def tokenizer_file(folder: Path) -> Path | None:
    """Returns the tokenizer file in `folder` or None; prefers tokenizer.json."""
    names = (TOKENIZER_JSON, SENTENCEPIECE_MODEL)
    return next((folder / n for n in names if file_kind.is_there(folder / n)), None)
