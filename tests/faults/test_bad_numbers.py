"""Runs whose numbers go wrong: in a batch, in the optimizer, in the parameters; and odd clocks."""

import dataclasses
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from mobilellm_jax import checkpoint, pretrain
from mobilellm_jax.cli.main import main
from mobilellm_jax.config import Config
from mobilellm_jax.evaluate import in_training
from mobilellm_jax.startup.messages import show_messages
from mobilellm_jax.train.state import TrainState
from mobilellm_jax.train.step import StepMetrics
from tests.faults.records import assert_same_run, log

STEPS = 16


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[Config, Any] = {}

    def made_once(config: Config, *rest: Any) -> Any:
        if config not in made:
            made[config] = make(config, *rest)
        return made[config]

    return made_once


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """The runs of this file have one config, so they can share their jitted functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "make_train_step", once(pretrain.make_train_step))
        patch.setattr(in_training, "make_loss_sums", once(in_training.make_loss_sums))
        yield


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert pretrain.pretrain(config, workdir)
    assert not any("train/skipped_steps" in record for record in log(workdir))
    return workdir


def poison_batches(
    monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool], wrong: float = np.nan
) -> None:
    """From now on a weight is wrong in the batches of these steps, counted from 1."""
    read = pretrain.train_batches

    def batches(*args: Any, **keywords: Any) -> Iterator[Mapping[str, np.ndarray]]:
        step = keywords["first_sample"] // keywords["global_batch"]
        for batch in read(*args, **keywords):
            step += 1
            weights = batch["weights"].copy()
            if is_bad(step):
                weights[1, 2] = wrong
            yield {**batch, "weights": weights}

    monkeypatch.setattr(pretrain, "train_batches", batches)


def damage_once(
    monkeypatch: pytest.MonkeyPatch, after: int, damage: Callable[[TrainState], TrainState]
) -> None:
    """From now on the first state that a run has after step `after` is damaged."""
    make = pretrain.make_train_step
    done: list[int] = []

    def make_damaging(*args: Any) -> Any:
        step_fn = make(*args)

        def step(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
            state, metrics = step_fn(state, batch)
            if int(state.step) == after and not done:
                done.append(after)
                state = damage(state)
            return state, metrics

        return step

    monkeypatch.setattr(pretrain, "make_train_step", make_damaging)


def with_wrong(leaf: jax.Array, wrong: float) -> jax.Array:
    host = np.array(leaf)
    host.flat[0] = wrong
    return jax.device_put(host, leaf.sharding)


def wrong_in_optimizer(moment: str, wrong: float) -> Callable[[TrainState], TrainState]:
    def damage(state: TrainState) -> TrainState:
        moments = optax.tree.get(state.optimizer, moment)
        moments["final_norm"]["scale"] = with_wrong(moments["final_norm"]["scale"], wrong)
        optimizer = optax.tree.set(state.optimizer, **{moment: moments})
        return dataclasses.replace(state, optimizer=optimizer)

    return damage


@pytest.fixture(autouse=True)
def _messages() -> None:
    show_messages()


def wrong_in_parameters(state: TrainState) -> TrainState:
    table = with_wrong(state.params["embedding"]["table"], np.nan)
    host = np.array(table)
    host[:] = np.where(np.arange(len(host))[:, None] == 1, np.nan, host)  # BOS
    embedding = {"table": jax.device_put(host, table.sharding)}
    return dataclasses.replace(state, params={**state.params, "embedding": embedding})


def test_one_bad_batch_is_skipped_counted_and_told(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    poison_batches(monkeypatch, lambda step: step == 5)
    assert pretrain.pretrain(config, tmp_path / "run")
    assert "SKIPPED step 5" in (text := capsys.readouterr().err)
    assert "samples 32 to 39" in text
    assert "GOING BACK" not in text
    (skipped,) = [r for r in log(tmp_path / "run") if "train/skipped_steps" in r]
    assert skipped == {
        **{"step": 5, "train/skipped_steps": 1, "train/bad_steps": 1, "train/first_sample": 32},
        **{"train/learning_rate": skipped["train/learning_rate"], "train/attention": "xla"},
    }
    assert checkpoint.steps(tmp_path / "run") == [8, 12, 16]


@pytest.mark.parametrize(
    ("after", "damage", "back_to"),
    [
        pytest.param(6, wrong_in_optimizer("nu", -1.0), 4, marks=pytest.mark.soak),
        (6, wrong_in_parameters, 4),
        # Saved like that: the checkpoint of step 8 is passed over.
        (8, wrong_in_optimizer("mu", np.nan), 4),
    ],
    ids=["variance", "embedding row", "momentum, saved"],
)
def test_damaged_state_heals_by_going_back(
    after: int,
    damage: Callable[[TrainState], TrainState],
    back_to: int,
    config: Config,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    damage_once(monkeypatch, after, damage)
    assert pretrain.pretrain(config, tmp_path / "run")
    text = capsys.readouterr().err
    told = [line for line in text.splitlines() if "SKIPPED" in line]
    # It is noticed one step late, when one more was skipped, unless that step is due to be saved.
    assert len(told) - config.train.max_bad_steps in (0, 1)
    assert re.findall(r"GOING BACK to the checkpoint of step (\d+)", text) == [str(back_to)]
    assert_same_run(tmp_path / "run", undisturbed, STEPS)
    assert checkpoint.steps(tmp_path / "run") == checkpoint.steps(undisturbed)


def test_bad_data_ends_the_run_with_commands_that_work(
    config: Config, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison_batches(patch, lambda step: step >= 10, wrong=np.inf)
        with pytest.raises(pretrain.TrainingDivergedError) as error:
            pretrain.pretrain(config, workdir)
    message = str(error.value)
    assert "steps 10 to 12 (train.max_bad_steps=3)" in message
    assert "again after going back to the checkpoint of step 8" in message
    text = capsys.readouterr().err
    assert text.count("GOING BACK") == 1
    assert len([line for line in text.splitlines() if "SKIPPED" in line]) == 6
    # The batch of step 10, the first bad one.
    (line,) = [line for line in message.splitlines() if "mobilellm inspect" in line]
    _, *command = shlex.split(line)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Window 1 of 8 (sample 72), tokens:" in shown
    assert "Window 8 of 8 (sample 79), tokens:" in shown

    # Everything up to there is kept, and with the data in order the same command goes on.
    assert checkpoint.steps(workdir) == [4, 8]
    assert pretrain.pretrain(config, workdir)
    assert_same_run(workdir, undisturbed, STEPS)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_batches(monkeypatch, lambda step: step >= 2)
    with pytest.raises(pretrain.TrainingDivergedError, match="steps 2 to 4.*no checkpoint before"):
        pretrain.pretrain(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_clock_that_goes_backwards_changes_nothing(
    config: Config, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at it says an hour less, over a run and its resumption."""
    now = [time.time()]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert not pretrain.pretrain(config, tmp_path / "run")
    assert pretrain.pretrain(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed, STEPS)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on a run stops after so many steps of its own, as if all processes had agreed."""

    class Agreement:
        def __init__(self, first_step: int | None = None) -> None:
            # The loop's agreement counts steps. The checkpoint writer's agreement has no step.
            self._left = step if first_step is not None else -1

        def __call__(self, asked: bool) -> bool:
            self._left -= 1
            return self._left == 0

    monkeypatch.setattr(pretrain, "Agreement", Agreement)
