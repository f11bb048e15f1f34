"""Lists, chooses and deletes the step folders of a run.

`STEP/` is a checkpoint. `STEP.saving-N/` is a save that is running or was cut off. An object
store cannot rename, so an incomplete save there is a folder `STEP/` without a manifest.
`STEP.damaged-N/` is a damaged checkpoint of a step that was saved again. This file never deletes a
damaged checkpoint.
"""

import logging
from collections.abc import Sequence

from etils import epath

from mobilellm_jax.checkpoint.reading import CheckpointError, checkpoints_folder, read_content
from mobilellm_jax.storage import sealing
from mobilellm_jax.storage.sealing import DamagedError, UnsealedError

_SAVING = ".saving"
_DELETED = ".deleted"
_DAMAGED = ".damaged-"

_log = logging.getLogger(__name__)


def steps(run: epath.PathLike) -> list[int]:
    """Returns the complete steps of a run in ascending order; does not verify the files."""
    folder = checkpoints_folder(run)
    return [step for step in _numbered(folder) if (folder / str(step) / sealing.MANIFEST).exists()]


def whole_steps(run: epath.PathLike) -> list[int]:
    """Returns the good steps of a run (all files are unchanged), in ascending order."""
    whole = []
    for step in steps(run):
        try:
            sealing.verify(checkpoints_folder(run) / str(step))
        except DamagedError as error:
            _log.warning(f"Skipped: {error}")
        else:
            whole.append(step)
    return whole


def latest_step(run: epath.PathLike, parts: Sequence[str] = ()) -> int | None:
    """Returns the newest good step of a run; see `latest_in`."""
    return latest_in(checkpoints_folder(run), parts)


def latest_in(folder: epath.Path, parts: Sequence[str] = ()) -> int | None:
    """Returns the newest good step in a folder of steps (all files are unchanged), or None.

    The function reads every file of `parts`; an empty sequence means all parts. The log names each
    incomplete or damaged step that the function skips.

    Raises:
      CheckpointError: if no existing checkpoint can be used, or the newest has another format
        version. A new run in the same folder would destroy these checkpoints.
    """
    skipped, lost = [], False
    for step in reversed(_numbered(folder)):
        try:
            read_content(folder / str(step))
            sealing.verify(folder / str(step), parts)
        except DamagedError as error:
            skipped.append(str(error))
            # On a disk, a save writes the manifest before it names the folder after the step. So a
            # local step folder without a manifest is damaged.
            lost |= sealing.is_local(folder) or not isinstance(error, UnsealedError)
            _log.warning(f"Skipped: {error}")
        else:
            if skipped:
                _log.warning(f"Step {step} is used instead.")
            return step
    if lost:
        raise CheckpointError(
            "\n".join(
                [f"{folder} holds no usable checkpoint:"]
                + [f"  {problem}" for problem in skipped]
                + ["Restore a checkpoint from a copy, or move all of them away to start a new run."]
            )
        )
    return None


def make_room(folder: epath.Path, step: int) -> bool:
    """Makes room for a new save of a step; returns False if a good checkpoint of it exists.

    The function deletes incomplete saves of this step, and renames a damaged checkpoint.
    """
    folder.mkdir(exist_ok=True)  # Without `parents`, a missing run folder is an error.
    final = folder / str(step)
    if final.exists() and (sealing.is_local(folder) or (final / sealing.MANIFEST).exists()):
        try:
            sealing.verify(final)
        except DamagedError as error:
            aside = _free_name(final)
            final.rename(aside)
            _log.warning(f"Renamed to {aside.name}: {error}")
        else:
            return False
    for path in folder.iterdir():
        if path == final or path.name.startswith(f"{step}{_SAVING}"):
            path.rmtree()
    return True


def work_folder(folder: epath.Path, step: int, attempt: int) -> epath.Path:
    """Returns the folder in which an attempt writes; in an object store, it is the final folder.

    Each local attempt has its own folder, because threads of a failed attempt may still write.
    """
    return folder / (f"{step}{_SAVING}-{attempt}" if sealing.is_local(folder) else str(step))


def commit(folder: epath.Path, work: epath.Path, step: int) -> None:
    """Renames a sealed folder to its final name; in an object store, it has this name already."""
    if sealing.is_local(folder):
        work.rename(folder / str(step))
        sealing.sync_names(folder)


def delete_old(folder: epath.Path, keep: int, keep_every: int) -> None:
    """Deletes all steps but the newest `keep` and multiples of `keep_every` (0 = no multiples).

    The function neither counts nor deletes a step with a missing file or a wrong file size.
    """
    whole = []
    for step in _numbered(folder):
        try:
            sealing.verify(folder / str(step), contents=False)
        except DamagedError:
            continue
        whole.append(step)
    for step in whole[:-keep]:
        if not keep_every or step % keep_every:
            delete(folder / str(step))


def tidy(folder: epath.Path) -> None:
    """Finishes interrupted deletions, and logs a warning for each interrupted save."""
    if not folder.exists():
        return
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_DELETED):
            path.rmtree()
        elif _SAVING in path.name:
            _log.warning(f"Not used: {path} is incomplete, because its save was cut off.")


def _numbered(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def delete(path: epath.Path) -> None:
    """Deletes a checkpoint; after an interruption, the rest does not look like a checkpoint."""
    if sealing.is_local(path):
        gone = path.parent / f"{path.name}{_DELETED}"
        path.rename(gone)
        gone.rmtree()
    else:
        (path / sealing.MANIFEST).unlink()
        path.rmtree()


def _free_name(path: epath.Path) -> epath.Path:
    number = 1
    while (aside := path.parent / f"{path.name}{_DAMAGED}{number}").exists():
        number += 1
    return aside
