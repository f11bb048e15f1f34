"""Trains one run on every mesh and any number of processes, through its own checkpoints.

The losses equal the losses of one device, within the rounding of float32 sums in another order. The
test stops the run at any step and continues it on any mesh. `test_sharding.py` compares the bare
step.
"""

import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mobilellm_jax import checkpoint, preflight, pretrain
from mobilellm_jax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    to_json,
)
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.errors import FAILED, SAVED_REQUEUE_ME
from mobilellm_jax.sharding import make_mesh
from mobilellm_jax.train import side_records
from tests import lives
from tests.together import free_port

STEPS = 20
# The tolerance is relative for losses and absolute for parameters.
TOLERANCE = 1e-5
FSDP4_TENSOR2 = MeshConfig(data=1, fsdp=4, tensor=2)


def stopping_after(step: int) -> Callable[..., Any]:
    """Returns a `make_train_step` whose step sends SIGTERM to its process when it is done."""
    from mobilellm_jax.train.step import make_train_step

    def make(*arguments: Any) -> Callable[..., Any]:
        step_fn = make_train_step(*arguments)

        def stepping(state: Any, batch: Any) -> Any:
            state, metrics = step_fn(state, batch)
            if int(state.step) == step:
                signal.raise_signal(signal.SIGTERM)
            return state, metrics

        return stepping

    return make


def stop_after(step: int) -> None:
    pretrain.make_train_step = stopping_after(step)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["thin", "deep", "block", "shared", "twice", "phone", "small", "model"]
    for i in range(100):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)) + f" {i}.\n")
    tokens, source = folder / "tokens", f"text:{folder}/*.txt"
    prepare([source], tokens, vocab_size=300)
    return Config(
        model=ModelConfig(
            vocab_size=300,
            embed_dim=16,
            num_blocks=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            ffn_dim=24,
            max_seq_len=32,
            compute_dtype="float32",
        ),
        data=DataConfig(path=str(tokens), source=source, seq_len=16),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=10),
        train=TrainConfig(
            steps=STEPS,
            global_batch=8,
            log_every=1,
            eval_every=STEPS,
            eval_batches=2,
            checkpoint_every=1000,
        ),
        evaluate=EvaluateConfig(every=10, samples=1),
    )


def records(workdir: Path, name: str) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[name] for r in map(json.loads, lines) if name in r}


def samples(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "samples.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_one_device(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("one_device") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        assert pretrain.pretrain(config, workdir)
    losses = records(workdir, "train/loss")
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.05
    return workdir


def assert_same_run(workdir: Path, reference: Path) -> None:
    for name in ("train/loss", "validation/loss"):
        expected, found = records(reference, name), records(workdir, name)
        assert list(found) == list(expected)
        np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=TOLERANCE)
    assert set(records(workdir, "validation/loss")) == {0, STEPS}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE),
        checkpoint.restore_model(workdir, STEPS).params,
        checkpoint.restore_model(reference, STEPS).params,
    )


def go_on(config: Config, mesh: MeshConfig, workdir: Path, stop: int | None) -> None:
    """Trains in this process, on eight devices, until the step that the run has to stop after."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            patch.setattr(pretrain, "make_train_step", stopping_after(stop))
        finished = pretrain.pretrain(dataclasses.replace(config, mesh=mesh), workdir)
    assert finished == (stop is None)
    assert checkpoint.latest_step(workdir) == (stop or STEPS)


def go_on_as_two(
    config: Config, mesh: MeshConfig, workdir: Path, stops: tuple[int, int]
) -> list[str]:
    """Trains in two processes of four devices. Returns what each process printed on stderr."""
    two = dataclasses.replace(config, mesh=mesh)
    commands = commands_of([two, two], [workdir, workdir], workdir.parent)
    befores = [functools.partial(stop_after, stop) for stop in stops]
    results = lives.run_as_two(commands, workdir.parent, befores)
    for result in results:
        assert result.returncode == (SAVED_REQUEUE_ME if any(stops) else 0), result.stderr
    return [result.stderr for result in results]


def commands_of(
    configs: Sequence[Config], workdirs: Sequence[Path], folder: Path
) -> list[list[str]]:
    """Returns the command of each process of a run; writes its config file into the folder."""
    together = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    commands = []
    for own, (config, workdir) in enumerate(zip(configs, workdirs, strict=True)):
        file = folder / f"config{own}.py"
        file.write_text(
            "from mobilellm_jax.config import from_json, to_config_dict\n"
            f"def get_config():\n    return to_config_dict(from_json({to_json(config)!r}))\n"
        )
        flags = [f"--config={file}", f"--workdir={workdir}", f"--process_id={own}"]
        commands.append(["train", *flags, *together])
    return commands


@pytest.mark.slow
def test_a_run_goes_on_on_any_mesh(config: Config, on_one_device: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    go_on(config, MeshConfig(), workdir, 4)
    go_on(config, MeshConfig(data=1, fsdp=8), workdir, 8)
    go_on(config, FSDP4_TENSOR2, workdir, 12)
    go_on(config, MeshConfig(data=2, fsdp=2, tensor=2), workdir, 16)
    go_on(config, MeshConfig(data=4, sequence=2), workdir, None)
    assert_same_run(workdir, on_one_device)


@pytest.mark.slow
def test_two_processes_are_one_run(config: Config, on_one_device: Path, tmp_path: Path) -> None:
    workdir, missing = tmp_path / "run", dataclasses.replace(config.data, path=f"{tmp_path}/tokens")
    first, second = go_on_as_two(
        dataclasses.replace(config, data=missing), MeshConfig(), workdir, (0, 0)
    )
    assert_same_run(workdir, on_one_device)
    assert "Preparing" in first and "Preparing" not in second
    # Only one process writes files and prints.
    assert "mesh    data 8" in first and f"step {STEPS}: validation" in first
    assert "mesh" not in second and "validation" not in second
    assert (workdir / "loss.png").stat().st_size > 1000
    assert [s["step"] for s in samples(workdir)] == [10, STEPS]


@pytest.mark.slow
def test_a_run_goes_on_as_two_processes_and_back(
    config: Config, on_one_device: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    go_on(config, FSDP4_TENSOR2, workdir, 6)
    # Both processes hold parts of the parameters. Only the second process is told to stop.
    first, _ = go_on_as_two(config, MeshConfig(data=1, fsdp=8), workdir, (0, 10))
    assert checkpoint.latest_step(workdir) == 11
    assert "resume  from step 6" in first and "Stopped, saved" in first
    assert [s["step"] for s in samples(workdir)] == [10]  # both processes hold parameters
    go_on(config, MeshConfig(), workdir, None)
    assert_same_run(workdir, on_one_device)


def fail_validation(when: str) -> None:
    """Makes the validation of this process fail after or before its programs on the devices."""
    side_records._WAIT_AFTER_ERROR_SEC = 5.0
    validate = pretrain._Run._validate

    def failing(self: Any, state: Any) -> Any:
        if when == "after":
            validate(self, state)
        raise KeyError("no such field")

    pretrain._Run._validate = failing  # type: ignore[method-assign]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("own", "other", "goes_on"),
    [("after", "after", True), (None, "after", True), ("before", None, False)],
)
def test_an_evaluation_fails_in_a_run_of_two_processes(
    own: str | None, other: str | None, goes_on: bool, config: Config, tmp_path: Path
) -> None:
    """The run goes on, unless a process waits in the evaluation for one that has failed before."""
    workdir, train = tmp_path / "run", dataclasses.replace(config.train, checkpoint_every=5)
    short = dataclasses.replace(train, eval_every=8, steps=12)
    two = dataclasses.replace(config, train=short, evaluate=EvaluateConfig())
    befores = [bool if w is None else functools.partial(fail_validation, w) for w in (own, other)]
    commands = commands_of([two, two], [workdir, workdir], tmp_path)
    commands = [[*command, "--peer_timeout=5"] for command in commands]
    results = lives.run_as_two(commands, tmp_path, befores)
    assert [result.returncode for result in results] == [0 if goes_on else FAILED] * 2, results
    assert checkpoint.latest_step(workdir) == (12 if goes_on else None)
    said = "".join(result.stderr for result in results)
    assert "KeyError: 'no such field'" in said
    assert ("training goes on" in said) == goes_on


@pytest.mark.parametrize("mistake", ["another config", "another folder"])
def test_processes_that_do_not_mean_the_same_run_are_refused(
    mistake: str, config: Config, tmp_path: Path
) -> None:
    other = dataclasses.replace(config.optimizer, peak_lr=0.5)
    configs = [config, dataclasses.replace(config, optimizer=other)]
    workdirs = [tmp_path / "run", tmp_path / "run"]
    if mistake == "another folder":
        configs, workdirs = [config, config], [tmp_path / "run0", tmp_path / "run1"]
    results = lives.run_as_two(commands_of(configs, workdirs, tmp_path), tmp_path)
    expected = {
        "another config": "optimizer.peak_lr: 0.001 there, 0.5 here",
        "another folder": f"workdir='{tmp_path}/run1' is not the folder in which process 0 writes",
    }
    for result in results:
        assert result.returncode == 2, result.stderr
        assert expected[mistake] in result.stderr
        assert "Traceback" not in result.stderr
    assert "process 1: " in results[0].stderr
