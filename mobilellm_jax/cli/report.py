"""Makes one page from runs: curves, the paper's tables beside ours, speed and memory.

  mobilellm report --runs='runs/tiny/runs/*' --output=runs/tiny/report
  mobilellm report --runs=runs/tiny --output=report

--runs takes run folders from any command, or the folder of a sweep. Runs that differ only in seeds
count as one model with a mean and a standard error. Models of the paper's grids (`sweep --grid`)
get its tables. DIR/index.html needs no other file and no network; pictures (PNG) and tables (CSV,
Markdown) lie beside it. The page lists unfinished runs, and its tables leave them out.
"""

from pathlib import Path

from absl import flags

_RUNS = flags.DEFINE_string("runs", None, "pattern of run folders, in quotes", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder for the page, made if missing", required=True)


def main(argv: list[str]) -> None:
    """Writes the report."""
    del argv  # this command takes no config and no overrides
    from mobilellm_jax.report.write import write_report

    for line in write_report(_RUNS.value, Path(_OUTPUT.value)):
        print(line)
