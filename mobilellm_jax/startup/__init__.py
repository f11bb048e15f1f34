"""Settings to make before jax starts: XLA's flags, the allocator and the compilation cache."""
