"""Measures how much the compile cache saves when a run is started a second time.

  python benchmarks/startup.py
  python benchmarks/startup.py --config=configs/mobilellm_125m.py --config.data.path=DIR ...

Each start is a separate process that takes one step and then stops as after SIGTERM. The first
start has an empty cache, the second start continues the run, and the third start begins another run
of the same config. The times are tracing, lowering and compiling, without execution. The event
`backend_compile` of jax includes reading the cache.

The exit code is 1 if the second start lowers and compiles for more than 30% of the first start's
time.
"""

import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT = 0.3
EVENTS = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile": "/jax/core/compile/backend_compile_duration",
}


def start(flags: list[str], workdir: Path, cache: Path) -> dict[str, float]:
    """Runs one start in a separate process; returns seconds by kind, and cache hits."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, __file__, "--one_start", *flags, f"--workdir={workdir}"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=3600
    )
    if result.returncode != 75:
        sys.exit(f"a start ended with exit code {result.returncode} instead of 75 (stopped)")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def one_start(flags: list[str]) -> int:
    """Trains one step in this process and prints the times as JSON."""
    began = time.perf_counter()
    import jax

    from mobilellm_jax import pretrain
    from mobilellm_jax.cli.main import main

    seconds: collections.Counter[str] = collections.Counter()
    hits = 0

    def add(event: str, duration: float, **_: Any) -> None:
        seconds[event] += duration

    def count(event: str, **_: Any) -> None:
        nonlocal hits
        hits += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(add)
    jax.monitoring.register_event_listener(count)
    make = pretrain.make_train_step
    first_step = 0.0

    def make_and_stop(*arguments: Any) -> Any:
        step_fn = make(*arguments)

        def step(state: Any, batch: Any) -> Any:
            nonlocal first_step
            stepped = jax.block_until_ready(step_fn(state, batch))
            first_step = first_step or time.perf_counter() - began
            signal.raise_signal(signal.SIGTERM)
            return stepped

        return step

    pretrain.make_train_step = make_and_stop
    status = main(["train", *flags])
    values = {name: seconds[event] for name, event in EVENTS.items()}
    print(json.dumps({**values, "hits": hits, "first step after": first_step}))
    return status


def benchmark(flags: list[str]) -> int:
    """Prints the table and returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        cache, run, other = (Path(folder, name) for name in ("cache", "run", "other"))
        starts = {
            "first (cold)": start(flags, run, cache),
            "second (same run)": start(flags, run, cache),
            "another run": start(flags, other, cache),
        }
        files = list(cache.glob("*-cache"))
        size = sum(file.stat().st_size for file in files)
    names = [*EVENTS, "hits", "first step after"]
    print(f"{'start':<20}" + "".join(f"{name:>18}" for name in names))
    for name, values in starts.items():
        cells = (f"{values[n]:.0f}" if n == "hits" else f"{values[n]:.2f} s" for n in names)
        print(f"{name:<20}" + "".join(f"{cell:>18}" for cell in cells))
    cold, *warm = starts.values()
    ratio = 0.0
    for name, values in zip([*starts][1:], warm, strict=True):
        of_compile, of_all = (
            sum(values[k] for k in kinds) / sum(cold[k] for k in kinds)
            for kinds in (("lower", "compile"), ("trace", "lower", "compile"))
        )
        ratio = ratio or of_compile
        print(
            f"{name}: {of_compile:.1%} of the cold lowering and compilation, "
            f"{of_all:.1%} with tracing"
        )
    print(f"cache: {len(files)} programs, {size / 1e6:.1f} MB")
    print(f"limit {LIMIT:.0%} for the second start: {'kept' if ratio <= LIMIT else 'exceeded'}")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one_start"]:
        sys.exit(one_start(sys.argv[2:]))
    flags = sys.argv[1:]
    if not any(flag.startswith("--config=") for flag in flags):
        flags = ["--config=configs/quickstart.py", *flags]
    sys.exit(benchmark(flags))
