"""What holds for every test: CPU with eight devices, no network, annotations executed.

Everything is set through the environment before jax is imported, and jax is not imported here: a
test that needs none does not pay for it, and the subprocesses of tests inherit the settings.
"""

import atexit
import gc
import ipaddress
import logging
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: a training step compiles in a tenth of the time.
_quick_compile = "--xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):
    _quick_compile += " --xla_cpu_use_fusion_emitters=false"  # 0.11 ends a process that says this
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {_quick_compile}"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# The tests of one session, their workers and subprocesses compile each program once. Nothing is
# written to the developer's home, and nothing is found from an earlier session. jax locks the cache
# only if its size is bounded. The subprocesses have a cache of their own: if one of them is killed
# while it writes, jax warns at every later write, and a warning fails a test.
if "MOBILELLM_TEST_CACHE" not in os.environ:
    os.environ["MOBILELLM_TEST_CACHE"] = tempfile.mkdtemp(prefix="mobilellm-test-cache-")
    atexit.register(shutil.rmtree, os.environ["MOBILELLM_TEST_CACHE"], ignore_errors=True)
_cache_of_workers = str(Path(os.environ["MOBILELLM_TEST_CACHE"]) / "workers")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["MOBILELLM_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2 << 30)
# A program's operations carry no call stacks: collecting them takes a tenth of the suite's time.
os.environ["JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS"] = "false"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

# From here on an array of another rank or dtype than annotated is refused in these packages.
jaxtyping.install_import_hook(
    ["mobilellm_jax.model", "mobilellm_jax.train", "mobilellm_jax.quantize"], "beartype.beartype"
)

_connect = socket.socket.connect
_resolve = socket.getaddrinfo


class NetworkBlockedError(RuntimeError):
    """A test tried to reach another machine."""


def _is_local(host: Any) -> bool:
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# Tracing makes millions of objects that live until a test ends. Python would look for garbage among
# them thousands of times, which took a seventh of the suite's time.
gc.set_threshold(200_000, 50, 1000)


def pytest_collection_finish() -> None:
    """Gives this process the cache of the workers, now that the files of the tests are imported."""
    if "jax" in sys.modules:
        from jax.experimental.compilation_cache import compilation_cache

        sys.modules["jax"].config.update("jax_compilation_cache_dir", _cache_of_workers)
        compilation_cache.reset_cache()  # A module may have compiled something.


@pytest.fixture(autouse=True, scope="module")
def _memory_of_a_module() -> Iterator[None]:
    """Collects the garbage of a module; drops compiled programs if they take much memory."""
    yield
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if "jax" in sys.modules and pages * resource.getpagesize() > 2e9:
        sys.modules["jax"].clear_caches()
    gc.collect()
    gc.freeze()  # later collections skip what is left


@pytest.fixture(autouse=True)
def _caplog_sees_messages() -> None:
    """Undoes a `show_messages` of an earlier test, which hides messages from pytest's caplog."""
    logging.getLogger("mobilellm_jax").propagate = True


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not _is_local(address[0]):
            raise NetworkBlockedError(f"connect to {address}")
        _connect(self, address)

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise NetworkBlockedError(f"look up {host}")
        return _resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
