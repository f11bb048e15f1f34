"""Turns runs into one page: curves, the paper's tables with ours beside them, speed and memory.

  mobilellm report --runs='runs/tiny/runs/*' --output=runs/tiny/report
  mobilellm report --runs=runs/tiny --output=report

--runs takes run folders, however they were made, or the folder of a sweep. Runs that differ in
nothing but seeds are one model with a mean and a standard error. Models of the paper's grids
(`sweep --grid`) get its tables. DIR/index.html needs no other file and no network; pictures (PNG)
and tables (CSV, Markdown) lie beside it. Runs that have not finished are listed and in no table.
"""

from pathlib import Path

from absl import flags

_RUNS = flags.DEFINE_string("runs", None, "pattern of run folders, in quotes", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder for the page, made if missing", required=True)


def main(argv: list[str]) -> None:
    """Reports."""
    del argv  # no config, no overrides
    from mobilellm_jax.report import report

    for line in report(_RUNS.value, Path(_OUTPUT.value)):
        print(line)
