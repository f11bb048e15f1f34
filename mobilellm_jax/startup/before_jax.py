"""Makes the settings that a training process needs before jax starts a backend."""

from mobilellm_jax.startup.compile_cache import use_compile_cache
from mobilellm_jax.startup.host_memory import share_one_heap
from mobilellm_jax.startup.xla_flags import set_xla_flags


def before_jax(*, deterministic: bool) -> str:
    """Sets the allocator, XLA's flags and the compilation cache; returns a line about them.

    Call this function before `distributed.start`, which connects the processes of a run. This
    function raises the errors of `set_xla_flags`.
    """
    share_one_heap()
    flags = set_xla_flags(deterministic=deterministic)
    return f"xla     flags added: {flags}; compiled programs: {use_compile_cache()}"
