"""Predicts the time of a compiled step on a TPU by bounds and an estimate; needs no TPU.

The bounds follow from the chip's peak rates of arithmetic, memory and network. The estimate has two
parts: libtpu's estimates for all instructions (`estimated_cycles`), and the time of the attention
kernels. libtpu has no estimate for kernels, so this module computes their time from their FLOPs. It
uses no measurement.
"""

import dataclasses
from collections.abc import Sequence

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import CompiledStep
from mobilellm_jax.plan.topology import Chip
from mobilellm_jax.train.metrics import peak_flops

# Number of matrix multiplications in each attention kernel. `fwd` computes scores and output. `dkv`
# computes scores and the gradients of attention weights, keys and values. `dq` computes scores and
# the gradients of attention weights and queries.
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
_BLOCK = 512  # Number of queries and of keys in a block. Diagonal blocks are computed in full.


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted seconds per step, which are the same for all chips."""

    peak_flops: float  # Dense bfloat16 peak of a chip in FLOP/s.
    flops_sec: float  # Time of the model FLOPs at the peak rate.
    memory_sec: float  # Time to read and write all memory of the step once.
    network_sec: float  # Time to send all bytes over all links at the same time.
    estimated_sec: float | None  # Estimate of libtpu without attention kernels, or None.
    kernels_sec: float  # Time of the attention kernels at the rate that head_dim allows.

    @property
    def roofline_sec(self) -> float:
        return max(self.flops_sec, self.memory_sec, self.network_sec)

    @property
    def fastest_sec(self) -> float:
        """Time if communication overlaps with arithmetic; the roofline if there is no estimate."""
        if self.estimated_sec is None:
            return self.roofline_sec
        return max(self.estimated_sec + self.kernels_sec, self.roofline_sec)

    @property
    def slowest_sec(self) -> float:
        """Time if no communication overlaps with arithmetic; without an estimate, the roofline."""
        return self.fastest_sec + (0.0 if self.estimated_sec is None else self.network_sec)


def predict(
    config: Config, step: CompiledStep, chip: Chip, devices: Sequence[jax.Device]
) -> Prediction:
    """Predicts the time of a step; `devices` are the devices of a topology of this chip."""
    account, peak = account_of(config, devices), peak_flops(devices[0])
    assert peak is not None, "the table of peaks has every chip of a topology"
    cycles = step.program.estimated_cycles
    sent = sum(collective.wire_bytes for collective in step.program.collectives)
    fill = min(1.0, config.model.head_dim / chip.matrix_unit)  # Share of a side that a head fills.
    return Prediction(
        peak_flops=peak,
        flops_sec=account.flops_per_step / peak,
        memory_sec=2 * step.peak_bytes / chip.memory_bytes_per_sec,
        network_sec=sent / chip.ici_bytes_per_sec,
        estimated_sec=None if cycles is None else cycles / (peak / chip.flops_per_cycle),
        kernels_sec=_kernel_flops(config, account.rows, step) / (peak * fill),
    )


def _kernel_flops(config: Config, rows: int, step: CompiledStep) -> float:
    model, length = config.model, config.data.seq_len
    blocks = max(1, length // _BLOCK)
    computed = (blocks + 1) / (2 * blocks)  # Share of (query, key) pairs that are computed.
    product = 2 * rows * model.num_heads * model.head_dim * length**2 * computed
    return sum(
        calls * products * product
        for kernel, calls in step.program.kernels.items()
        for part, products in _PRODUCTS.items()
        if f"_{part}" in kernel
    )
