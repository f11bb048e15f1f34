"""Settings that come before jax starts: XLA's flags, the allocator, the compilation cache."""
