import os
from pathlib import Path

import pytest

from mobilellm_jax.config import ConfigError
from mobilellm_jax.sweep import slots
from mobilellm_jax.sweep.slots import find_slots


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Reports four GPUs, as a plugin and nvidia-smi would."""
    monkeypatch.setattr(slots.importlib.util, "find_spec", lambda name: object())
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: H100 (UUID: x)"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return {}


def test_one_run_per_gpu(gpus: dict[str, str]) -> None:
    devices = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in find_slots(None, gpus)]
    assert devices == ["0", "1", "2", "3"]
    pairs = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in find_slots(2, gpus)]
    assert pairs == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match="--parallel=5 must be at most 4, the number of GPUs"):
        find_slots(5, gpus)


def test_gpus_that_are_given(gpus: dict[str, str]) -> None:
    given = find_slots(None, {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in given] == ["2", "3"]
    on_cpu = find_slots(None, {"CUDA_VISIBLE_DEVICES": "2,3", "JAX_PLATFORMS": "cpu"})
    assert [slot.environment for slot in on_cpu] == [{}]


def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5, 6})
    env = {"JAX_PLATFORMS": "cpu"}
    assert [slot.arguments for slot in find_slots(None, env)] == [()]
    assert [slot.arguments for slot in find_slots(2, env)] == [("--cores=0,1",), ("--cores=4,5",)]
    with pytest.raises(ConfigError, match="--parallel=6 must be at most 5, the number of CPU"):
        find_slots(6, env)
