"""Reads a run's log as a user would who has only the log."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from mobilellm_jax import announce
from mobilellm_jax.config import Config, MeshConfig, QuantizeConfig
from mobilellm_jax.data.mixture import Mixture, open_mixture
from mobilellm_jax.processes import distributed
from mobilellm_jax.sharding import logical_rules, make_mesh
from mobilellm_jax.storage import rundir
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import abstract_state
from tests import tiny


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return open_mixture(str(tiny.prepared_words(tmp_path_factory.mktemp("words"))))


@pytest.fixture(autouse=True)
def _show_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


def started(config: Config, mixture: Mixture, resume_step: int | None) -> None:
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    rules = logical_rules(config.model, dict(mesh.shape))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = abstract_state(config, optimizer, mesh, rules)
    announce.start(config, mixture, mesh, state, resume_step)


def test_the_start_says_what_the_numbers_of_the_log_mean(
    mixture: Mixture, caplog: pytest.LogCaptureFixture
) -> None:
    model = dataclasses.replace(tiny.RUN.model, num_repeats=2, sharing="reverse")
    config = dataclasses.replace(
        tiny.RUN, model=model, mesh=MeshConfig(data=1), quantize=QuantizeConfig(scheme="w4a8")
    )
    started(config, mixture, 8)
    text = caplog.text
    # The count by hand: a tied table of 300 x 16; per block 16 x (2 + 1 + 1) x 8 + 16 x 16 of
    # attention, 3 x 16 x 24 of feed-forward and two norms; the last norm.
    parameters = 300 * 16 + 2 * (16 * 4 * 8 + 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert f"{parameters:,} parameters, 2 blocks x 2 (reverse), width 16, 2 heads over 1" in text
    assert "batch   8 x 16 = 128 tokens, 16 steps" in text
    counts = mixture.components[0].counts("train")
    epochs = 16 * 128 / counts.tokens
    assert f"{counts.tokens:,} tokens of {counts.documents} documents, {epochs:.2f} ep" in text
    assert "attention crosses document borders" in text
    # In float32, AdamW's moments take twice as much memory as the parameters.
    assert f"{4e-6 * parameters:.1f} MB of parameters and {8e-6 * parameters:.1f} MB of opt" in text
    assert "quantize trained for w4a8" in text
    assert "resume  from step 8" in text
    caplog.clear()
    started(tiny.RUN, mixture, None)
    text = caplog.text
    assert "2 blocks, width" in text
    assert "quantize" not in text
    assert "resume" not in text


@pytest.mark.parametrize("finished", [True, False])
def test_the_end_says_what_came_of_it_and_what_to_type(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, finished: bool
) -> None:
    records = [
        {"step": 0, "validation/loss": 5.7, "validation/bpb": 4.1},
        {"step": 8, "train/loss": 3.0},
        {"step": 8, "validation/loss": 2.5, "validation/bpb": 1.8},
        {"step": 9, "train/loss": 2.9},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / rundir.METRICS).write_text(lines)
    announce.end(tmp_path, finished, {"drawing loss.png": "OSError: no space"})
    text = caplog.text
    assert re.search(r"validation bits per byte: +4.100 at step 0 -> 1.800 at step 8\n", text)
    assert re.search(r"validation loss: +5.700 at step 0 -> 2.500 at step 8 \(nats", text)
    assert "\n  failed: drawing loss.png (OSError: no space)\n" in text
    assert f"tensorboard --logdir={tmp_path}/tensorboard\n" in text
    assert f"{'Finished' if finished else 'Stopped, saved'}: {tmp_path}\n" in text
    assert (f"mobilellm export --checkpoint={tmp_path}" in text) is finished
    assert ("the same command again goes on" in text) is not finished


def test_one_process_speaks_for_all(
    mixture: Mixture,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    (tmp_path / rundir.METRICS).write_text("")
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    started(tiny.RUN, mixture, None)
    announce.going_back(range(3, 6), 2)
    announce.end(tmp_path, True, {})
    assert caplog.text == ""
