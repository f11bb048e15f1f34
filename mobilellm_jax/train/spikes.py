"""A guard against spikes: is this step's loss or gradient norm far above those of late?

What "of late" means is part of the training state, so that a run that was stopped judges as one
that was not. It is kept whether or not the guard is on, so that a run which starts to spike can be
resumed with it.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

WINDOW_STEPS = 128
"""Finite steps that are remembered; until half of them are there, nothing is called a spike."""


@struct.dataclass
class Recent:
    """Loss and gradient norm of the last finite steps, in a ring; W counts its places."""

    # Arrays, or what describes them in an abstract state.
    loss_W: Any  # float32
    grad_norm_W: Any  # float32
    seen: Any  # int32 scalar: finite steps so far


def nothing_yet() -> Recent:
    """Returns the memory of a run that has not taken a step."""
    empty_W = jnp.zeros(WINDOW_STEPS, jnp.float32)
    return Recent(loss_W=empty_W, grad_norm_W=jnp.copy(empty_W), seen=jnp.zeros((), jnp.int32))


def judge(
    recent: Recent,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    finite: Bool[Array, ""],
    factor: float,
) -> tuple[Bool[Array, ""], Recent]:
    """Returns whether the step is a spike, and what is remembered after it.

    A spike lies more than `factor` standard deviations above the mean, in loss or gradient norm;
    with `factor` 0 there are none. It is remembered as if it lay at that limit: one spike does not
    hide the next, and a level that stays higher is one that the limit follows. A step that is not
    finite is not remembered.
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
        kept = jnp.where(finite, jnp.minimum(new, limit), old_W[place])
        return new > limit, old_W.at[place].set(kept)

    loss_spikes, loss_W = look(recent.loss_W, loss)
    norm_spikes, grad_norm_W = look(recent.grad_norm_W, grad_norm)
    seen = recent.seen + finite.astype(jnp.int32)
    return finite & (loss_spikes | norm_spikes), Recent(loss_W, grad_norm_W, seen)
