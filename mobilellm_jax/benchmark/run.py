"""Measures models in turn, each in processes of its own, and writes what they found."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mobilellm_jax.benchmark.measure import Measurement, Subject
from mobilellm_jax.benchmark.table import Row, as_csv, markdown, plot, summarize
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.rundir import write_whole


class MeasuringError(RuntimeError):
    """A process that measured a model did not end well."""


def benchmark(
    subjects: Sequence[Subject],
    *,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    rounds: int,
    text: str,
) -> tuple[list[Row], list[list[Measurement]]]:
    """Returns a row per model, and what its processes measured.

    Models take turns, `runs` times, so that what the machine does besides meets all alike.

    Raises:
      MeasuringError: with the words of the process that failed.
    """
    found: list[list[Measurement]] = [[] for _ in subjects]
    with tempfile.TemporaryDirectory(prefix="mobilellm_benchmark.") as folder:
        file = Path(folder) / "text.txt"
        file.write_text(text, encoding="utf-8")
        turns = [(i, subject) for _ in range(runs) for i, subject in enumerate(subjects)]
        for i, subject in tqdm(turns, unit="process", disable=None):
            found[i].append(_measured(subject, file, prompt_tokens, new_tokens, rounds))
    return [summarize(each, prompt_tokens) for each in found], found


def write_results(
    folder: Path, rows: Sequence[Row], measured: Sequence[Sequence[Measurement]]
) -> None:
    """Writes benchmark.md, .csv, .json and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [dataclasses.asdict(each) for model in measured for each in model]
    write_whole(folder / "benchmark.json", json.dumps(values, indent=1) + "\n")
    write_whole(folder / "benchmark.csv", as_csv(rows))
    write_whole(folder / "benchmark.md", markdown(rows))
    plot(rows, folder / "benchmark.png")


def _measured(
    subject: Subject, text: Path, prompt_tokens: int, new_tokens: int, rounds: int
) -> Measurement:
    flags = [
        f"--prompt_tokens={prompt_tokens}",
        f"--new_tokens={new_tokens}",
        f"--rounds={rounds}",
    ]
    if subject.scheme is not None:
        flags.append(f"--scheme={subject.scheme.name}")
    path = subject.path
    module = "mobilellm_jax.benchmark.measure"
    process = subprocess.run(
        [sys.executable, "-m", module, str(path), str(text), *flags],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        # A signal has no words of its own: a runtime in C++ that crashed.
        end = f"signal {-process.returncode}" if process.returncode < 0 else process.returncode
        words = process.stderr.strip().splitlines()[-12:]
        raise MeasuringError(f"Measuring {path} ended with {end}:\n" + "\n".join(words))
    found: Measurement = strict_json.as_type(
        strict_json.parse(process.stdout.splitlines()[-1]), Measurement, str(path)
    )
    return found
