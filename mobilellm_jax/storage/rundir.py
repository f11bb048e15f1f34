"""The names of the files in a run folder, and writes that are whole or absent.

A run folder holds `config.json`, the tokenizer, `checkpoints/STEP/`, `metrics.jsonl`,
`tensorboard/`, `loss.png`, `samples.txt` and, when asked for, `profile/`. A file that a reader may
meet half-written is written under a temporary name in the same folder and renamed, so that it is
complete or not there.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LOSS_PLOT = "loss.png"
PROFILE = "profile"
SAMPLES = "samples.txt"
OUTCOME = "outcome.json"  # of a run that `sweep` started: finished or failed, and what it took
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_FILES = (SENTENCEPIECE_MODEL, TOKENIZER_JSON)


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes `content` so that `path` holds all of it or is unchanged, also after a crash."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` that takes its name if the block succeeds.

    Its files can then be read by everyone, whatever their writers thought (safetensors: the owner).
    An existing `path` is replaced only then; after an error it is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def tokenizer_file(folder: Path) -> Path | None:
    """Returns the tokenizer file in `folder` (SentencePiece before tokenizer.json), or None."""
    return next((folder / n for n in TOKENIZER_FILES if (folder / n).is_file()), None)
