"""What two runs have to share to the bit: their log, and what their last checkpoint holds."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from mobilellm_jax.train.metrics import read_metrics

# Rates depend on the machine's other work; everything else is a result.
_RATES = ("train/tokens_per_sec", "train/data_wait", "train/mfu")


def log(workdir: Path) -> list[dict[str, Any]]:
    """The run's record without its rates."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in _RATES} for record in records]


def stored(workdir: Path, step: int) -> dict[str, Any]:
    """Everything that a step holds, read by Orbax itself: parameters, optimizer, step, key."""
    folder = workdir / "checkpoints" / str(step)
    here = SingleDeviceSharding(jax.devices()[0])  # two processes may have written it
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
