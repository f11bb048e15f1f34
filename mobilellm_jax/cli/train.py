"""Trains a model from a config; the same command resumes a stopped run.

  mobilellm train --config=configs/quickstart.py --workdir=runs/quickstart
  mobilellm train --config=configs/mobilellm_125m.py --workdir=runs/125m --config.data.path=data/web
  mobilellm train --config=configs/quickstart.py --workdir=runs/long --config.train.steps=2000

--show_config lists all settings. --config also takes the config.json of a run, to repeat the run,
and --config.model=CKPT takes the shape of the model from a checkpoint.

A larger --config.train.steps extends a finished run. This also changes the schedule of the learning
rate, and the command prints the old and the new rate. With --change_learning_rate, a resumed run
may change optimizer.peak_lr, schedule, warmup_steps and min_lr_ratio; WORKDIR/changes.jsonl keeps
the old values. JAX keeps compiled programs for later runs in ~/.cache/mobilellm, or in the folder
that JAX_COMPILATION_CACHE_DIR names.

On SIGTERM, on Ctrl-C and at the end of --max_walltime, the command saves the run and ends with exit
code 75. A scheduler may then start the same command again, and the run continues. A second Ctrl-C,
or a Ctrl-C before the first step, ends the command immediately.

One process uses all GPUs or TPU chips of its machine. Several processes can train one run: start
the same command in each process (srun, or gcloud ... tpu-vm ssh --worker=all). On Slurm, Kubernetes
JobSet and TPU VMs, the processes find each other. Elsewhere, give --coordinator_address,
--num_processes and --process_id. docs/training.md has a command for each kind of machine. All
processes must see the same folder --workdir. If a process dies, or is silent for --peer_timeout
seconds, the other processes report the number of this process and end with exit code 75.
"""

import dataclasses
import logging
from pathlib import Path

from mobilellm_jax.cli.config_flags import CONFIG_HELP, load_recipe
from mobilellm_jax.cli.flags import flag
from mobilellm_jax.cli.show_config import config_lines
from mobilellm_jax.config import Config
from mobilellm_jax.errors import SAVED_REQUEUE_ME
from mobilellm_jax.processes.early_stop import EarlyStop

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    config: str = flag(None, CONFIG_HELP, required=True)
    workdir: Path = flag(None, "run folder, made if missing", required=True, unless="show_config")
    show_config: bool = flag(
        False, "print every field of the config: its value, its meaning, and what set it; then stop"
    )
    coordinator_address: str | None = flag(None, "HOST:PORT of process 0")
    num_processes: int | None = flag(
        None, "processes of the run; 1: the command looks for no other processes", lower_bound=1
    )
    process_id: int | None = flag(None, "number of this process, from 0", lower_bound=0)
    peer_timeout: float = flag(
        60.0,
        "seconds of silence after which another process is considered dead; 0: never",
        lower_bound=0.0,
    )
    profile_steps: str | None = flag(
        None, "steps FIRST:LAST to profile; the profile is in WORKDIR/profile"
    )
    change_learning_rate: bool = flag(
        False, "lets a resumed run change the learning rate and its schedule"
    )
    max_walltime: str | None = flag(
        None,
        "time after which the run must be saved and ended: 3h50m, 5400 (seconds) or 3:50:00",
    )


def main(flags: Flags, overrides: list[str]) -> int:
    """Trains, and returns the exit code."""
    recipe = load_recipe(flags.config, overrides)
    if flags.show_config:
        print("\n".join(config_lines(recipe)))
        return 0
    with EarlyStop():
        finished = _train(recipe.config, flags)
    return 0 if finished else SAVED_REQUEUE_ME


def _train(config: Config, flags: Flags) -> bool:
    # The import of jax is slow, so errors in the config are reported before it.
    from mobilellm_jax.pretrain import pretrain
    from mobilellm_jax.processes import distributed
    from mobilellm_jax.startup.before_jax import before_jax
    from mobilellm_jax.train.profiler import ProfiledSteps
    from mobilellm_jax.train.stopping import Walltime, parse_duration

    walltime = None
    if flags.max_walltime is not None:
        walltime = Walltime(parse_duration("--max_walltime", flags.max_walltime))
    profile = None if flags.profile_steps is None else ProfiledSteps.parse(flags.profile_steps)
    # XLA's flags must be set before JAX starts a backend and before the processes connect.
    settings = before_jax(deterministic=config.train.deterministic)
    found = distributed.start(
        flags.coordinator_address, flags.num_processes, flags.process_id, flags.peer_timeout
    )
    _log.info(f"start   {found}\n{settings}")
    return pretrain(
        config, flags.workdir, profile, walltime, change_learning_rate=flags.change_learning_rate
    )
