"""Tests which flags of XLA are set, that the user's flags win, and that XLA knows them all."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from mobilellm_jax.config import ConfigError
from mobilellm_jax.startup import xla_flags
from mobilellm_jax.startup.xla_flags import is_deterministic, set_xla_flags

DETERMINISTIC = "--xla_gpu_deterministic_ops"


@pytest.fixture(autouse=True)
def _gpu_and_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that a GPU plugin is installed and that the user has set no flags."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "jax_cuda13_plugin")
    monkeypatch.delenv("XLA_FLAGS")


def test_xla_knows_every_flag() -> None:
    # XLA ends the process for an unknown flag, on CPU as on GPU.
    set_xla_flags(deterministic=True)
    script = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    flags = os.environ["XLA_FLAGS"]
    assert set(flags.split()) == {
        f"--{name}={value}"
        for name, value in (xla_flags._GPU | xla_flags._GPU_DETERMINISTIC).items()
    }
    for given, status in ((flags, 0), (f"{flags} --xla_gpu_no_such_flag=1", 1)):
        environment = {**os.environ, "XLA_FLAGS": given, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert bool(result.returncode) == bool(status), result.stderr


def test_deterministic_is_asked_for() -> None:
    assert DETERMINISTIC not in set_xla_flags(deterministic=False)
    assert not is_deterministic()
    assert f"{DETERMINISTIC}=true" in set_xla_flags(deterministic=True)
    assert is_deterministic()
    assert set_xla_flags(deterministic=True) == "none"  # every flag is there already


def test_flags_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=x"
    monkeypatch.setenv("XLA_FLAGS", given)
    assert set_xla_flags(deterministic=False) == "none"
    assert os.environ["XLA_FLAGS"] == given
    set_xla_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"] == f"{DETERMINISTIC}=true {given}"


def test_contradiction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"{DETERMINISTIC}=false")
    assert set_xla_flags(deterministic=False)
    with pytest.raises(ConfigError, match=r"train\.deterministic=True contradicts.*ops=false"):
        set_xla_flags(deterministic=True)


def test_unknown_jaxlib_gets_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metadata.version("jaxlib").startswith(xla_flags._TESTED_JAXLIB)
    monkeypatch.setattr(metadata, "version", lambda name: "0.99.0")
    assert "0.99.0 was not tested" in set_xla_flags(deterministic=False)
    assert "XLA_FLAGS" not in os.environ
    with pytest.raises(ConfigError, match=r"jaxlib 0\.99\.0"):
        set_xla_flags(deterministic=True)
    monkeypatch.setenv("XLA_FLAGS", f"{DETERMINISTIC}=true")  # the user has set the flag
    set_xla_flags(deterministic=True)


def test_machine_without_gpu_gets_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert set_xla_flags(deterministic=True) == "none"
    assert "XLA_FLAGS" not in os.environ
