"""Predicts the time of a compiled step on a TPU by bounds and an estimate; needs no TPU.

The bounds follow from the chip's peak rates of arithmetic, memory and network. The estimate has two
parts: libtpu's estimates for all instructions (`estimated_cycles`), and the time of the attention
kernels. libtpu has no estimate for kernels, so this module computes their time from their FLOPs. It
uses no measurement.
"""

import dataclasses

from mobilellm_jax.config import Config
from mobilellm_jax.plan.accounting import Account
from mobilellm_jax.plan.compiled import CompiledStep
from mobilellm_jax.plan.topology import Chip

# Number of matrix multiplications in each attention kernel. `fwd` computes scores and output. `dkv`
# computes scores and the gradients of attention weights, keys and values. `dq` computes scores and
# the gradients of attention weights and queries.
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
_BLOCK = 512  # Number of queries and of keys in a block. Diagonal blocks are computed in full.


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted seconds per step, which are the same for all chips."""

    peak_flops: float
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
        """Time if all communication overlaps with arithmetic; without an estimate, the roofline."""
        if self.estimated_sec is None:
            return self.roofline_sec
        return max(self.estimated_sec + self.kernels_sec, self.roofline_sec)

    @property
    def slowest_sec(self) -> float:
        """Time if no communication overlaps with arithmetic; without an estimate, the roofline."""
        return self.fastest_sec + (0.0 if self.estimated_sec is None else self.network_sec)


def predict(
    config: Config, account: Account, step: CompiledStep, chip: Chip, peak_flops: float
) -> Prediction:
    """Predicts the time of a step; `peak_flops` is a chip's dense bfloat16 peak in FLOP/s."""
    cycles = step.program.estimated_cycles
    cycles_per_sec = peak_flops / chip.flops_per_cycle
    sent = sum(collective.wire_bytes for collective in step.program.collectives)
    return Prediction(
        peak_flops=peak_flops,
        flops_sec=account.flops_per_step / peak_flops,
        memory_sec=2 * step.peak_bytes / chip.memory_bytes_per_sec,
        network_sec=sent / chip.ici_bytes_per_sec,
        estimated_sec=None if cycles is None else cycles / cycles_per_sec,
        kernels_sec=_kernel_flops(config, account, step) / (peak_flops * _fill(config, chip)),
    )


def _kernel_flops(config: Config, account: Account, step: CompiledStep) -> float:
    model, length = config.model, config.data.seq_len
    blocks = max(1, length // _BLOCK)
    computed = (blocks + 1) / (2 * blocks)  # Share of (query, key) pairs that are computed.
    product = 2 * account.rows * model.num_heads * model.head_dim * length**2 * computed
    return sum(
        calls * products * product
        for kernel, calls in step.program.kernels.items()
        for part, products in _PRODUCTS.items()
        if f"_{part}" in kernel
    )


def _fill(config: Config, chip: Chip) -> float:
    """Returns the share of a matrix unit's side that the `head_dim` channels of a head fill."""
    return min(1.0, config.model.head_dim / chip.matrix_unit)
