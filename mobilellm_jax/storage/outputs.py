"""Checks that a command may write to its output, and moves complete outputs to their place.

Every command calls one of these functions before its work, so an output that cannot be written
costs no work. An output may be a mounted folder (`docker -v`), the current folder, or a link to
another disk. Such a folder keeps its place: files move into it, and it is never replaced.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mobilellm_jax.errors import MissingFileError, UserError, no_space
from mobilellm_jax.storage import rundir
from mobilellm_jax.storage.sealing import MANIFEST

# A file system or a desktop puts these names into a folder without asking.
_NO_CONTENT = re.compile(r"\..*|lost\+found|Thumbs\.db|desktop\.ini")
# A folder with one of these names holds a finished model or finished data.
MODEL_FILES = (
    MANIFEST,
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "*.gguf",
)
# A folder with one of these names holds a model, a run or data, which a run would damage.
BELONGS_TOGETHER = (
    *MODEL_FILES,
    *(rundir.CONFIG, *rundir.TOKENIZER_FILES, "tokenizer_config.json"),
)
# The last file that moves into a folder makes it complete for its readers.
_COMPLETES = (MANIFEST, rundir.CONFIG, rundir.CHECKPOINTS)
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def real_folder(flag: str, folder: Path) -> Path:
    """Returns the absolute path of `folder`, after a check that the folder can be written.

    The folder may be missing. In this case its nearest existing parent must be writable.

    Raises:
      UserError: if `folder` is a file or device, cannot be written, or has a name that only a
        shell replaces.
    """
    there = folder
    try:
        # Other hosts may know only the path with links, so links are replaced only if necessary.
        there = real = folder.absolute()
        if ".." in folder.parts or any(map(_is_open_link, (real, *real.parents))):
            there = real = Path(os.path.realpath(folder))
            if any(map(_is_open_link, (real, *real.parents))):
                raise UserError(f"{flag}={folder} leads through a link to itself; name a folder.")
        if real.exists() and not real.is_dir():
            raise UserError(f"{flag}={folder} is not a folder; name a new folder.")
        while not there.exists():
            if there.name == "~" or _VARIABLE.fullmatch(there.name):
                raise UserError(
                    f"{flag}={folder} contains {there.name}, which only a shell replaces; write "
                    "the whole path."
                )
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{flag}={folder} cannot be written: {there}: {error.strerror}. Name a folder on a "
            f"disk that you can write, or change the permissions of {there}."
        ) from error
    return real


def is_empty(folder: Path) -> bool:
    """Returns whether a folder is missing or empty; `lost+found` of a mounted disk is ignored."""
    return not folder.exists() or not _content(folder)


def new_folder(flag: str, folder: Path) -> Path:
    """Returns the absolute path of a missing or empty folder, as `real_folder` does.

    Raises:
      UserError: if `folder` cannot be written, or is not empty.
    """
    real = real_folder(flag, folder)
    if not is_empty(real):
        raise UserError(
            f"{flag}={folder} exists and holds {_some(_content(real))}; name a new folder, or move "
            "this content away first."
        )
    return real


def own_folder(
    flag: str, folder: Path, what: str, is_own: Callable[[Path], bool], names: Sequence[str]
) -> Path:
    """Checks an output folder in which a command may replace only files that it wrote earlier.

    Args:
      flag: the flag, for messages.
      folder: the folder that the user names; it may be missing.
      what: the content that the command writes, such as "a run".
      is_own: returns whether the same command wrote the content of a folder.
      names: patterns of the names that no one else may have used in the folder.

    Raises:
      UserError: if the folder cannot be written, or holds such a name and is not the command's own.
    """
    real = real_folder(flag, folder)
    if real.exists() and not is_own(real):
        foreign = sorted({path.name for name in names for path in real.glob(name)})
        if foreign:
            raise UserError(
                f"{flag}={folder} holds {_some(foreign)}, and is not the folder of {what}; name a "
                "new folder, so that nothing there is overwritten."
            )
    return real


def check_file(flag: str, file: Path, is_own: Callable[[Path], bool]) -> None:
    """Checks a file that a command will write after its work; accepts a device such as /dev/null.

    Raises:
      MissingFileError: if the folder of the file does not exist.
      UserError: if `file` is a folder or cannot be written, or has content that is not the
        command's own.
    """
    if file.is_dir():
        raise UserError(f"{flag}={file} is a folder; name a file.")
    if rundir.is_special(file):
        return
    if not file.parent.is_dir():
        raise MissingFileError(
            f"{flag}={file}: the folder {file.parent} does not exist; make it first."
        )
    real_folder(flag, Path(os.path.realpath(file)).parent)
    if file.exists() and file.stat().st_size and not is_own(file):
        raise UserError(
            f"{flag}={file} exists, and this command did not write it; name a new file, or delete "
            "this one first."
        )


@contextlib.contextmanager
def whole_directory(flag: str, folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, and gives its content to `folder` after the block.

    If `folder` is missing, the temporary folder is renamed, so all files appear at once. If
    `folder` exists, it may be a mount or the current folder, which no rename can replace. Its new
    files then move into it, and the file that readers need most moves last. If the block raises an
    error, the temporary folder is deleted. All users get permission to read the files, because some
    libraries (safetensors) write files that only their owner can read.

    Raises:
      UserError: as `new_folder` does.
    """
    real = new_folder(flag, folder)
    place = real if real.exists() else real.parent
    place.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{real.name}."))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
        give_name(temporary, real)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (code := no_space(error)) is not None:
            raise OSError(code, os.strerror(code), str(folder)) from error
        raise


def give_name(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`, or moves its content if `folder` exists."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    for path in sorted(temporary.iterdir(), key=lambda path: path.name in _COMPLETES):
        os.replace(path, folder / path.name)
    temporary.rmdir()


def _is_open_link(path: Path) -> bool:
    """Returns whether a path is a link to something that does not exist."""
    return path.is_symlink() and not path.exists()


def _content(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not _NO_CONTENT.fullmatch(name))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more names" if len(names) > 3 else "")
