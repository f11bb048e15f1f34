"""Trains a model from a config; the same command again resumes.

  mobilellm train --config=configs/quickstart.py --workdir=runs/quickstart
  mobilellm train --config=configs/mobilellm_125m.py --workdir=runs/125m --config.data.path=data/web
  mobilellm train --config=configs/quickstart.py --workdir=runs/long --config.train.steps=2000

A finished run is extended by a larger --config.train.steps.
"""

from pathlib import Path

from absl import flags

from mobilellm_jax.cli.config_flags import load_config

SAVED_REQUEUE_ME = 75  # EX_TEMPFAIL: a scheduler may start the same command again

_CONFIG = flags.DEFINE_string("config", None, "config file, configs/NAME.py", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "run folder, made if missing", required=True)


def main(argv: list[str]) -> int:
    """Trains."""
    config = load_config(_CONFIG.value, argv[1:])
    # Only now, so that --help and a mistake in the config are answered at once.
    from mobilellm_jax.pretrain import pretrain

    return 0 if pretrain(config, Path(_WORKDIR.value)) else SAVED_REQUEUE_ME
