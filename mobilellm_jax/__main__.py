"""Makes `python -m mobilellm_jax` do the same as the command `mobilellm`."""

import sys

from mobilellm_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
