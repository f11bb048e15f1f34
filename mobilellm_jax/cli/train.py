"""Trains a model from a config; the same command resumes.

  mobilellm train --config=configs/quickstart.py --workdir=runs/quickstart
  mobilellm train --config=configs/mobilellm_125m.py --workdir=runs/125m --config.data.path=data/web
  mobilellm train --config=configs/quickstart.py --workdir=runs/long --config.train.steps=2000

A larger --config.train.steps extends a finished run. Compiled programs are kept for the next start
in ~/.cache/mobilellm, or in the folder of JAX_COMPILATION_CACHE_DIR.

On SIGTERM, on Ctrl-C and at the end of --max_walltime, the command saves the run and ends with exit
code 75. A scheduler may then start the same command again, which resumes. A second Ctrl-C ends the
command at once, and so does a Ctrl-C before the first step.

Several processes can train one run: start the same command in each process. Slurm, Kubernetes
JobSet and TPU VMs tell the processes about each other; elsewhere, give --coordinator_address,
--num_processes and --process_id. The processes must share the folder --workdir. If a process dies,
or is silent for --peer_timeout seconds, the other processes name it and end with exit code 75.
"""

import logging

from absl import flags

from mobilellm_jax.cli.config_flags import load_config
from mobilellm_jax.cli.shared import new_flags
from mobilellm_jax.config import Config
from mobilellm_jax.errors import SAVED_REQUEUE_ME
from mobilellm_jax.processes.early_stop import EarlyStop

_log = logging.getLogger(__name__)

FLAGS = new_flags()
_CONFIG = flags.DEFINE_string("config", None, "config file, configs/NAME.py", FLAGS, required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "run folder, made if missing", FLAGS, required=True)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0", FLAGS)
_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "processes of the run; 1: the command looks for no other processes",
    lower_bound=1,
    flag_values=FLAGS,
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "number of this process, from 0", lower_bound=0, flag_values=FLAGS
)
_PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout",
    60.0,
    "seconds of silence after which another process counts as dead; 0: never",
    lower_bound=0.0,
    flag_values=FLAGS,
)
_PROFILE = flags.DEFINE_string(
    "profile_steps", None, "steps FIRST:LAST to profile; the profile is in WORKDIR/profile", FLAGS
)
_WALLTIME = flags.DEFINE_string(
    "max_walltime",
    None,
    "time after which the run must be saved and ended: 3h50m, 5400 (seconds) or 3:50:00",
    FLAGS,
)


def main(argv: list[str]) -> int:
    """Trains, and returns the exit code."""
    config = load_config(_CONFIG.value, argv[1:])
    with EarlyStop():
        finished = _train(config)
    return 0 if finished else SAVED_REQUEUE_ME


def _train(config: Config) -> bool:
    # jax loads slowly. The imports are inside the function, so that --help and errors in the config
    # appear quickly.
    from mobilellm_jax import preflight
    from mobilellm_jax.pretrain import pretrain
    from mobilellm_jax.processes import distributed
    from mobilellm_jax.startup.before_jax import before_jax
    from mobilellm_jax.train.profiler import ProfiledSteps
    from mobilellm_jax.train.stopping import Walltime, parse_duration

    workdir = preflight.local_workdir(_WORKDIR.value)
    walltime = None
    if _WALLTIME.value is not None:
        walltime = Walltime(parse_duration("--max_walltime", _WALLTIME.value))
    profile = None if _PROFILE.value is None else ProfiledSteps.parse(_PROFILE.value)
    # These calls come before a backend starts, and in this order: the processes meet only after
    # XLA's flags are set.
    settings = before_jax(deterministic=config.train.deterministic)
    found = distributed.start(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _PEER_TIMEOUT.value
    )
    _log.info(f"start   {found}\n{settings}")
    return pretrain(config, workdir, profile, walltime)
