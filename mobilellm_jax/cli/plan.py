"""Says what a run will need, before it runs: parameters, FLOPs, memory, communication, time.

  mobilellm plan --config=configs/mobilellm_125m.py
  mobilellm plan --config=configs/mobilellm_125m.py --topology=v5e:16x16
  mobilellm plan --config=configs/mobilellm_1_5b.py --topology=v5p:4x4x4 --config.mesh.fsdp=64

With --topology the real training step is compiled for that TPU slice, which takes minutes and needs
libtpu, but no TPU. If it does not fit, the smallest change that does is compiled and named. Without
it the run is counted for the devices of this machine.
"""

import sys

from absl import flags

from mobilellm_jax.cli.config_flags import load_config

DOES_NOT_FIT = 1

_CONFIG = flags.DEFINE_string("config", None, "config file, configs/NAME.py", required=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice to compile for, such as v5e:16x16")


def main(argv: list[str]) -> int:
    """Plans."""
    config = load_config(_CONFIG.value, argv[1:])
    # Only now, so that --help and a mistake in the config are answered at once.
    import jax

    from mobilellm_jax.plan import plan

    if _TOPOLOGY.value:
        jax.config.update("jax_platforms", "cpu")  # nothing runs: an attached TPU stays free
    fits = plan(config, _TOPOLOGY.value, print, lambda line: print(line, file=sys.stderr))
    return 0 if fits else DOES_NOT_FIT
