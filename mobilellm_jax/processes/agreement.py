"""Lets all processes of a run react in the same step to a request of one process."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mobilellm_jax.processes.jax_private import delay_aborts, process_state


class Agreement:
    """Tells all processes whether one of them has made a request; all hear it in the same step.

    A signal or a time limit reaches each process at a different time. If only one process leaves
    the training loop, the others wait for it in a collective. So in every step, each process sets a
    flag per device, and a reduction over all devices finds out whether any flag is set. The object
    reads the result one step later, because the result is ready by then.

    Args:
      step: first step of the loop; with a step, the object also reacts to preemption notices.
        jax's coordination service sends a notice to all processes. It chooses the step from the
        step numbers that they report. So only one object of a process may have a step.
    """

    def __init__(self, step: int | None = None) -> None:
        self._pending: jax.Array | None = None
        self._step = step
        # The manager is None if a setting of jax turns it off.
        self._preemption = None if step is None else process_state().preemption_sync_manager
        self._several = jax.process_count() > 1
        if self._several:
            delay_aborts()  # Install the handler again, because libtpu replaces it when it starts.
            mesh = Mesh(np.array(jax.devices()), ("device",))
            self._split = NamedSharding(mesh, PartitionSpec("device"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, asked: bool) -> bool:
        """Returns whether any process asked to stop in its last call.

        A single process gets `asked`.
        """
        if not self._several:
            return asked
        if self._step is not None:
            self._step += 1
            if self._preemption is not None and self._preemption.reached_sync_point(self._step):
                asked = True
        flags = jax.make_array_from_callback(
            (jax.device_count(),), self._split, lambda index: np.full((1,), asked)
        )
        pending, self._pending = self._pending, self._any(flags)
        return pending is not None and bool(pending)
