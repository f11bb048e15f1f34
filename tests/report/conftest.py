"""Run folders like the folders of a sweep, with invented losses."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.config import Config, DataConfig, ModelConfig, TrainConfig, to_json
from mobilellm_jax.paper.grids import GRIDS, grid_rows, shape_name

BASE = Config(
    model=ModelConfig(vocab_size=2048, max_seq_len=256, compute_dtype="float32", attention="xla"),
    data=DataConfig(path="data/books", seq_len=256),
    train=TrainConfig(steps=2000, global_batch=8, eval_every=500),
)


def run_writer(sweep: Path) -> Callable[..., Path]:
    def write(
        name: str, config: Config, loss: float, *, finished: bool = True, reason: str = ""
    ) -> Path:
        folder = sweep / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(to_json(config))
        steps = config.train.steps
        points = [s for s in range(0, steps + 1, steps // 4) if finished or s < steps]
        records = [
            {"step": s, "validation/loss": loss + 3 * (1 - s / steps), "validation/bpb": loss / 2}
            for s in points
        ]
        records += [{"step": points[-1], "train/loss": loss, "train/tokens_per_sec": 1000.0}]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(text)
        state = "failed" if reason else "finished"
        if finished or reason:
            outcome = {"state": state, "reason": reason, "peak_host_bytes": 5 * 10**8}
            (folder / "outcome.json").write_text(json.dumps(outcome))
        return folder

    return write


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    return run_writer(tmp_path / "sweep")


def seeded(config: Config, seed: int) -> Config:
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=seed),
        data=dataclasses.replace(config.data, seed=seed),
    )


@pytest.fixture(scope="package")
def all_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a sweep of all tiny grids with three seeds, a failed run and an unfinished run."""
    sweep = tmp_path_factory.mktemp("tiny") / "sweep"
    write_run = run_writer(sweep)
    rng = np.random.default_rng(0)
    rows = {shape_name(r.model): r.model for grid in GRIDS for r in grid_rows(grid, "tiny")}
    for number, (name, model) in enumerate(rows.items()):
        whole = dataclasses.replace(
            model, compute_dtype="float32", attention="xla", init_std=0.06, scan_unroll=1
        )
        config = dataclasses.replace(BASE, model=whole)
        for seed in range(3):
            loss = 4.0 - 0.02 * number + 0.01 * float(rng.normal())
            write_run(f"{name}-s{seed}", seeded(config, seed), loss)
    write_run("late-s0", seeded(BASE, 0), 4.0, finished=False)
    write_run("broken-s0", seeded(BASE, 1), 4.0, finished=False, reason="<b>OSError</b>: & full")
    return sweep
