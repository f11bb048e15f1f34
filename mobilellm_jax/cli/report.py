"""Shows runs on one page: curves, our numbers next to the paper's tables, speed and memory.

  mobilellm report --runs='runs/tiny/runs/*' --output=runs/tiny/report
  mobilellm report --runs=runs/tiny --output=report

--runs accepts any run folders, or the folder of a sweep. Runs that differ only in their seeds count
as one model, with a mean and a standard error. For models of the paper's grids (`sweep --grid`),
the page also shows the paper's tables. The page is index.html in the folder --output; it needs no
other file and no network. The folder also contains the pictures (PNG) and tables (CSV, Markdown).
Unfinished runs are listed, but they are in no table.
"""

import dataclasses
from pathlib import Path

from mobilellm_jax.cli.flags import flag


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    runs: str = flag(None, "pattern of run folders, in quotes", required=True)
    output: Path = flag(None, "folder for the page, made if missing", required=True)


def main(flags: Flags) -> None:
    """Writes the page and prints a summary."""
    from mobilellm_jax.report.write import write_report

    for line in write_report(flags.runs, flags.output):
        print(line)
