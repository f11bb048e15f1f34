"""Guards against spikes: compares loss and gradient norm of a step with recent values.

The recent values are part of the training state, so a resumed run finds the same spikes as an
uninterrupted run. The state holds the recent values even if the guard is off. So a run that begins
to spike can be resumed with the guard on.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

WINDOW_STEPS = 128
"""Number of finite steps that the guard remembers; it finds no spike before half of them."""


@struct.dataclass
class Recent:
    """Loss and gradient norm of the last finite steps in ring buffers with W places."""

    # Fields are arrays, or `jax.ShapeDtypeStruct` in an abstract state.
    loss_W: Any  # Losses of recent finite steps, float32.
    grad_norm_W: Any  # Gradient norms of recent finite steps, float32.
    seen: Any  # Number of finite steps so far, int32 scalar.


def nothing_yet() -> Recent:
    """Returns empty buffers for a run that has not taken a step."""
    empty_W = jnp.zeros(WINDOW_STEPS, jnp.float32)
    return Recent(loss_W=empty_W, grad_norm_W=jnp.copy(empty_W), seen=jnp.zeros((), jnp.int32))


def judge(
    recent: Recent,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    measured: Bool[Array, ""],
    factor: float,
) -> tuple[Bool[Array, ""], Recent]:
    """Returns whether the step is a spike, and the list of recent values with this step in it.

    A step is a spike if its loss or gradient norm exceeds a limit: `factor` standard deviations
    above the mean of the recent values. With `factor` 0, no step is a spike. The buffers store the
    limit instead of a higher value, so that one spike does not hide the next spike. If the values
    stay high, the limit rises from step to step. `measured` is False for a step that was not finite
    or had no targets; the buffers ignore such a step.
    """
    place = recent.seen % WINDOW_STEPS
    there_W = jnp.arange(WINDOW_STEPS) < recent.seen

    def look(
        old_W: Float[Array, "W"], new: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], Float[Array, "W"]]:
        limit = jnp.float32(jnp.inf)
        if factor:
            deviation = jnp.std(old_W, where=there_W)
            limit = jnp.mean(old_W, where=there_W) + factor * deviation
            limit = jnp.where(recent.seen >= WINDOW_STEPS // 2, limit, jnp.inf)
        kept = jnp.where(measured, jnp.minimum(new, limit), old_W[place])
        return new > limit, old_W.at[place].set(kept)

    loss_spikes, loss_W = look(recent.loss_W, loss)
    norm_spikes, grad_norm_W = look(recent.grad_norm_W, grad_norm)
    seen = recent.seen + measured.astype(jnp.int32)
    return measured & (loss_spikes | norm_spikes), Recent(loss_W, grad_norm_W, seen)
