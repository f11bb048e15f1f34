"""`python -m mobilellm_jax` is the console script `mobilellm`."""

import sys

from mobilellm_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
