"""Uses the private names of jax that this package needs, and delays aborts of jax.

No other file of this folder may use private names of jax.
"""

import ctypes
import signal
from typing import Any


def process_state() -> Any:
    """Returns jax's data about the run: process number, process count, coordinator client.

    The public `jax.process_index` starts a backend, and no public function returns the client.
    Orbax and Flax use the same private name,
    https://github.com/jax-ml/jax/blob/main/jax/_src/distributed.py. Remove this function when jax
    has a public key-value store.
    """
    from jax._src import distributed

    return distributed.global_state


def delay_aborts() -> None:
    """Delays every abort by a few seconds, so that `Peers` can first name the process that is gone.

    The client of jax aborts as soon as process 0 does not answer. A C++ thread calls `abort`, and
    no Python code can prevent that: jax's `missed_heartbeat_callback` fails with `std::bad_cast`
    (jax 0.10.2, https://github.com/jax-ml/jax/blob/main/jaxlib/_jax.cc). This
    function makes libc's `sleep` the handler of SIGABRT; POSIX allows `sleep` in a handler. The
    system calls a handler with the number of the signal, which is 6 for SIGABRT. So the aborting
    thread sleeps for 6 seconds and then ends the process. Remove this function when the callback of
    jax works.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
