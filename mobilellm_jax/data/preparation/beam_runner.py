"""Runs `prepare` on Apache Beam, which encodes pieces into parts and joins parts into shards.

Beam's workers call the same functions as local workers, so both write equal files. Every Beam
worker must find the sources and the working folder next to the output under the same paths, so the
working folder must be on a shared disk. Beam requires older versions of some packages, so install
it in a separate environment (`pip install 'mobilellm-jax[beam]'`).
"""

import dataclasses
import functools
import importlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from mobilellm_jax.data.preparation import assembly
from mobilellm_jax.data.preparation.parts import Job, Part, PieceEncoder, Task, read_part
from mobilellm_jax.data.shards import Counts
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION
from mobilellm_jax.errors import MissingFileError, UserError


def encode_and_assemble(
    job: Job, tasks: Sequence[Task], options: Sequence[str]
) -> Generator[Part, None, None]:
    """Encodes the missing parts, assembles all shards, and then yields the parts in order.

    `options` are Beam's own flags, such as `--runner=DirectRunner` or `--direct_num_workers=8`.

    Raises:
      UserError: if Beam is not installed, or if the encoding of a piece raises it (see
        `PieceEncoder.encode`).
    """
    try:
        beam = importlib.import_module("apache_beam")
        pipeline_options = importlib.import_module("apache_beam.options.pipeline_options")
    except ModuleNotFoundError as error:
        raise UserError(
            "runner='beam' needs Apache Beam, which holds other packages back: install it in a "
            "virtual environment of its own with `pip install 'mobilellm-jax[beam]'`, or use "
            "--runner=local."
        ) from error

    class Encode(beam.DoFn):  # type: ignore[misc, name-defined]  # The type checker has no Beam.
        def __init__(self, job: Job) -> None:
            self.job = job

        def setup(self) -> None:
            self.encoder = PieceEncoder(self.job)

        def process(self, task: Task) -> Iterable[int]:
            yield self.encoder.encode(task, _counted(beam)).number

    def run(label: str, elements: Sequence[Any], transform: Any) -> None:
        if elements:
            with beam.Pipeline(options=pipeline_options.PipelineOptions(list(options))) as pipeline:
                _ = pipeline | beam.Create(elements) | beam.Reshuffle() | label >> transform

    left = [task for task in tasks if read_part(job.parts, task.number) is None]
    run("encode", left, beam.ParDo(Encode(job)))
    parts = []
    for task in tasks:
        if (part := read_part(job.parts, task.number)) is None:
            raise MissingFileError(
                f"{job.parts} has no part {task.number} after Beam has run; all of its workers "
                "must see this folder under this path, on a shared disk."
            )
        parts.append(part)
    plans: list[assembly.ShardPlan] = []
    for split in (TRAIN, VALIDATION):
        planner = assembly.Planner(job, split)
        for part in parts:
            plans += planner.add(part)
        plans += planner.end()
    run("assemble", plans, beam.Map(functools.partial(assembly.assemble, job)))
    yield from parts


def _counted(beam: Any) -> Any:
    """Returns a function that adds to Beam's counters; Beam shows them on its progress pages."""
    counters = {
        field.name: beam.metrics.Metrics.counter("prepare", field.name)
        for field in dataclasses.fields(Counts)
    }

    def count(batch: Counts) -> None:
        for name, counter in counters.items():
            counter.inc(getattr(batch, name))

    return count
