"""The step folders of a run: which there are, which is the newest good one, which are kept.

`STEP/` is a checkpoint. Beside it there may be `STEP.saving-N/`, a save under way or one that was
cut off (on an object store, which cannot rename, that is `STEP/` without a manifest), and
`STEP.damaged-N/`, which was in the way when its step was saved again. Nothing here deletes those.
"""

import sys
from collections.abc import Callable, Sequence

from etils import epath

from mobilellm_jax.checkpoint.layout import CheckpointError, checkpoints_folder, read_content
from mobilellm_jax.storage import sealing
from mobilellm_jax.storage.sealing import DamagedError, UnsealedError

Report = Callable[[str], None]
SAVING = ".saving"
_DELETED = ".deleted"
_DAMAGED = ".damaged-"


def to_stderr(text: str) -> None:
    """Prints a line that must be seen."""
    print(f"CHECKPOINT: {text}", file=sys.stderr, flush=True)


def steps(run: epath.PathLike) -> list[int]:
    """Returns the steps of a run that were completed, ascending; damage since is not looked for."""
    folder = checkpoints_folder(run)
    return [step for step in _numbered(folder) if (folder / str(step) / sealing.MANIFEST).exists()]


def whole_steps(run: epath.PathLike, report: Report = to_stderr) -> list[int]:
    """Returns the steps of a run whose files are those that were saved, ascending."""
    whole = []
    for step in steps(run):
        try:
            sealing.verify(checkpoints_folder(run) / str(step))
        except DamagedError as error:
            report(f"skipped: {error}")
        else:
            whole.append(step)
    return whole


def latest_step(
    run: epath.PathLike, parts: Sequence[str] = (), report: Report = to_stderr
) -> int | None:
    """Returns the newest step of a run whose files are those that were saved, or None.

    Every file is read. What is incomplete or damaged is skipped and reported, each with its name
    and what is wrong.

    Args:
      run: the run folder.
      parts: the parts of a checkpoint that matter; none given, all.
      report: gets one line for each step skipped.

    Raises:
      CheckpointError: if there are checkpoints and none can be used, or the newest is of another
        format version. To start anew over them would destroy what they may still be good for.
    """
    folder, skipped, lost = checkpoints_folder(run), [], False
    for step in reversed(_numbered(folder)):
        try:
            read_content(folder / str(step))
            sealing.verify(folder / str(step), parts)
        except DamagedError as error:
            skipped.append(str(error))
            # Where there are renames, a step gets its name with its manifest in it.
            lost |= sealing.is_local(folder) or not isinstance(error, UnsealedError)
            report(f"skipped: {error}")
        else:
            if skipped:
                report(f"step {step} is used instead.")
            return step
    if lost:
        raise CheckpointError(
            "\n".join(
                [f"{folder} holds no checkpoint that can be used:"]
                + [f"  {problem}" for problem in skipped]
                + ["Restore one from a copy, or move them away to start anew."]
            )
        )
    return None


def make_room(folder: epath.Path, step: int, report: Report) -> bool:
    """Prepares the place for a step; returns False if it is there already, and whole.

    What a save of the same step left behind when it was cut off goes. What is there under the
    step's own name and is no longer what was saved is put aside.
    """
    folder.mkdir(exist_ok=True)  # not its parents: a run folder that has gone is an error
    final = folder / str(step)
    if final.exists() and (sealing.is_local(folder) or (final / sealing.MANIFEST).exists()):
        try:
            sealing.verify(final)
        except DamagedError as error:
            aside = _free_name(final)
            final.rename(aside)
            report(f"put aside as {aside.name}: {error}")
        else:
            return False
    for path in folder.iterdir():
        if path == final or path.name.startswith(f"{step}{SAVING}"):
            path.rmtree()
    return True


def work_folder(folder: epath.Path, step: int, attempt: int) -> epath.Path:
    """Returns where a step is written: under another name where renaming is possible.

    One of its own for each attempt, because threads of one that failed may still write.
    """
    return folder / (f"{step}{SAVING}-{attempt}" if sealing.is_local(folder) else str(step))


def commit(folder: epath.Path, work: epath.Path, step: int) -> None:
    """Gives a sealed folder its final name, where it has another."""
    if sealing.is_local(folder):
        work.rename(folder / str(step))
        sealing.sync_names(folder)


def delete_old(folder: epath.Path, keep: int, keep_every: int) -> None:
    """Deletes all steps but the newest `keep` and the multiples of `keep_every` (0 = none).

    Only a step that is whole as far as its sizes tell counts, and only such a one is deleted.
    """
    whole = []
    for step in _numbered(folder):
        try:
            sealing.check_sizes(folder / str(step))
        except DamagedError:
            continue
        whole.append(step)
    for step in whole[:-keep]:
        if not keep_every or step % keep_every:
            delete(folder / str(step))


def tidy(folder: epath.Path, report: Report) -> None:
    """Finishes deletions that were cut off, and reports saves that were."""
    if not folder.exists():
        return
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_DELETED):
            path.rmtree()
        elif SAVING in path.name:
            report(f"not used: {path} is incomplete, its save was cut off.")


def _numbered(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def delete(path: epath.Path) -> None:
    """Deletes a checkpoint so that what a kill leaves over is not taken for a damaged one."""
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
