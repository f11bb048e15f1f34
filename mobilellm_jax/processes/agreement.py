"""Lets all processes of a run act in the same step on what one of them asks for."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mobilellm_jax.processes.jax_private import delay_aborts, process_state


class Agreement:
    """Tells all processes in the same step whether one of them asks for something.

    A signal or a clock reaches each process at a different time. A process that leaves the loop
    alone makes the others wait in a collective. So every step reduces one flag per device over all
    devices. The answer is read one step later, when reading it takes no wait.

    Args:
      step: the step of the run, from which this object also watches for preemption notices; None
        watches for none. jax's coordination service passes a notice to all processes and chooses
        the step from the numbers that they report. Only one object of a process may report them.
    """

    def __init__(self, step: int | None = None) -> None:
        self._pending: jax.Array | None = None
        self._step = step
        # None if a setting of jax turns it off.
        self._preemption = None if step is None else process_state().preemption_sync_manager
        self._several = jax.process_count() > 1
        if self._several:
            delay_aborts()  # again, because libtpu sets a handler when the devices start
            mesh = Mesh(np.array(jax.devices()), ("device",))
            self._split = NamedSharding(mesh, PartitionSpec("device"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, asked: bool) -> bool:
        """Returns whether a process asked in the last call; one process alone hears at once."""
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
