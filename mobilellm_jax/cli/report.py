"""Turns runs into one page: curves, the paper's tables beside our numbers, speed and memory.

  mobilellm report --runs='runs/tiny/runs/*' --output=runs/tiny/report
  mobilellm report --runs=runs/tiny --output=report

--runs takes run folders of any origin, or the folder of a sweep. Runs that differ only in their
seeds count as one model with a mean and a standard error. Models of the paper's grids
(`sweep --grid`) also get the tables of the paper. DIR/index.html needs no other file and no
network; pictures (PNG) and tables (CSV, Markdown) lie beside it. Unfinished runs are listed, but
are in no table.
"""

from pathlib import Path

from absl import flags

from mobilellm_jax.cli.shared import new_flags

FLAGS = new_flags()
_RUNS = flags.DEFINE_string("runs", None, "pattern of run folders, in quotes", FLAGS, required=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "folder for the page, made if missing", FLAGS, required=True
)


def main(argv: list[str]) -> None:
    """Writes the page and prints a summary."""
    del argv  # the command has no config, so it has no overrides
    from mobilellm_jax.report.write import write_report

    for line in write_report(_RUNS.value, Path(_OUTPUT.value)):
        print(line)
