"""Measures how long a checkpoint delays training, and how long writing and restoring take.

  python benchmarks/checkpoint.py
  python benchmarks/checkpoint.py --model=mobilellm_350m --rounds=5 --folder=/scratch

The state is a training state of AdamW in float32 with random numbers, on one device. For
comparison, `plain` writes the same number of bytes to one file with one thread and syncs it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from mobilellm_jax import checkpoint
from mobilellm_jax.cli.config_flags import load_config
from mobilellm_jax.config import MeshConfig
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.sharding import logical_rules, make_mesh
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import TrainState, abstract_state

ROOT = Path(__file__).parent.parent


def timed(call: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def write_plain(file: Path, size: int) -> None:
    """Writes `size` random bytes, which a file system cannot compress, and syncs them."""
    block = np.random.default_rng(0).bytes(1 << 24)
    with file.open("wb") as opened:
        for _ in range(size // len(block)):
            opened.write(block)
        opened.flush()
        os.fsync(opened.fileno())
    file.unlink()


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mobilellm_125m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="folder on the disk to measure")
    arguments = parser.parse_args()
    config = load_config(str(ROOT / "configs" / f"{arguments.model}.py"), [])
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    rules = logical_rules(config.model, mesh.shape)
    abstract = abstract_state(
        config, make_optimizer(config.optimizer, config.train.steps), mesh, rules
    )
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    state: TrainState = jax.tree.map(fill, abstract)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        text = ["a thin model is a deep model, on a phone too " * 20]
        tokenizer = train_tokenizer(text, 300, folder / "tokenizer.model")
        data = checkpoint.DataState(next_sample=0, fingerprint="")
        for step in range(1, arguments.rounds + 1):
            with checkpoint.CheckpointWriter(folder, config, tokenizer) as writer:
                began = time.perf_counter()
                writer.save(step, state, data)
                held_up = time.perf_counter() - began
                writer.wait()
                on_disk = time.perf_counter() - began
                taken = {"held up": held_up, "on disk": on_disk}
                taken["verify all"] = timed(lambda: checkpoint.latest_step(folder))
                taken["restore state"] = timed(
                    lambda: checkpoint.restore_state(folder, step, abstract)  # noqa: B023
                )
                parts = checkpoint.MODEL_PARTS
                taken["verify model"] = timed(lambda: checkpoint.latest_step(folder, parts))  # noqa: B023
                taken["plain"] = timed(lambda: write_plain(folder / "plain", size))
            for what, seconds in taken.items():
                found.setdefault(what, []).append(seconds)
    print(f"{arguments.model}: {size / 1e9:.2f} GB, {os.cpu_count()} cores, median (range) in s")
    for what, seconds in found.items():
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"  {what:14} {statistics.median(seconds):6.2f} {spread}")


if __name__ == "__main__":
    main()
