"""Predicts the time of a compiled step on a TPU without a TPU: bounds, and an estimate.

The bounds follow from the peak numbers of the chip. The estimate is the sum of libtpu's estimates
for all instructions (`estimated_cycles`), plus the time of the attention kernels, which is computed
from their FLOPs because libtpu has no estimate for kernels. Nothing here was measured.
"""

import dataclasses

from mobilellm_jax.config import Config
from mobilellm_jax.plan.accounting import Account
from mobilellm_jax.plan.compiled import CompiledStep
from mobilellm_jax.plan.topology import Chip

# Number of matrix products over the keys in each kernel. fwd: scores, output. dkv: scores, gradient
# of the attention weights, gradients of keys and values. dq: scores, gradient of the attention
# weights, gradient of queries.
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
_BLOCK = 512  # side of a block; blocks on the diagonal are computed whole


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds per step; all chips of the slice work alike."""

    peak_flops: float
    flops_sec: float  # time of the model FLOPs at the peak
    memory_sec: float  # time to read and write once all memory that the step holds
    network_sec: float  # time to send all bytes over all links together
    estimated_sec: float | None  # libtpu's estimate without kernels
    kernels_sec: float  # attention kernels, at the share of the peak that head_dim allows

    @property
    def roofline_sec(self) -> float:
        return max(self.flops_sec, self.memory_sec, self.network_sec)

    @property
    def fastest_sec(self) -> float:
        """The estimate with all communication hidden; without an estimate, the roofline."""
        if self.estimated_sec is None:
            return self.roofline_sec
        return max(self.estimated_sec + self.kernels_sec, self.roofline_sec)

    @property
    def slowest_sec(self) -> float:
        """The estimate with no communication hidden."""
        return self.fastest_sec + (0.0 if self.estimated_sec is None else self.network_sec)


def predict(
    config: Config, account: Account, step: CompiledStep, chip: Chip, peak_flops: float
) -> Prediction:
    """Returns the prediction; `peak_flops` is the dense bfloat16 peak of a chip in FLOP/s."""
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
    computed = (blocks + 1) / (2 * blocks)  # share of all pairs of query and key
    product = 2 * account.rows * model.num_heads * model.head_dim * length**2 * computed
    return sum(
        calls * products * product
        for kernel, calls in step.program.kernels.items()
        for part, products in _PRODUCTS.items()
        if f"_{part}" in kernel
    )


def _fill(config: Config, chip: Chip) -> float:
    """Returns the share of a matrix unit that is used: head_dim is one side of each product."""
    return min(1.0, config.model.head_dim / chip.matrix_unit)
