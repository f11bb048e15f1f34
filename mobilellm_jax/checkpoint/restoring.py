"""Reads checkpoints: only the model, or the whole state of a run."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from mobilellm_jax import config as config_lib
from mobilellm_jax.checkpoint.layout import (
    DATA_STATE_VERSION,
    IN_PLACE,
    MODEL_PARTS,
    OPTIMIZER,
    PARAMS,
    TOKENIZER,
    CheckpointError,
    DataState,
    arrays_of,
    check_arrays,
    composite,
    no_checkpoint,
    read_content,
    step_folder,
    trees_of,
)
from mobilellm_jax.config import Config
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.model.transformer import Params, init_params
from mobilellm_jax.storage import rundir, sealing, strict_json
from mobilellm_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class RestoredModel:
    """A model from a checkpoint: float32 parameters on the default device of the host."""

    config: Config
    params: Params
    tokenizer: Tokenizer
    step: int


def restore_model(run: epath.PathLike, step: int, *, verified: bool = False) -> RestoredModel:
    """Returns the model saved as `step` of a run, whole on one device.

    Args:
      run: the run folder.
      step: one of its steps.
      verified: `latest_step` has just compared the files with their checksums; otherwise this
        function compares them.

    Raises:
      DamagedError: if a file is missing or has changed; the message names all of them.
      CheckpointError: if the checkpoint has another format version or other arrays.
      ConfigError: if its config breaks a rule.
    """
    folder = step_folder(run, step)
    config = read_config(folder)
    if not verified:
        sealing.verify(folder, MODEL_PARTS)
    here = SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
    )
    params = _restore(folder, {PARAMS: abstract})[PARAMS]
    return RestoredModel(config, params, _tokenizer(folder), step)


def restore_state(run: epath.PathLike, step: int, abstract: TrainState) -> TrainState:
    """Returns the state saved as `step`, in the shardings of `abstract`.

    The function does not verify the files, because `latest_step` has verified them in process 0.

    Raises:
      CheckpointError: if the checkpoint holds other arrays than `abstract`.
    """
    restored = _restore(step_folder(run, step), trees_of(abstract))
    return TrainState(params=restored[PARAMS], **restored[OPTIMIZER])


def can_resume(run: epath.PathLike, step: int) -> bool:
    """Returns whether the step holds an optimizer state."""
    content = read_content(step_folder(run, step))
    return any(name.startswith(f"{OPTIMIZER}/") for name in content.arrays)


def read_config(folder: epath.PathLike) -> Config:
    """Returns the config in a step folder.

    Raises:
      DamagedError: if the folder is not a complete checkpoint.
      CheckpointError: if the folder has another format version.
    """
    return config_lib.from_json(json.dumps(read_content(epath.Path(folder)).config))


def read_data_state(run: epath.PathLike, step: int) -> DataState:
    """Returns the position of the run in its data after `step`, which only resuming needs.

    Raises:
      CheckpointError: if the step has no data state, or a data state of another version.
    """
    folder = step_folder(run, step)
    data = read_content(folder).data
    version = None if data is None else data.get("version")
    if version != DATA_STATE_VERSION:
        found = f"a data state of version {strict_json.shown(version)}"
        if data is None:
            found = "no data state"
        raise CheckpointError(
            f"{folder} has {found}, and this program resumes version {DATA_STATE_VERSION}, because "
            "the order of samples may differ; resume it with the release that wrote it, or start "
            "from its parameters in another --workdir with "
            f"--config.train.init_from={folder}."
        )
    try:
        state = DataState(
            next_sample=strict_json.get(data, "next_sample", int, name="data"),
            fingerprint=strict_json.get(data, "fingerprint", str, name="data"),
        )
    except strict_json.JsonError as error:
        raise no_checkpoint(folder, error) from error
    if state.next_sample < 0:
        raise no_checkpoint(folder, f"data.next_sample={state.next_sample} must not be negative.")
    return state


def _restore(folder: epath.Path, abstract: dict[str, Params]) -> dict[str, Params]:
    there = {
        name: kind
        for name, kind in read_content(folder).arrays.items()
        if name.split("/")[0] in abstract
    }
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
    return load_tokenizer(found)
