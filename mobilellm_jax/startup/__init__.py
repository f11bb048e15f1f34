"""The steps before jax starts: XLA's flags, the allocator, the cache of compiled programs."""
