"""Predicts what a run needs: parameters, FLOPs, memory, communication and time.

  mobilellm plan --config=configs/mobilellm_125m.py
  mobilellm plan --config=configs/mobilellm_125m.py --topology=v5e:16x16
  mobilellm plan --config=configs/mobilellm_1_5b.py --topology=v5p:4x4x4 --config.mesh.fsdp=64

With --topology, the command compiles the real training step for a TPU slice. This takes minutes and
needs libtpu, but no TPU. If the step does not fit into memory, the command searches for the
smallest change of the config that makes the step fit, and prints this change. Without --topology,
the command calculates what a step needs on the devices of this machine, and does the same search
without compiling.

Exit codes: 0 if the step fits, or if a changed config fits; 1 if no change of the config makes the
step fit.
"""

import dataclasses

from mobilellm_jax.cli.config_flags import CONFIG_HELP, load_config
from mobilellm_jax.cli.flags import flag
from mobilellm_jax.errors import FAILED


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    config: str = flag(None, CONFIG_HELP, required=True)
    topology: str | None = flag(None, "TPU slice to compile for, such as v5e:16x16")


def main(flags: Flags, overrides: list[str]) -> int:
    """Prints the plan."""
    config = load_config(flags.config, overrides)
    # The import of jax is slow, so errors in the config are reported before it.
    import jax

    from mobilellm_jax.plan import plan

    if flags.topology:
        jax.config.update("jax_platforms", "cpu")  # Leaves an attached TPU free.

    def show(lines: list[str]) -> None:
        print("\n".join(lines), flush=True)

    return 0 if plan(config, flags.topology, show) else FAILED
