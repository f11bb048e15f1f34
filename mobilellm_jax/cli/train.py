"""Trains a model from a config; the same command again resumes.

  mobilellm train --config=configs/quickstart.py --workdir=runs/quickstart
  mobilellm train --config=configs/mobilellm_125m.py --workdir=runs/125m --config.data.path=data/web
  mobilellm train --config=configs/quickstart.py --workdir=runs/long --config.train.steps=2000

A finished run is extended by a larger --config.train.steps. What is compiled is kept for the next
start in ~/.cache/mobilellm, or where JAX_COMPILATION_CACHE_DIR says.

SIGTERM, Ctrl-C or the end of --max_walltime save the run and end it with exit code 75: a scheduler
may start the same command again, which goes on. Ctrl-C twice leaves at once, and so does once
before the first step.

Several processes train one run: start the same command in each. Slurm, Kubernetes JobSet and TPU
VMs tell them about each other; elsewhere give all three of --coordinator_address, --num_processes
and --process_id. --workdir must be a folder that they share. When one dies, or gives no sign of
life for --peer_timeout seconds, the others name it and end with exit code 75.
"""

import sys

from absl import flags

from mobilellm_jax.cli.config_flags import load_config
from mobilellm_jax.config import Config
from mobilellm_jax.errors import SAVED_REQUEUE_ME
from mobilellm_jax.processes.early_stop import EarlyStop

_CONFIG = flags.DEFINE_string("config", None, "config file, configs/NAME.py", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "run folder, made if missing", required=True)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0")
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "processes of the run; 1 = look for no others", lower_bound=1
)
_PROCESS = flags.DEFINE_integer("process_id", None, "number of this one, from 0", lower_bound=0)
_PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout",
    60.0,
    "seconds of silence after which another process of the run counts as gone; 0 = not looked for",
    lower_bound=0.0,
)
_PROFILE = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST steps of which a profile is written to WORKDIR/profile"
)
_WALLTIME = flags.DEFINE_string(
    "max_walltime", None, "be saved and gone after this time: 3h50m, 5400 (s), or 3:50:00"
)


def main(argv: list[str]) -> int:
    """Trains."""
    config = load_config(_CONFIG.value, argv[1:])
    with EarlyStop():
        finished = _train(config)
    return 0 if finished else SAVED_REQUEUE_ME


def _train(config: Config) -> bool:
    # Only now, so that --help and a mistake in the config are answered at once.
    from mobilellm_jax import preflight
    from mobilellm_jax.pretrain import pretrain
    from mobilellm_jax.processes import distributed
    from mobilellm_jax.startup.compile_cache import use_compile_cache
    from mobilellm_jax.startup.host_memory import share_one_heap
    from mobilellm_jax.startup.xla_flags import set_xla_flags
    from mobilellm_jax.train.profiler import ProfiledSteps
    from mobilellm_jax.train.stopping import Walltime, parse_duration

    workdir = preflight.local_workdir(_WORKDIR.value)
    walltime = None
    if _WALLTIME.value is not None:
        walltime = Walltime(parse_duration("--max_walltime", _WALLTIME.value))
    profile = None if _PROFILE.value is None else ProfiledSteps.parse(_PROFILE.value)
    # Before anything starts a backend, and in this order: processes meet with the flags set.
    share_one_heap()
    xla_flags = set_xla_flags(deterministic=config.train.deterministic)
    cache = use_compile_cache()
    found = distributed.start(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _PEER_TIMEOUT.value
    )
    lines = [f"start   {found}", f"xla     flags added: {xla_flags}; compiled programs: {cache}"]
    print("\n".join(lines), file=sys.stderr, flush=True)
    return pretrain(config, workdir, profile, walltime)
