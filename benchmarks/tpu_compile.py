"""Compiles the training step for a TPU that need not be present; prints cycles and memory.

    pip install "mobilellm-jax[tpu]"
    python benchmarks/tpu_compile.py
    python benchmarks/tpu_compile.py --model=350m --topology=v6e:1x1 --remat=dots,full

The script compiles the step of `train` once for each policy of `remat`. Cycles are libtpu's
estimates of all instructions, multiplied by the repetitions of the loops around them. The cycles
leave out the attention kernels, because libtpu does not estimate kernels. Cycles can compare
programs, but they do not give absolute times. "ms" is a prediction that adds the products of the
kernels, at the share of the peak that heads of this width can reach.
"""

import argparse
import dataclasses
import platform
from importlib import metadata

import jax

from mobilellm_jax.config import Config, DataConfig, TrainConfig
from mobilellm_jax.model.on_device import settle
from mobilellm_jax.paper.architectures import MOBILELLM
from mobilellm_jax.plan.compiled import TooLarge, compile_step
from mobilellm_jax.plan.prediction import predict
from mobilellm_jax.plan.topology import parse_topology, topology_devices

_GIB = 2**30
# Limits for a step of the 125M model with 8 rows on a v5e. At least one policy must keep both
# limits. Without attention kernels, layouts and loss chunks, the step took 482 M cycles and 10.9
# GiB.
_MOST_CYCLES, _MOST_TEMPORARIES = 320e6, 7 * _GIB


def main() -> None:
    """Compiles one step per policy and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="125m", choices=MOBILELLM)
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--rows", type=int, default=8, help="sequences on a chip")
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--boundaries", default="concat", choices=["concat", "document_mask"])
    parser.add_argument("--remat", default="dots,attention,full,offload")
    flags = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    topology = parse_topology(flags.topology)
    devices = topology_devices(topology)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu", "flax"))
    print(f"{versions}, Python {platform.python_version()}")
    print(
        f"MobileLLM-{flags.model}, {flags.topology}, {flags.rows} x {flags.seq_len} tokens a chip, "
        f"{flags.boundaries}"
    )
    print(f"{'remat':12}{'M cycles':>10}{'temp GiB':>10}{'peak GiB':>10}{'kernels':>9}{'ms':>8}")
    held = False
    for remat in flags.remat.split(","):
        config = settle(
            Config(
                model=dataclasses.replace(MOBILELLM[flags.model], remat=remat),
                data=DataConfig(seq_len=flags.seq_len, boundaries=flags.boundaries),
                train=TrainConfig(global_batch=flags.rows * topology.num_devices),
            ),
            devices[0],
        )
        step = compile_step(config, devices)
        if isinstance(step, TooLarge):
            print(f"{remat:12}needs {step.needed_bytes / _GIB:.2f} GiB, does not fit")
            continue
        cycles = step.program.estimated_cycles
        assert cycles is not None, "libtpu estimates cycles"
        prediction = predict(config, step, topology.chip, devices)
        calls = sum(step.program.kernels.values())
        print(
            f"{remat:12}{cycles / 1e6:10.1f}{step.temporary_bytes / _GIB:10.2f}"
            f"{step.peak_bytes / _GIB:10.2f}{calls:9}{prediction.fastest_sec * 1e3:8.1f}",
            flush=True,
        )
        held |= cycles <= _MOST_CYCLES and step.temporary_bytes <= _MOST_TEMPORARIES
    if (flags.model, flags.topology, flags.rows, flags.seq_len) == ("125m", "v5e:1x1", 8, 2048):
        limit = f"{_MOST_CYCLES / 1e6:.0f} M cycles and {_MOST_TEMPORARIES / _GIB:.0f} GiB"
        print(f"{limit} of temporaries: {'held' if held else 'NOT HELD'}")
        raise SystemExit(not held)


if __name__ == "__main__":
    main()
