"""Checks and prepares everything that a run needs, before anything compiles.

`config/rules.py` checks the rules that need neither files nor devices. The functions here check the
other rules. They raise a `ConfigError` with the field, its value, the rule and the remedy.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mobilellm_jax import checkpoint
from mobilellm_jax import config as config_lib
from mobilellm_jax.checkpoint import DataState
from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.data.loader import required_streams
from mobilellm_jax.data.mixture import Mixture, is_mixture, open_mixture
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, same_vocabulary
from mobilellm_jax.data.verification import verify_files
from mobilellm_jax.data.windows import count_targets, has_targets
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.evaluate.in_training import Evaluator, make_evaluator
from mobilellm_jax.model.on_device import settle as settle_for_device
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.open_model import open_model
from mobilellm_jax.plan.memory import shortage
from mobilellm_jax.processes import distributed
from mobilellm_jax.run_record import MAY_CHANGE
from mobilellm_jax.sharding import Rules, logical_rules, make_mesh
from mobilellm_jax.startup import xla_flags
from mobilellm_jax.storage import rundir
from mobilellm_jax.storage.outputs import BELONGS_TOGETHER, is_empty, own_folder
from mobilellm_jax.storage.user_path import user_path
from mobilellm_jax.train.profiler import ProfiledSteps
from mobilellm_jax.train.state import mesh_violations

_log = logging.getLogger(__name__)

_MANY_EPOCHS, _USEFUL_EPOCHS = 100, 10
LEARNING_RATE = frozenset(
    f"optimizer.{name}" for name in ("peak_lr", "schedule", "warmup_steps", "min_lr_ratio")
)
_DATA_SEC = 24 * 3600.0  # Longest wait for processes that prepare or read the data.


@dataclasses.dataclass(frozen=True)
class Ready:
    """Everything that a run needs, checked and ready for use."""

    config: Config  # The config without `auto`.
    resume_step: int | None  # Step of the newest checkpoint; None for a new run.
    before: Config | None  # Config of the run until now; None for a new run.
    mixture: Mixture
    tokenizer: Tokenizer
    mesh: Mesh
    rules: Rules
    start: DataState  # Position in the data at the start.
    params: Params | None  # Parameters from `train.init_from`; None if there are none to use.
    evaluator: Evaluator  # Scores tasks and a text during training.


def settle_run(
    config: Config,
    workdir: Path,
    profile: ProfiledSteps | None,
    *,
    change_learning_rate: bool = False,
) -> Ready:
    """Checks and prepares all that the run in `workdir` needs, and writes its config there.

    A `UserError` says what is missing or damaged, or which settings contradict each other. With
    `change_learning_rate`, a resumed run may change the settings in `LEARNING_RATE`.
    """
    with distributed.together("checking the run"):
        resume_step: int | None = distributed.from_first(
            "the latest checkpoint", lambda: checkpoint.latest_step(workdir)
        )
        before = None
        if resume_step is not None:
            before = config_lib.read_json(workdir / rundir.CONFIG)
        config = settle(config, workdir, resume_step, change_learning_rate)
        check_memory(config)
        if profile is not None:
            profile.check(resume_step or 0, config.train.steps)
        mixture, tokenizer = open_data(config)
        mesh, rules = check(config, mixture)
        ready = Ready(
            config=config,
            resume_step=resume_step,
            before=before,
            mixture=mixture,
            tokenizer=tokenizer,
            mesh=mesh,
            rules=rules,
            start=data_state(config, mixture, workdir, resume_step),
            params=_initial_params(config, tokenizer) if resume_step is None else None,
            evaluator=make_evaluator(config, tokenizer, mesh, rules),
        )
    if distributed.is_first():
        warn_of_epochs(config, mixture)
    with distributed.together("verifying the data", _DATA_SEC):
        verify(config, mixture)
    with distributed.together("starting the run folder"):
        if before is not None and distributed.is_first():
            _record_changes(workdir, before, ready)
        _record(config, tokenizer, workdir)
    return ready


def take_workdir(workdir: Path) -> None:
    """Makes the run folder if it is missing; raises a `UserError` if it holds something else."""
    names = (*BELONGS_TOGETHER, rundir.METRICS, rundir.SAMPLES, rundir.LOSS_PLOT, "sweep.json")
    real = own_folder("--workdir", workdir, "a run", rundir.is_run, names)
    real.mkdir(parents=True, exist_ok=True)


def check_same_run(
    workdir: Path, old: Config, new: Config, may_change: frozenset[str], remedy: str
) -> None:
    """Raises a ConfigError if `new` changes a field of the run in `workdir` that may not change."""
    changed = config_lib.changed_fields(old, new)
    if lines := _lines({name: pair for name, pair in changed.items() if name not in may_change}):
        raise ConfigError(
            f"workdir={str(workdir)!r} holds a run with another config:\n{lines}\n{remedy}"
        )


def _lines(different: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(
        f"  {name}: {theirs!r} there, {ours!r} here" for name, (theirs, ours) in different.items()
    )


def _record_changes(workdir: Path, before: Config, ready: Ready) -> None:
    """Appends the changed settings of a resumed run to its file of changes."""
    changed = config_lib.changed_fields(before, ready.config)
    if changed:
        record = {"step": ready.resume_step, **{name: list(pair) for name, pair in changed.items()}}
        with (workdir / rundir.CHANGES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def settle(
    config: Config, workdir: Path, resume_step: int | None, change_learning_rate: bool = False
) -> Config:
    """Returns the config without `auto`; raises if the run in `workdir` cannot resume with it."""
    device = jax.devices()[0]
    if resume_step is None:
        return settle_for_device(config, device)
    old = config_lib.read_json(workdir / rundir.CONFIG)
    if config.model.compute_dtype == "auto":
        config = config_lib.changed(config, {"model.compute_dtype": old.model.compute_dtype})
    config = settle_for_device(config, device)
    remedy = (
        "Use its values to resume it, or another --workdir. To start from its weights, set "
        f"--config.train.init_from={workdir}."
    )
    may_change = MAY_CHANGE
    if change_learning_rate:
        may_change |= LEARNING_RATE
    elif LEARNING_RATE & set(config_lib.changed_fields(old, config)):
        remedy = (
            "To resume with another learning rate, add --change_learning_rate. Otherwise, use the "
            f"values of the run, or another --workdir with --config.train.init_from={workdir}."
        )
    check_same_run(workdir, old, config, may_change, remedy)
    if not checkpoint.can_resume(workdir, resume_step):
        raise ConfigError(
            f"workdir={str(workdir)!r} holds a model without optimizer state (an import); train in "
            f"another --workdir with --config.train.init_from={workdir}."
        )
    if resume_step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is less than the {resume_step} steps that "
            f"workdir={str(workdir)!r} has already taken; raise it to go on."
        )
    return config


def open_data(config: Config) -> tuple[Mixture, Tokenizer]:
    """Opens `data.path` and its tokenizer; prepares a missing folder from `data.source` first.

    The vocabulary of the model must be at least as large as that of the tokenizer.
    """
    if not config.data.path:
        raise ConfigError("data.path is empty; name a folder that `mobilellm prepare` wrote.")
    distributed.from_first("preparing the data", lambda: _prepare(config), _DATA_SEC)
    mixture = open_mixture(config.data.path)
    tokenizer = load_tokenizer(mixture.tokenizer, ours=True)
    manifest = mixture.components[0].dataset.manifest
    if (tokenizer.vocab_size, tokenizer.eos_id) != (manifest.vocab_size, manifest.eos_id):
        raise UserError(
            f"{mixture.tokenizer.parent}: its tokens were made with {manifest.vocab_size} ids and "
            f"EOS {manifest.eos_id}, but its tokenizer has {tokenizer.vocab_size} ids and EOS "
            f"{tokenizer.eos_id}; prepare the data again."
        )
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} must be at least the vocabulary of the "
            f"data in data.path={config.data.path!r}, which is {tokenizer.vocab_size}; set "
            f"--config.model.vocab_size={tokenizer.vocab_size} or prepare the data again."
        )
    return mixture, tokenizer


def _prepare(config: Config) -> None:
    if is_mixture(config.data.path):
        return
    path = user_path("data.path", config.data.path)
    # A folder that is mounted into a container exists before anything is in it.
    if path.exists() and not (config.data.source and is_empty(path)):
        return
    if not config.data.source:
        raise MissingFileError(
            f"data.path={config.data.path!r} does not exist; make it with "
            f"`mobilellm prepare --source=... --output={config.data.path}`."
        )
    _log.info(f"Preparing {path} from {config.data.source}")
    prepare([config.data.source], path, vocab_size=config.model.vocab_size)


def _record(config: Config, tokenizer: Tokenizer, workdir: Path) -> None:
    """Writes config and tokenizer; raises if a process has another config or folder."""
    written: str = distributed.from_first(
        "writing the config", lambda: checkpoint.write_config(config, tokenizer, workdir)
    )
    if lines := _lines(config_lib.changed_fields(config_lib.from_json(written), config)):
        raise ConfigError(f"process 0 has another config:\n{lines}")
    path = workdir / rundir.CONFIG
    if not path.is_file() or path.read_text("utf-8") != written:
        raise ConfigError(
            f"workdir={str(workdir)!r} is not the folder in which process 0 writes; all "
            "processes need one shared folder."
        )


def data_state(
    config: Config, mixture: Mixture, workdir: Path, resume_step: int | None
) -> DataState:
    """Returns the position in the data; raises if process 0 or the saved run has other data."""
    found = mixture.fingerprint
    first: str = distributed.from_first("the data", lambda: found)
    if found != first:
        raise ConfigError(
            f"data.path={config.data.path!r} holds other data here (fingerprint {found}) than "
            f"for process 0 ({first}); copy the same folder to all hosts, or share one."
        )
    if resume_step is None:
        return DataState(next_sample=0, fingerprint=found)
    state = checkpoint.read_data_state(workdir, resume_step)
    if found != state.fingerprint:
        raise ConfigError(
            f"data.path={config.data.path!r} holds other data (fingerprint {found}) than the run "
            f"in workdir={str(workdir)!r} is trained on ({state.fingerprint}, at step "
            f"{resume_step}); use the same data in the same proportions, or train in another "
            f"--workdir with --config.train.init_from={workdir}."
        )
    return state


def verify(config: Config, mixture: Mixture) -> None:
    """Reads all data and compares checksums, if `data.verify` is set.

    Every process reads all data, because each host may have its own copy.
    """
    if config.data.verify:
        for dataset in mixture.datasets:
            verify_files(dataset)


def check(config: Config, mixture: Mixture) -> tuple[Mesh, Rules]:
    """Checks the rules that need data or devices; returns the mesh and its sharding rules."""
    violations = without_targets(config, mixture)
    mesh = make_mesh(config.mesh)
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    if config.train.deterministic and on_gpu and not xla_flags.is_deterministic():
        violations.append(
            "train.deterministic=True must be known before JAX starts; use `mobilellm train`, or "
            "set XLA_FLAGS=--xla_gpu_deterministic_ops=true before you import jax."
        )
    violations += mesh_violations(config, mesh)
    eval_every = config.train.eval_every
    if eval_every and not held_out_targets(config, mixture):
        violations.append(
            f"train.eval_every={eval_every} needs a validation split with targets, and "
            f"data.path={config.data.path!r} has none; prepare it with --validation_fraction "
            "greater than 0, or set --config.train.eval_every=0."
        )
    if violations:
        raise ConfigError("\n".join(violations))
    return mesh, logical_rules(config.model, mesh.shape)


def without_targets(config: Config, mixture: Mixture) -> list[str]:
    """Returns a message for each component of the training data that has no targets."""
    streams = zip(mixture.components, required_streams(mixture, TRAIN), strict=True)
    return [
        f"data.path={config.data.path!r}: no token of {component.name} is a target, so there is no "
        "loss. Loss masks or document borders (data.boundaries="
        f"{config.data.boundaries!r}) exclude all of them; prepare the data again with loss_mask 1 "
        "for the tokens to learn."
        for component, stream in streams
        if not has_targets(stream, config.data.boundaries)
    ]


def check_memory(config: Config) -> None:
    """Raises if a training step cannot fit the memory; warns if it may not fit."""
    try:
        missing = shortage(config, jax.devices())
    except ConfigError:  # The config does not fit the mesh. `check` reports this with other errors.
        return
    if missing is not None and missing.is_certain:
        raise ConfigError(f"The run does not fit into memory: {missing}")
    if missing is not None:
        _log.warning(f"The run may not fit into memory: {missing}")


def warn_of_epochs(config: Config, mixture: Mixture) -> None:
    """Warns if the run reads a part of its data absurdly often."""
    epochs = [
        float(config.tokens * c.share / max(1, c.counts(TRAIN).tokens)) for c in mixture.components
    ]
    if max(epochs) <= _MANY_EPOCHS:
        return
    often = mixture.components[int(np.argmax(epochs))]
    steps = max(1, int(config.train.steps * _USEFUL_EPOCHS / max(epochs)))
    remedy = f"--config.train.steps={steps}"
    if config.optimizer.warmup_steps >= steps:
        remedy += f" --config.optimizer.warmup_steps={steps // 10}"
    _log.warning(
        f"MANY EPOCHS: train.steps={config.train.steps} reads the {often.counts(TRAIN).tokens:,} "
        f"tokens of {often.name} {max(epochs):,.0f} times, and a model hardly learns from a text "
        f"after a few dozen times. {remedy} reads them about {_USEFUL_EPOCHS} times. Smaller "
        "batches (train.global_batch) make more steps of the same text."
    )


def held_out_targets(config: Config, mixture: Mixture) -> int:
    """Returns the number of targets (tokens with a loss) in the validation split."""
    held_out = [stream for c in mixture.components if (stream := c.stream(VALIDATION))]
    return sum(count_targets(stream, config.data.boundaries) for stream in held_out)


def _initial_params(config: Config, tokenizer: Tokenizer) -> Params | None:
    if not config.train.init_from:
        return None
    try:
        opened = open_model(config.train.init_from)
    except UserError as error:
        raise ConfigError(f"train.init_from={config.train.init_from!r}: {error}") from error
    theirs, ours = dataclasses.asdict(opened.config), dataclasses.asdict(config.model)
    free = (*config_lib.COMPUTATION, "max_seq_len")
    different: dict[str, tuple[Any, Any]] = {
        f"model.{name}": (theirs[name], value)
        for name, value in ours.items()
        if theirs[name] != value and name not in free
    }
    take = f"\nTo take the model from it, write --config.model={config.train.init_from}."
    remedy = take if different else ""
    if not same_vocabulary(opened.tokenizer, tokenizer):
        different["tokenizer"] = (str(opened.tokenizer.file), str(tokenizer.file))
    if different:
        raise ConfigError(
            f"train.init_from={config.train.init_from!r} is another model:\n"
            f"{_lines(different)}{remedy}"
        )
    return opened.params
