"""Checkpoints: what a run needs to go on, and what anything else needs to use the model.

`RUN/checkpoints/STEP/` is written by Orbax and takes its name only when complete. It holds

- `params/`: the float32 parameters,
- `optimizer/`: optimizer state, step, PRNG key, count of bad steps,
- `run/`: format version, resolved config, data state (which data, and the next sample of it),
- `tokenizer/`: the tokenizer's file,

so a step folder stands alone, and evaluating or exporting reads the parameters only.
"""

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_manager import CheckpointManagerOptions

from mobilellm_jax import config as config_lib
from mobilellm_jax import rundir
from mobilellm_jax.config import Config
from mobilellm_jax.data.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from mobilellm_jax.model.transformer import Params, init_params
from mobilellm_jax.train.state import TrainState

FORMAT_VERSION = 1
DATA_STATE_VERSION = 1  # of the order of samples too: another order is another version
_ITEMS = ("params", "optimizer", "run", "tokenizer")


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names its folder and what is wrong."""


class _TokenizerHandler(ocp.CheckpointHandler):  # type: ignore[misc]  # Orbax has no types
    """Copies a tokenizer file into the checkpoint, so that it commits with the rest."""

    def save(self, directory: epath.Path, args: "_SaveTokenizer") -> None:
        if jax.process_index() == 0:
            copy_tokenizer(args.tokenizer, Path(directory))

    def restore(self, directory: epath.Path, args: "_RestoreTokenizer | None" = None) -> Tokenizer:
        del args
        return load_tokenizer(_tokenizer_in(Path(directory)))


@ocp.args.register_with_handler(_TokenizerHandler, for_save=True)
@dataclasses.dataclass
class _SaveTokenizer(ocp.args.CheckpointArgs):  # type: ignore[misc]  # Orbax has no types
    tokenizer: Tokenizer


@ocp.args.register_with_handler(_TokenizerHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreTokenizer(ocp.args.CheckpointArgs):  # type: ignore[misc]  # Orbax has no types
    pass


@dataclasses.dataclass(frozen=True)
class DataState:
    """Where a run stands in its data."""

    next_sample: int  # global sample index, over all hosts
    fingerprint: str  # of the data that the index is of


@dataclasses.dataclass(frozen=True)
class RestoredModel:
    """A model as a checkpoint holds it: float32 parameters on the host's default device."""

    config: Config
    params: Params
    tokenizer: Tokenizer
    step: int


class CheckpointWriter:
    """Saves a run's states without holding up the step, and keeps the newest few."""

    def __init__(self, run: Path, config: Config, tokenizer: Tokenizer) -> None:
        train = config.train
        self._run, self._config, self._tokenizer = run, config, tokenizer
        self._manager = ocp.CheckpointManager(
            (run / rundir.CHECKPOINTS).absolute(),
            options=CheckpointManagerOptions(
                max_to_keep=train.keep_checkpoints,
                keep_period=train.keep_every or None,
                enable_async_checkpointing=True,
            ),
            item_names=_ITEMS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()  # waits for saves under way

    def save(self, step: int, state: TrainState, data: DataState) -> None:
        """Starts saving `state` as `step`; a step that is already there is left as it is."""
        if step in self._manager.all_steps():
            return
        run = {
            "format_version": FORMAT_VERSION,
            "data": {"version": DATA_STATE_VERSION, **dataclasses.asdict(data)},
            "config": dataclasses.asdict(self._config),
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_without_params(state)),
                run=ocp.args.JsonSave(run),
                tokenizer=_SaveTokenizer(self._tokenizer),
            ),
        )

    def wait(self) -> None:
        """Waits until saves under way are complete, and raises what went wrong with one."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def forget_after(self, step: int) -> None:
        """Removes what was saved after `step`, since the run takes these steps again."""
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state saved as `step`, in the shardings of `abstract`."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                optimizer=ocp.args.StandardRestore(_without_params(abstract)),
            ),
        )
        rest = restored["optimizer"]
        return TrainState(params=restored["params"], **rest)


def save_model(run: Path, config: Config, params: Params, tokenizer: Tokenizer) -> None:
    """Writes a run folder around parameters from elsewhere, as its step 0.

    It evaluates, generates and exports like any run, and `train.init_from` starts from it. It has
    no optimizer state, so `train` on the folder itself does not resume it.
    """
    run.mkdir(parents=True, exist_ok=True)
    rundir.write_whole(run / rundir.CONFIG, config_lib.to_json(config))
    copy_tokenizer(tokenizer, run)
    content = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
    }
    with ocp.CheckpointManager(
        (run / rundir.CHECKPOINTS).absolute(), item_names=("params", "run", "tokenizer")
    ) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(jax.tree.map(np.asarray, params)),
                run=ocp.args.JsonSave(content),
                tokenizer=_SaveTokenizer(tokenizer),
            ),
        )


def steps(run: Path) -> list[int]:
    """Returns the complete steps of a run, ascending."""
    folder = run / rundir.CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())


def latest_step(run: Path) -> int | None:
    """Returns the newest complete step of a run, or None."""
    return max(steps(run), default=None)


def can_resume(run: Path, step: int) -> bool:
    """Returns whether the step holds an optimizer state besides the parameters."""
    return (run / rundir.CHECKPOINTS / str(step) / "optimizer").is_dir()


def restore_model(run: Path, step: int) -> RestoredModel:
    """Returns the model saved as `step` of a run, whole on one device.

    Raises:
      CheckpointError: if it was written by another format version, or is not a checkpoint.
      ConfigError: if its config no longer obeys the rules.
    """
    folder = run / rundir.CHECKPOINTS / str(step)
    config = read_config(folder)
    tokenizer = load_tokenizer(_tokenizer_in(folder / "tokenizer"))
    here = SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params")) as reader:
        restore = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        params = reader.restore(folder.absolute(), args=restore)["params"]
    return RestoredModel(config, params, tokenizer, step)


def read_config(folder: Path) -> Config:
    """Returns the config in a step folder.

    Raises:
      CheckpointError: if there is none, or the folder has another format version.
    """
    return config_lib.from_json(json.dumps(_read_run(folder)["config"]))


def read_data_state(run: Path, step: int) -> DataState:
    """Returns where the run stood in its data after `step`; only resuming needs it.

    Raises:
      CheckpointError: if the step has none, or one of another version.
    """
    folder = run / rundir.CHECKPOINTS / str(step)
    data = _read_run(folder).get("data")
    if data is None or data["version"] != DATA_STATE_VERSION:
        found = "no data state" if data is None else f"a data state of version {data['version']}"
        raise CheckpointError(
            f"{folder} has {found}, and this program resumes version {DATA_STATE_VERSION}, because "
            "the order of samples may differ; resume it with the release that wrote it, or start "
            "from its parameters in another --workdir with "
            f"--config.train.init_from={folder}."
        )
    return DataState(next_sample=data["next_sample"], fingerprint=data["fingerprint"])


def _read_run(folder: Path) -> dict[str, Any]:
    """Returns what a step folder says about its run.

    Raises:
      CheckpointError: if there is none, or the folder has another format version.
    """
    path = folder / "run" / "metadata"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {path.relative_to(folder)}."
        )
    run: dict[str, Any] = json.loads(path.read_text("utf-8"))
    version = run.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format_version={version}, and this program reads "
            f"{FORMAT_VERSION}; use the release that wrote it."
        )
    return run


def _tokenizer_in(folder: Path) -> Path:
    file = rundir.tokenizer_file(folder)
    if file is None:
        raise CheckpointError(f"{folder} holds none of {', '.join(rundir.TOKENIZER_FILES)}.")
    return file


def _without_params(state: TrainState) -> dict[str, Any]:
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del fields["params"]
    return fields
