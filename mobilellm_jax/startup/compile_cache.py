"""Compiled programs kept on disk, so that the second start of a run finds what the first compiled.

jax does the work; here is only where, and what is worth it. The folder is the user's own
(`~/.cache/mobilellm/compiled`, `XDG_CACHE_HOME` respected): whoever can write there can run code in
this process. jax's own settings win: `JAX_COMPILATION_CACHE_DIR` names another folder, such as one
that the hosts of a pod share, and `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. It can be
deleted at any time.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax

# A step takes seconds to minutes to compile. What takes less than this is compiled anew sooner than
# it is found, and would fill the folder with a file per scalar operation.
_WORTH_SEC = 0.1


def use_compile_cache() -> str:
    """Turns the cache on, unless the user has decided; returns a line that says where it is.

    Call it before anything compiles: jax looks at these settings once.
    """
    if not _setting("jax_enable_compilation_cache"):
        return "off (JAX_ENABLE_COMPILATION_CACHE)"
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_SEC)
    chosen = _setting("jax_compilation_cache_dir")
    if chosen:
        return str(chosen)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
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
    """Names what the host can execute: a home folder may be shared, and jax's key ignores it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    features = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{features}"


def _setting(name: str) -> object:
    return jax.config.values[name]
