"""How long a compiled step should take on a TPU, without one: bounds, and the compiler's own idea.

The bounds are what the chip's peak numbers allow. The estimate adds up what libtpu expects of every
instruction (`estimated_cycles`), and the attention kernels, of which it says nothing, by their
products. Nothing here was measured.
"""

import dataclasses

from mobilellm_jax.config import Config
from mobilellm_jax.plan.accounting import Account
from mobilellm_jax.plan.compiled import CompiledStep
from mobilellm_jax.plan.topology import Chip

# Products over the keys in each of the kernels: scores and output; scores, weights' gradient and
# the gradients of keys and values; scores, weights' gradient and the gradient of queries.
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
_BLOCK = 512  # keys and queries that a kernel computes together, above the diagonal too


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds per step on one chip of many."""

    peak_flops: float
    flops_sec: float  # model FLOPs at the peak
    memory_sec: float  # all memory that the step holds, read once and written once
    network_sec: float  # what is sent, over all links at once
    estimated_sec: float | None  # by libtpu, kernels left out
    kernels_sec: float  # attention, at the share of the peak that its head_dim allows

    @property
    def roofline_sec(self) -> float:
        """No step is faster."""
        return max(self.flops_sec, self.memory_sec, self.network_sec)

    @property
    def fastest_sec(self) -> float:
        """The estimate with all communication hidden; the roofline where there is none."""
        if self.estimated_sec is None:
            return self.roofline_sec
        return max(self.estimated_sec + self.kernels_sec, self.roofline_sec)

    @property
    def slowest_sec(self) -> float:
        """The estimate with none of it hidden."""
        return self.fastest_sec + (0.0 if self.estimated_sec is None else self.network_sec)


def predict(
    config: Config, account: Account, step: CompiledStep, chip: Chip, peak_flops: float
) -> Prediction:
    """Returns the prediction for one chip with this peak (dense bfloat16)."""
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
    computed = (blocks + 1) / (2 * blocks)  # of all pairs: the diagonal's blocks whole
    product = 2 * account.rows * model.num_heads * model.head_dim * length**2 * computed
    return sum(
        calls * products * product
        for kernel, calls in step.program.kernels.items()
        for part, products in _PRODUCTS.items()
        if f"_{part}" in kernel
    )


def _fill(config: Config, chip: Chip) -> float:
    """The share of a matrix unit that heads fill: they are one side of each product."""
    return min(1.0, config.model.head_dim / chip.matrix_unit)
