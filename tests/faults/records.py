"""Compares the logs and the last checkpoints of two runs to the bit."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from mobilellm_jax.train.metrics import read_metrics

# Rates depend on other work of the machine. All other values are results.
_RATES = ("train/tokens_per_sec", "train/data_wait", "train/mfu")


def log(workdir: Path) -> list[dict[str, Any]]:
    """Returns the record of the run without its rates."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in _RATES} for record in records]


def stored(workdir: Path, step: int) -> dict[str, Any]:
    """Returns all arrays of a step, as Orbax reads them: parameters, optimizer, step and key."""
    folder = workdir / "checkpoints" / str(step)
    here = SingleDeviceSharding(jax.devices()[0])  # two processes may have written the arrays
    args = ocp.args.StandardRestore(fallback_sharding=here)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return {n: reader.restore(folder / n, args=args) for n in ("params", "optimizer")}


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Asserts equal logs, samples and last checkpoints."""
    assert log(one) == log(other)
    assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()
    first, second = stored(one, step), stored(other, step)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)
