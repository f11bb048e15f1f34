"""The contents of a step folder and of its manifest."""

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
DATA_STATE_VERSION = 1  # a new order of samples needs a new version
PARAMS, OPTIMIZER, TOKENIZER = "params", "optimizer", "tokenizer"
MODEL_PARTS = (PARAMS, TOKENIZER)  # parts that opening a model reads

# Orbax writes into the final folder, because the manifest of this package makes it complete.
IN_PLACE = atomicity.CommitFileTemporaryPath

_SHOWN = 20  # names of each kind in a message about arrays


class CheckpointError(UserError):
    """A checkpoint cannot be read; the message names its folder and the reason."""


@dataclasses.dataclass(frozen=True)
class DataState:
    """The position of a run in its data."""

    next_sample: int  # global index over all hosts
    fingerprint: str  # checksum of the data


@dataclasses.dataclass(frozen=True)
class Content:
    """The manifest of a step folder, without its list of files."""

    config: Mapping[str, Any]
    arrays: Mapping[str, str]  # name -> type and shape
    data: Mapping[str, Any] | None  # the fields depend on its version


def checkpoints_folder(run: epath.PathLike) -> epath.Path:
    """Returns the folder of a run's steps, absolute."""
    return epath.Path(run).absolute() / rundir.CHECKPOINTS


def step_folder(run: epath.PathLike, step: int) -> epath.Path:
    """Returns the folder of one step."""
    return checkpoints_folder(run) / str(step)


def trees_of(state: TrainState) -> dict[str, Any]:
    """Splits a state into parameters and the rest, which are stored in separate folders."""
    rest = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {PARAMS: rest.pop("params"), OPTIMIZER: rest}


def arrays_of(trees: Mapping[str, Any]) -> dict[str, str]:
    """Returns {path: type and shape} of all arrays; an example is float32[30,576,9,64]."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(trees))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }


def read_content(folder: epath.Path) -> Content:
    """Returns the content of the manifest of a step folder.

    The checksum finds damage. The types of the fields are checked as well, because another program
    may have written the manifest.

    Raises:
      DamagedError: if the manifest is missing or damaged.
      CheckpointError: if the folder has another format version, or fields are wrong.
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
    """Returns the error for a sealed folder that is not a checkpoint of this package."""
    return CheckpointError(
        f"{folder} is sealed, but it is not a checkpoint of this program: {why} Use the folder "
        "that the run wrote."
    )


def check_arrays(folder: epath.Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compares the arrays of a checkpoint (`there`) with the arrays of this program (`here`).

    Raises:
      CheckpointError: with three lists: only in the checkpoint, only in this program, different.
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
    lines = [f"{folder} holds other arrays than this program needs for the config:"]
    for title, names in lists.items():
        lines.append(f"{title}:{'' if names else ' none'}")
        lines += [f"  {name}" for name in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append(f"  and {len(names) - _SHOWN} more")
    lines.append("Use the config and the release that wrote the checkpoint.")
    raise CheckpointError("\n".join(lines))


def composite(parts: Iterable[str]) -> ocp.CompositeCheckpointHandler:
    """Returns Orbax's handler that keeps each of `parts` in a folder of this name."""
    options = ocp.CompositeOptions(temporary_path_class=IN_PLACE)
    return ocp.CompositeCheckpointHandler(*parts, composite_options=options)


def _other_version(folder: epath.Path, version: object) -> CheckpointError:
    return CheckpointError(
        f"{folder} has checkpoint format_version={strict_json.shown(version)}, and this program "
        f"reads {FORMAT_VERSION}; use the release that wrote the checkpoint."
    )
