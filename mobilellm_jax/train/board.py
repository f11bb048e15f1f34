"""Writes the numbers and the config of a run for TensorBoard.

`tensorboard.summary.Writer` is not used: it writes in a thread, writes neither text nor
hyperparameters, and does not recover after an error, for example after its folder was deleted.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config
from mobilellm_jax.storage import rundir
from mobilellm_jax.train.side_records import AppendedFile


class Board:
    """An event file in `RUN/tensorboard/NAME`; TensorBoard shows NAME as the name of the run.

    The first events hold the config as a text, and as hyperparameters. A run that an earlier
    version began keeps its event files in `RUN/tensorboard`, so that its curves stay whole.
    """

    def __init__(self, run: Path, config: Config | None) -> None:
        old = any((run / rundir.TENSORBOARD).glob("events.out.tfevents.*"))
        folder = rundir.TENSORBOARD if old else f"{rundir.TENSORBOARD}/{run.resolve().name}"
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(run, f"{folder}/{name}", _first_events(config))

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Appends the numbers of `values`."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        events = [_event(step=step, summary=scalar_pb(n, v)) for n, v in numbers.items()]
        self._file.append(b"".join(events))

    def close(self) -> None:
        self._file.close()


def _first_events(config: Config | None) -> bytes:
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.text.summary_v2 import text_pb

    version = _event(file_version="brain.Event:2")
    if config is None:
        return version
    # Markdown shows lines that begin with four spaces as they are.
    text = "\n".join(f"    {line}" for line in config_lib.to_json(config).splitlines())
    return (
        version
        + _event(summary=text_pb("config", text))
        + _event(summary=hparams_pb(dict(config_lib.flat_fields(config))))
    )


def _event(**fields: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()
