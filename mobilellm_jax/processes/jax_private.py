"""The names of jax that are not public, and a workaround for jax's abort.

No other file of this room may use them.
"""

import ctypes
import signal
from typing import Any


def process_state() -> Any:
    """Returns jax's record of the processes: own number, their number, client of the coordinator.

    `jax.process_index` starts a backend, and no public function returns the client. Orbax and Flax
    use the same name, https://github.com/jax-ml/jax/blob/main/jax/_src/distributed.py. This
    function can go when jax publishes the client's key-value store.
    """
    from jax._src import distributed

    return distributed.global_state


def delay_aborts() -> None:
    """Delays every abort by a few seconds, so that `Peers` can name the process that is gone.

    The client of jax aborts as soon as process 0 does not answer. A thread in C calls `abort`, and
    no Python code can prevent that: jax's `missed_heartbeat_callback` fails with `std::bad_cast`
    (jax 0.10.2, https://github.com/jax-ml/jax/blob/main/jaxlib/_jax.cc). So libc's `sleep` becomes
    the handler of SIGABRT, which POSIX allows in a handler. The aborting thread then sleeps for the
    number of the signal, 6 seconds, and ends the process afterwards. This function can go when the
    callback of jax calls Python code.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
