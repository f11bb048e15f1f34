"""Measures each model in several new processes, and writes the results."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mobilellm_jax.benchmark.measure import Measurement, Request
from mobilellm_jax.benchmark.table import Row, as_csv, markdown, plot, summarize
from mobilellm_jax.errors import require
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.rundir import write_whole


class MeasuringError(RuntimeError):
    """A process that measured a model failed."""


def benchmark(requests: Sequence[Request], runs: int) -> tuple[list[Row], list[list[Measurement]]]:
    """Measures models; returns the medians and all measurements for each request.

    All models are measured one after another, `runs` times in total. Other work on the machine
    therefore affects all models alike.

    Raises:
      UserError: if the `report` extra, which draws the picture, is not installed.
      MeasuringError: if a process fails; the message holds the last lines that it wrote.
    """
    require("matplotlib", "report", "the picture of mobilellm benchmark")
    found: list[list[Measurement]] = [[] for _ in requests]
    turns = [(i, request) for _ in range(runs) for i, request in enumerate(requests)]
    for i, request in tqdm(turns, unit="process", disable=None):
        found[i].append(_measured(request))
    pairs = zip(found, requests, strict=True)
    return [summarize(each, request.prompt_tokens) for each, request in pairs], found


def write_results(
    folder: Path, rows: Sequence[Row], measured: Sequence[Sequence[Measurement]]
) -> None:
    """Writes benchmark.md, .csv, .json and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [dataclasses.asdict(each) for model in measured for each in model]
    write_whole(folder / "benchmark.json", json.dumps(values, indent=1) + "\n")
    write_whole(folder / "benchmark.csv", as_csv(rows))
    write_whole(folder / "benchmark.md", markdown(rows))
    write_whole(folder / "benchmark.png", plot(rows))


def _measured(request: Request) -> Measurement:
    process = subprocess.run(
        [sys.executable, "-m", "mobilellm_jax.benchmark.measure"],
        input=json.dumps(dataclasses.asdict(request)),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        # If a signal killed a runtime in C++, there is no message, so we report the signal.
        end = f"signal {-process.returncode}" if process.returncode < 0 else process.returncode
        last = process.stderr.strip().splitlines()[-12:]
        raise MeasuringError(f"Measuring {request.path} ended with {end}:\n" + "\n".join(last))
    answer = strict_json.parse(process.stdout.splitlines()[-1])
    found: Measurement = strict_json.as_type(answer, Measurement, request.path)
    return found
