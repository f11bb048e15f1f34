"""Compares the cost of a training step with its FLOP count, over tokens, depth, width and meshes.

  python benchmarks/scaling.py                      # 8 simulated CPU devices
  python benchmarks/scaling.py --devices=4 --steps=20

`model` is the FLOP count of `model/size.py`. `XLA` is the compiler's count for the step's program
over all devices. XLA also counts attention scores that the causal mask hides, and operations other
than matrix products. The program has no loops, because XLA counts the body of a loop once. Times
are medians, and they are only meaningful on a quiet machine; small shapes mostly measure overhead.

The exit code is 1 if XLA's count grows with an exponent outside 1 +- 0.1 of the model's count, if a
mesh does more than 10% more work than one device, or if time grows with an exponent over 1.2.
"""

import argparse
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobilellm_jax.config import Config, MeshConfig


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result for one shape on one mesh."""

    name: str
    model_flops: float
    xla_flops: float
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the results and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8, help="simulated CPU devices")
    parser.add_argument("--steps", type=int, default=5, help="timed steps for each shape")
    options = parser.parse_args(arguments)
    # jax reads these variables when it starts.
    os.environ["JAX_PLATFORMS"] = "cpu"
    simulated = f"--xla_force_host_platform_device_count={options.devices}"
    os.environ["XLA_FLAGS"] = f"{simulated} {os.environ.get('XLA_FLAGS', '')}"
    from mobilellm_jax.config import MeshConfig

    devices = options.devices
    base = base_config(rows=devices)
    groups = {
        "tokens": [base_config(rows=devices * k) for k in (1, 2, 4)],
        "depth": [base_config(rows=devices, blocks=k) for k in (2, 4, 8)],
        "width": [base_config(rows=devices, width=k) for k in (64, 128, 256)],
    }
    meshes = {f"data {devices}": MeshConfig(), f"fsdp {devices}": MeshConfig(data=1, fsdp=-1)}
    if devices % 4 == 0:
        meshes[f"fsdp {devices // 2}, tensor 2"] = MeshConfig(data=1, fsdp=-1, tensor=2)
        meshes[f"data {devices // 4}, fsdp 2, tensor 2"] = MeshConfig(fsdp=2, tensor=2)
        meshes[f"data {devices // 2}, sequence 2"] = MeshConfig(sequence=2)

    print(f"{'':<28}{'model':>10}{'XLA':>10}{'XLA/model':>11}{'step':>11}{'GFLOP/s':>9}")
    wrong = []
    for group, configs in groups.items():
        rows = [measure(describe(c), c, MeshConfig(), devices, options.steps) for c in configs]
        show(group, rows)
        work, seconds = exponent(rows, "xla_flops"), exponent(rows, "seconds")
        print(f"  exponents of growth over work: XLA's count {work:.3f}, time {seconds:.2f}")
        if abs(work - 1) > 0.1:
            wrong.append(f"{group}: XLA's count grows with exponent {work:.3f}")
        if seconds > 1.2:
            wrong.append(f"{group}: time grows with exponent {seconds:.2f}")
    one = measure("one device", base, MeshConfig(), 1, options.steps)
    rows = [measure(name, base, mesh, devices, options.steps) for name, mesh in meshes.items()]
    show("meshes", [one, *rows])
    wrong += [
        f"{row.name}: {row.xla_flops / one.xla_flops:.2f} times the work of one device"
        for row in rows
        if row.xla_flops > 1.1 * one.xla_flops
    ]
    print("\n".join(wrong) if wrong else "cost grows like work, and no mesh repeats work")
    return int(bool(wrong))


def base_config(*, rows: int, blocks: int = 2, width: int = 128) -> "Config":
    """Returns the config of a run with a step that has no loops."""
    from mobilellm_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

    return Config(
        model=ModelConfig(
            vocab_size=512,
            embed_dim=width,
            num_blocks=blocks,
            num_heads=width // 32,
            num_kv_heads=width // 32,
            head_dim=32,
            ffn_dim=3 * width,
            max_seq_len=128,
            attention="xla",
            compute_dtype="float32",
            scan_unroll=blocks,
        ),
        data=DataConfig(seq_len=128),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(steps=1000, global_batch=rows, loss_chunk=1 << 30),
    )


def describe(config: "Config") -> str:
    """Returns the name of the shape."""
    model = config.model
    return f"{config.train.global_batch} rows, {model.num_blocks} x {model.embed_dim}"


def measure(name: str, config: "Config", mesh: "MeshConfig", devices: int, steps: int) -> Measured:
    """Compiles the step, reads XLA's count and times the step."""
    import jax
    import numpy as np

    from mobilellm_jax.model.size import flops_per_token
    from mobilellm_jax.sharding import logical_rules, make_mesh, put_batch
    from mobilellm_jax.train.optimizer import make_optimizer
    from mobilellm_jax.train.state import init_state
    from mobilellm_jax.train.step import make_train_step

    made = make_mesh(mesh, jax.devices()[:devices])
    rules = logical_rules(config.model, made.shape)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(config, optimizer, made, rules)
    shape = (config.train.global_batch, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(shape, np.float32)}
    placed = put_batch(batch, made, config.train.global_batch)
    step_fn = make_train_step(config, optimizer, made, rules, state)
    compiled = step_fn.lower(state, placed).compile()
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, placed))
        seconds.append(time.perf_counter() - began)
    per_token = flops_per_token(config.model, config.data.seq_len)
    return Measured(
        name=name,
        model_flops=per_token * math.prod(shape),
        xla_flops=compiled.cost_analysis()["flops"] * devices,
        seconds=statistics.median(seconds[1:]),
    )


def exponent(rows: Sequence[Measured], field: str) -> float:
    """Returns the exponent of a field's growth over the model's FLOPs, from first to last row."""
    first, last = rows[0], rows[-1]
    growth = math.log(getattr(last, field) / getattr(first, field))
    return growth / math.log(last.model_flops / first.model_flops)


def show(title: str, rows: Sequence[Measured]) -> None:
    """Prints some rows of the table under a title."""
    print(title)
    for row in rows:
        print(
            f"  {row.name:<26}{row.model_flops / 1e9:>8.2f} G{row.xla_flops / 1e9:>8.2f} G"
            f"{row.xla_flops / row.model_flops:>11.3f}{1000 * row.seconds:>8.1f} ms"
            f"{row.model_flops / row.seconds / 1e9:>9.1f}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
