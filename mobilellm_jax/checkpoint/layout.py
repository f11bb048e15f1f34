"""What a step folder holds and says about itself."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import rundir, sealing, strict_json
from mobilellm_jax.train.state import TrainState

FORMAT_VERSION = 2
DATA_STATE_VERSION = 1  # of the order of samples too: another order is another version
PARAMS, OPTIMIZER, TOKENIZER = "params", "optimizer", "tokenizer"
MODEL_PARTS = (PARAMS, TOKENIZER)  # what a model is opened from

# Orbax writes where it is told to; what makes a folder complete is our manifest.
IN_PLACE = atomicity.CommitFileTemporaryPath

_SHOWN = 20  # names of each kind in a message about arrays


class CheckpointError(UserError):
    """A checkpoint cannot be read; the message names its folder and what is wrong."""


@dataclasses.dataclass(frozen=True)
class DataState:
    """Where a run stands in its data."""

    next_sample: int  # global sample index, over all hosts
    fingerprint: str  # of the data that the index is of


@dataclasses.dataclass(frozen=True)
class Content:
    """What the manifest of a step folder says, besides the files."""

    config: Mapping[str, Any]
    arrays: Mapping[str, str]  # name -> type and shape
    data: Mapping[str, Any] | None  # its fields belong to its version


def checkpoints_folder(run: epath.PathLike) -> epath.Path:
    """Returns the folder of a run's steps, absolute."""
    return epath.Path(run).absolute() / rundir.CHECKPOINTS


def step_folder(run: epath.PathLike, step: int) -> epath.Path:
    """Returns the folder of one step."""
    return checkpoints_folder(run) / str(step)


def trees_of(state: TrainState) -> dict[str, Any]:
    """Returns the two parts of a state that are stored apart, so that a model opens by itself."""
    rest = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {PARAMS: rest.pop("params"), OPTIMIZER: rest}


def arrays_of(trees: Mapping[str, Any]) -> dict[str, str]:
    """Returns {path: type and shape} of every array, such as float32[30,576,9,64]."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(trees))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }


def read_content(folder: epath.Path) -> Content:
    """Returns what the manifest of a step folder says.

    Its checksum tells damage; whoever made it may have meant anything.

    Raises:
      DamagedError: if the manifest is missing or damaged.
      CheckpointError: if the folder has another format version, or no checkpoint's content.
    """
    try:
        content = sealing.read_manifest(folder)
    except sealing.UnsealedError:
        if (folder / "run" / "metadata").exists():
            raise _other_version(folder, 1) from None
        raise
    if content.get("format_version") != FORMAT_VERSION:
        raise _other_version(folder, content.get("format_version"))
    try:
        return Content(
            config=strict_json.get(content, "config", Mapping[str, Any]),
            arrays=strict_json.get(content, "arrays", Mapping[str, str]),
            data=strict_json.get(content, "data", Mapping[str, Any], None),
        )
    except strict_json.JsonError as error:
        raise no_checkpoint(folder, error) from error


def no_checkpoint(folder: epath.Path, why: object) -> CheckpointError:
    """Returns the error for a folder that is sealed, but not by a release of this package."""
    return CheckpointError(
        f"{folder} is sealed, but no checkpoint of this program: {why} Use the file that the run "
        "wrote."
    )


def check_arrays(folder: epath.Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compares the arrays that a checkpoint holds with those that are wanted.

    Raises:
      CheckpointError: with three lists: only there, only here, different.
    """
    lists = {
        "only in the checkpoint": sorted(set(there) - set(here)),
        "only in this program": sorted(set(here) - set(there)),
        "different": [
            f"{name}: {there[name]} there, {here[name]} here"
            for name in sorted(set(there) & set(here))
            if there[name] != here[name]
        ],
    }
    if not any(lists.values()):
        return
    lines = [f"{folder} holds other arrays than this program wants for its config:"]
    for title, names in lists.items():
        lines.append(f"{title}:{'' if names else ' none'}")
        lines += [f"  {name}" for name in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append(f"  and {len(names) - _SHOWN} more")
    lines.append("Use the config and the release that wrote it.")
    raise CheckpointError("\n".join(lines))


def composite(parts: Iterable[str]) -> ocp.CompositeCheckpointHandler:
    """Returns what reads and writes `parts`, each in a folder of its name, where it is to stay."""
    options = ocp.CompositeOptions(temporary_path_class=IN_PLACE)
    return ocp.CompositeCheckpointHandler(*parts, composite_options=options)


def _other_version(folder: epath.Path, version: object) -> CheckpointError:
    return CheckpointError(
        f"{folder} has checkpoint format_version={strict_json.shown(version)}, and this program "
        f"reads {FORMAT_VERSION}; use the release that wrote it."
    )
