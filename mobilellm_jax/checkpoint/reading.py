"""Defines the content of a step folder; reads only its model, or the complete state of a run."""

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.path import atomicity

from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.finite import non_finite, refuse_non_finite
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.transformer import Params, param_shapes
from mobilellm_jax.storage import rundir, sealing, strict_json
from mobilellm_jax.train.state import TrainState

FORMAT_VERSION = 2
DATA_STATE_VERSION = 1  # A new order of samples needs a new version.
PARAMS, OPTIMIZER, TOKENIZER = "params", "optimizer", "tokenizer"
MODEL_PARTS = (PARAMS, TOKENIZER)  # The parts that a model needs.

# Orbax needs no temporary folder, because only a manifest of this package completes a folder.
IN_PLACE = atomicity.CommitFileTemporaryPath

_SHOWN = 20  # Largest number of names per list in a message about arrays.


class CheckpointError(UserError):
    """A checkpoint cannot be read; the message names its folder and the reason."""


@dataclasses.dataclass(frozen=True)
class DataState:
    """The position of a run in its data."""

    next_sample: int  # Index of the next sample, counted over all processes.
    fingerprint: str  # Checksum of the data.


@dataclasses.dataclass(frozen=True)
class Content:
    """Describes a step. The manifest of the step folder holds this and a list of the files."""

    config: Mapping[str, Any]
    arrays: Mapping[str, str]  # Maps the name of an array to its type and shape.
    data: Mapping[str, Any] | None  # A `DataState` and its version, or None.
    step: int | None  # Completed steps; None in folders that older releases wrote.


def checkpoints_folder(run: epath.PathLike) -> epath.Path:
    """Returns the absolute path of the folder that holds the steps of a run."""
    return epath.Path(run).absolute() / rundir.CHECKPOINTS


def step_folder(run: epath.PathLike, step: int) -> epath.Path:
    """Returns the folder of one step."""
    return checkpoints_folder(run) / str(step)


def trees_of(state: TrainState) -> dict[str, Any]:
    """Splits a state into parameters and the rest; checkpoints store them in two folders."""
    rest = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {PARAMS: rest.pop("params"), OPTIMIZER: rest}


def arrays_of(trees: Mapping[str, Any]) -> dict[str, str]:
    """Returns {path: type and shape} for all arrays, for example float32[30,576,9,64]."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(trees))
    return {_name(keys): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for keys, leaf in leaves}


def _name(keys: Any) -> str:
    """Returns the name of an array from its keys in a tree."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def read_content(folder: epath.Path) -> Content:
    """Returns the content of the manifest of a step folder.

    Another program may have written the manifest, so the function also checks the field types.

    Raises:
      DamagedError: if the manifest is missing or damaged.
      CheckpointError: if the folder has another format version, or wrong fields.
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
            step=strict_json.get(content, "step", int, None),
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
    """Raises if the arrays of a checkpoint (`there`) and of this program (`here`) differ."""
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
    """Returns an Orbax handler that stores each part in a folder with the name of the part."""
    options = ocp.CompositeOptions(temporary_path_class=IN_PLACE)
    return ocp.CompositeCheckpointHandler(*parts, composite_options=options)


def is_step_folder(folder: Path) -> bool:
    """Returns whether a folder is a step of a run or a copy of one; the step may be damaged."""
    is_copy = (folder / PARAMS).is_dir() and (folder / TOKENIZER).is_dir()
    return is_copy or _is_in_run(folder.resolve())


def restore_model(run: epath.PathLike, step: int) -> OpenedModel:
    """Returns the model that a run saved as `step`; raises as `restore_step` does."""
    return restore_step(step_folder(run, step))


def restore_step(path: epath.PathLike, *, verified: bool = False) -> OpenedModel:
    """Returns the model in a step folder, which may be a copy.

    Its float32 parameters are on the first device of the process.

    The function compares checksums, unless `verified` says that `latest_step` has just done so.

    Raises:
      DamagedError: if a file is missing or has changed; the message names all of them.
      CheckpointError: if the checkpoint has another format version or other arrays.
      ConfigError: if the config of the checkpoint breaks a rule.
      UserError: if a parameter is not finite.
    """
    folder = epath.Path(path).absolute()
    content = read_content(folder)
    config = config_lib.from_object(content.config)
    if not verified:
        sealing.verify(folder, MODEL_PARTS)
    here = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: leaf.update(sharding=here), param_shapes(config.model))
    params = _restore(folder, {PARAMS: abstract})[PARAMS]
    bad: list[str] = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        bad += non_finite(_name(keys), np.asarray(leaf))
    refuse_non_finite(folder, bad)
    step = int(folder.name) if _is_in_run(folder) else content.step
    tokenizer = _tokenizer(folder)
    return OpenedModel(config.model, params, tokenizer, str(folder), run_config=config, step=step)


def restore_state(run: epath.PathLike, step: int, abstract: TrainState) -> TrainState:
    """Returns the state saved as `step`; `abstract` gives its shapes, types and shardings.

    The function does not verify the files, because `latest_step` has verified them in process 0.
    """
    restored = _restore(step_folder(run, step), trees_of(abstract))
    return TrainState(params=restored[PARAMS], **restored[OPTIMIZER])


def can_resume(run: epath.PathLike, step: int) -> bool:
    """Returns whether a step holds an optimizer state, which training needs to resume."""
    content = read_content(step_folder(run, step))
    return any(name.startswith(f"{OPTIMIZER}/") for name in content.arrays)


def read_config(folder: epath.PathLike) -> Config:
    """Returns the config in a step folder; raises as `read_content` does."""
    return config_lib.from_object(read_content(epath.Path(folder)).config)


def read_data_state(run: epath.PathLike, step: int) -> DataState:
    """Returns the position of a run in its data after `step`; a resumed run starts there."""
    folder = step_folder(run, step)
    data = read_content(folder).data
    if data is None or data.get("version") != DATA_STATE_VERSION:
        found = "no data state"
        if data is not None:
            found = f"a data state of version {strict_json.shown(data.get('version'))}"
        raise CheckpointError(
            f"{folder} has {found}, and this program resumes version {DATA_STATE_VERSION}, because "
            "the order of samples may differ; resume it with the release that wrote it, or start "
            "from its parameters in another --workdir with "
            f"--config.train.init_from={folder}."
        )
    try:
        fields = {name: value for name, value in data.items() if name != "version"}
        state: DataState = strict_json.as_type(fields, DataState, "data")
    except strict_json.JsonError as error:
        raise no_checkpoint(folder, error) from error
    if state.next_sample < 0:
        raise no_checkpoint(folder, f"data.next_sample={state.next_sample} must not be negative.")
    return state


def _is_in_run(folder: Path | epath.Path) -> bool:
    """Returns whether the path is RUN/checkpoints/STEP, so that its name is the step."""
    return folder.parent.name == rundir.CHECKPOINTS and folder.name.isdecimal()


def _restore(folder: epath.Path, abstract: dict[str, Params]) -> dict[str, Params]:
    arrays = read_content(folder).arrays
    there = {name: kind for name, kind in arrays.items() if name.split("/")[0] in abstract}
    check_arrays(folder, there, arrays_of(abstract))
    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    with ocp.Checkpointer(composite(abstract), temporary_path_class=IN_PLACE) as reader:
        restored = reader.restore(folder, args=ocp.args.Composite(**items))
    return {name: restored[name] for name in abstract}


def _tokenizer(folder: epath.Path) -> Tokenizer:
    place = folder / TOKENIZER
    if sealing.is_local(folder):
        local = Path(place)
    else:  # a local copy that stays until this process ends
        local = Path(tempfile.mkdtemp(prefix="mobilellm-tokenizer-"))
        for file in place.iterdir():
            (local / file.name).write_bytes(file.read_bytes())
    found = rundir.tokenizer_file(local)
    if found is None:
        raise CheckpointError(
            f"{place} holds no tokenizer ({' or '.join(rundir.TOKENIZER_FILES)})."
        )
    return load_tokenizer(found, ours=True)


def _other_version(folder: epath.Path, version: object) -> CheckpointError:
    return CheckpointError(
        f"{folder} has checkpoint format_version={strict_json.shown(version)}, and this program "
        f"reads {FORMAT_VERSION}; use the release that wrote the checkpoint."
    )
