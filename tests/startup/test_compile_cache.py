"""Tests where compiled programs are kept, and that a second process finds them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys
from mobilellm_jax.startup.compile_cache import use_compile_cache
print(use_compile_cache())
import jax, jax.numpy as jnp
counts = {}
def count(event, **_):
    counts[event] = counts.get(event, 0) + 1
jax.monitoring.register_event_listener(count)
jax.jit(lambda x: jnp.sort(x @ x, axis=0))(jnp.ones((64, 64)))
print(counts.get("/jax/compilation_cache/cache_hits", 0))
"""


def start(home: Path, *, warnings: str = "error", **variables: str) -> list[str]:
    """Starts a process with this home folder; returns the place of its cache and its cache hits."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))},
        "JAX_PLATFORMS": "cpu",
        "HOME": str(home),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }
    command = [sys.executable, "-W", warnings, "-c", SCRIPT]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_second_start_finds_what_the_first_compiled(tmp_path: Path) -> None:
    place, hits = start(tmp_path)
    folder = Path(place)
    assert folder.parent == tmp_path / ".cache" / "mobilellm" / "compiled"
    assert folder.stat().st_mode & 0o077 == 0  # anyone who can write here can run code as the user
    assert hits == "0"
    assert list(folder.glob("*-cache"))
    place, hits = start(tmp_path)
    assert place == str(folder)
    assert int(hits) >= 1


def test_the_user_may_choose_the_folder_of_caches(tmp_path: Path) -> None:
    place, _ = start(tmp_path, XDG_CACHE_HOME=str(tmp_path / "caches"))
    assert Path(place).parent == tmp_path / "caches" / "mobilellm" / "compiled"


def test_jaxs_own_settings_win(tmp_path: Path) -> None:
    place, _ = start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "shared"))
    assert place == str(tmp_path / "shared")
    assert list((tmp_path / "shared").glob("*-cache"))
    off, _ = start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert off.startswith("off")
    assert not (tmp_path / ".cache").exists()


def test_small_programs_are_not_kept(tmp_path: Path) -> None:
    place, _ = start(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="60")
    assert not list(Path(place).glob("*-cache"))


def test_a_home_folder_without_write_access_turns_the_cache_off(tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("a file where the folder should be")
    place, hits = start(tmp_path)
    assert place.startswith(f"off ({tmp_path}/.cache/mobilellm")
    assert "JAX_COMPILATION_CACHE_DIR" in place
    assert hits == "0"


@pytest.mark.parametrize("given", [None, "7"])
def test_the_user_may_set_the_threshold(given: str | None, tmp_path: Path) -> None:
    script = "import jax; from mobilellm_jax.startup.compile_cache import use_compile_cache;"
    script += "use_compile_cache();"
    script += "print(jax.config.jax_persistent_cache_min_compile_time_secs)"
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "HOME": str(tmp_path)}
    environment.pop(name)  # the tests set it
    environment |= {} if given is None else {name: given}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert float(result.stdout) == (0.1 if given is None else 7.0)
