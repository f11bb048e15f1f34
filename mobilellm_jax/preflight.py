"""What is checked before a run computes anything, where files or devices have a say.

Rules that need neither are in `config.py`. Every function here raises `ConfigError` with the field,
its value, the rule and the remedy, before anything compiles.
"""

import dataclasses
import functools
import sys
import tempfile
from pathlib import Path

import jax
from jax.sharding import Mesh

from mobilellm_jax import checkpoint
from mobilellm_jax import config as config_lib
from mobilellm_jax.checkpoint import DataState
from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.data.loader import required_streams
from mobilellm_jax.data.mixture import Mixture, is_mixture, open_mixture
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION
from mobilellm_jax.data.tokenizers.opening import copy_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.verification import verify_files
from mobilellm_jax.data.windows import count_targets
from mobilellm_jax.errors import MissingFileError
from mobilellm_jax.model.on_device import device_violations, resolve_attention
from mobilellm_jax.model.precision import resolve_compute_dtype
from mobilellm_jax.processes import distributed
from mobilellm_jax.sharding import Rules, batch_violations, logical_rules, make_mesh
from mobilellm_jax.startup import xla_flags
from mobilellm_jax.storage import rundir

VERIFY_SEC = 24 * 3600.0  # that processes wait for one another to read the data
_PREPARE_SEC = 24 * 3600.0  # that the other processes wait while process 0 prepares data

# What may differ from the run that a folder holds: length, rhythm, and how the same numbers are
# computed. Anything else would make the record of the run a lie.
MAY_CHANGE = frozenset(
    {
        *("train.steps", "train.log_every", "train.eval_every", "train.eval_batches"),
        *("train.checkpoint_every", "train.keep_checkpoints", "train.keep_every"),
        *("train.max_bad_steps", "train.accumulation_steps", "train.loss_chunk"),
        *("train.spike_factor", "train.deterministic"),
        *("evaluate.every", "evaluate.samples", "model.attention", "model.remat"),
        *("evaluate.tasks", "evaluate.limit", "evaluate.data_dir", "evaluate.text"),
        "model.scan_unroll",
        *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "mesh.dcn_data"),
        # The same tokens in another place; `data_state` compares.
        *("data.path", "data.source", "data.verify"),
    }
)


def local_workdir(workdir: str) -> Path:
    """Returns the run folder; the records in it are appended to, which object stores cannot do.

    Raises:
      ConfigError: for a URL. As a path it would be a new folder on this machine.
    """
    if "://" in workdir:
        raise ConfigError(
            f"workdir={workdir!r} is a URL, and a run appends to files and locks its folder, which "
            "object stores cannot do; mount the bucket (gcsfuse, mount-s3, JuiceFS) and give the "
            "path, or another file system that all processes share."
        )
    return Path(workdir)


def check_writable(workdir: Path) -> None:
    """Makes the folder if it is missing and tries to write in it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r} cannot be written: {error.strerror}; choose another "
            "--workdir or change its permissions."
        ) from error


def settle(config: Config, workdir: Path, resume_step: int | None) -> Config:
    """Resolves "auto" values, and compares with the config of a run that is already there.

    Args:
      config: as asked for.
      workdir: of the run.
      resume_step: newest checkpoint in `workdir`, or None for a fresh run.
    """
    device = jax.devices()[0]
    if resume_step is None:
        config = dataclasses.replace(config, model=resolve_compute_dtype(config.model))
        return resolve_attention(config, device)
    old = config_lib.read_json(workdir / rundir.CONFIG)
    if config.model.compute_dtype == "auto":
        model = dataclasses.replace(config.model, compute_dtype=old.model.compute_dtype)
        config = dataclasses.replace(config, model=model)
    config = resolve_attention(config, device)
    changed = config_lib.changed_fields(old, config)
    refused = {name: change for name, change in changed.items() if name not in MAY_CHANGE}
    if refused:
        lines = [f"  {name}: {was!r} there, {now!r} here" for name, (was, now) in refused.items()]
        raise ConfigError(
            f"workdir={str(workdir)!r} holds a run with another config:\n" + "\n".join(lines) + "\n"
            "Use its values to resume it, or another --workdir; to start from its weights, set "
            f"--config.train.init_from={workdir}."
        )
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


def open_or_prepare(config: Config) -> Mixture:
    """Opens `data.path`, preparing it from `data.source` first if it is one folder and missing.

    Raises:
      ConfigError: if there is no path, or it is no mixture that can be.
      MissingFileError: if it is missing and there is no source.
    """
    if not config.data.path:
        raise ConfigError("data.path is empty; name a folder that `mobilellm prepare` wrote.")
    path = Path(config.data.path)
    distributed.from_first("preparing the data", lambda: _prepare(config, path), _PREPARE_SEC)
    return open_mixture(config.data.path)


def _prepare(config: Config, path: Path) -> None:
    if path.exists() or is_mixture(config.data.path):
        return
    if not config.data.source:
        raise MissingFileError(
            f"data.path={config.data.path!r} does not exist; make it with "
            f"`mobilellm prepare --source=... --output={config.data.path}`."
        )
    print(f"Preparing {path} from {config.data.source}", file=sys.stderr, flush=True)
    prepare(
        [config.data.source],
        path,
        vocab_size=config.model.vocab_size,
        report=functools.partial(print, file=sys.stderr, flush=True),
    )


def record(config: Config, tokenizer: Tokenizer, workdir: Path) -> None:
    """Writes config and tokenizer into the run folder, and checks that all processes mean it.

    Raises:
      ConfigError: if this process was given another config than process 0, or another folder.
    """

    def write() -> str:
        text = config_lib.to_json(config)
        rundir.write_whole(workdir / rundir.CONFIG, text)
        copy_tokenizer(tokenizer, workdir)
        return text

    written: str = distributed.from_first("writing the config", write)
    changed = config_lib.changed_fields(config_lib.from_json(written), config)
    if changed:
        lines = [f"  {name}: {was!r} there, {now!r} here" for name, (was, now) in changed.items()]
        raise ConfigError("another config than that of process 0:\n" + "\n".join(lines))
    path = workdir / rundir.CONFIG
    if not path.is_file() or path.read_text("utf-8") != written:
        raise ConfigError(
            f"workdir={str(workdir)!r} is not the folder that process 0 writes in; all processes "
            "need one that they share."
        )


def data_state(
    config: Config, mixture: Mixture, workdir: Path, resume_step: int | None
) -> DataState:
    """Returns where in its data the run goes on.

    Raises:
      ConfigError: if the data is not that of process 0, or not that of the run in `workdir`.
      CheckpointError: if the checkpoint's data state is of another version.
    """
    found = mixture.fingerprint
    first: str = distributed.from_first("the data", lambda: found)
    if found != first:
        raise ConfigError(
            f"data.path={config.data.path!r} holds other data here (fingerprint {found}) than for "
            f"process 0 ({first}); copy the same folder to all hosts, or share one."
        )
    if resume_step is None:
        return DataState(next_sample=0, fingerprint=found)
    state = checkpoint.read_data_state(workdir, resume_step)
    if found != state.fingerprint:
        raise ConfigError(
            f"data.path={config.data.path!r} holds other data (fingerprint {found}) than the run "
            f"in workdir={str(workdir)!r} is trained on ({state.fingerprint}, at step "
            f"{resume_step}); give it the same data, in the same proportions, or train in another "
            f"--workdir with --config.train.init_from={workdir}."
        )
    return state


def verify(config: Config, mixture: Mixture) -> None:
    """Reads all data for damage, if `data.verify` says so.

    Every process reads all of it: hosts may have copies of their own.

    Raises:
      UserError: naming the first damaged file.
    """
    if config.data.verify:
        for dataset in mixture.datasets:
            verify_files(dataset)


def check(config: Config, mixture: Mixture, tokenizer: Tokenizer) -> tuple[Mesh, Rules]:
    """Checks every rule that needs files or devices; returns the mesh and its sharding rules.

    Raises:
      ConfigError: listing what does not fit.
      UserError: if there is nothing to train on.
    """
    required_streams(mixture, TRAIN)
    violations = []
    if config.model.vocab_size != tokenizer.vocab_size:
        violations.append(
            f"model.vocab_size={config.model.vocab_size} must equal the vocabulary of the data in "
            f"data.path={config.data.path!r}, which is {tokenizer.vocab_size}; set "
            f"--config.model.vocab_size={tokenizer.vocab_size} or prepare the data anew."
        )
    mesh = make_mesh(config.mesh)
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    if config.train.deterministic and on_gpu and not xla_flags.is_deterministic():
        violations.append(
            "train.deterministic=True must be known before JAX starts; `mobilellm train` sees to "
            "that, elsewhere set XLA_FLAGS=--xla_gpu_deterministic_ops=true."
        )
    violations += batch_violations(config, mesh)
    violations += device_violations(config, mesh.devices.flat[0])
    train = config.train
    held_out = [stream for c in mixture.components if (stream := c.stream(VALIDATION))]
    if train.eval_every and not any(count_targets(s, config.data.boundaries) for s in held_out):
        violations.append(
            f"train.eval_every={train.eval_every} needs a validation split with targets, and "
            f"data.path={config.data.path!r} has none; prepare it with --validation_fraction "
            "greater than 0, or set --config.train.eval_every=0."
        )
    if violations:
        raise ConfigError("\n".join(violations))
    return mesh, logical_rules(config.model, mesh.shape)
