"""Keeps compiled programs on disk, so that a restarted run does not compile them again.

jax writes and reads the files. This file only chooses the folder and which programs jax keeps.
The folder belongs to the user (`~/.cache/mobilellm/compiled`, or below `XDG_CACHE_HOME`), because
anyone who can write there can run code in this process. jax's own settings take precedence:
`JAX_COMPILATION_CACHE_DIR` names another folder, for example one that several hosts share, and
`JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. The folder can be deleted at any time.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax

from mobilellm_jax.startup.cpu import cpu_features
from mobilellm_jax.storage.unknown_owners import accept_unknown_owners
from mobilellm_jax.storage.user_path import expand_home

# jax keeps a program if its compilation takes at least this time; a training step takes seconds or
# minutes. jax compiles a scalar operation faster than it finds a file, so it needs no file.
_WORTH_SEC = 0.1


def use_compile_cache() -> str:
    """Turns the cache on, unless the user turned it off; returns the folder or "off".

    Call this function before anything compiles, because jax reads these settings only once.
    """
    accept_unknown_owners()
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        return "off (JAX_ENABLE_COMPILATION_CACHE)"
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_SEC)
    if chosen := settings["jax_compilation_cache_dir"]:
        expanded = expand_home("JAX_COMPILATION_CACHE_DIR", chosen)
        jax.config.update("jax_compilation_cache_dir", expanded)
        return expanded
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser()
    except RuntimeError:  # In a container, a user may have no home folder.
        return "off (the system knows no home folder; JAX_COMPILATION_CACHE_DIR names a folder)"
    folder = caches / "mobilellm" / "compiled" / _processor()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"off ({folder}: {error.strerror}; JAX_COMPILATION_CACHE_DIR names another)"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"off ({folder} cannot be written; JAX_COMPILATION_CACHE_DIR names another)"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return str(folder)


def _processor() -> str:
    """Returns a CPU name: hosts may share a home folder, and jax's cache key omits the CPU."""
    features = hashlib.sha256(" ".join(sorted(cpu_features())).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{features}"
