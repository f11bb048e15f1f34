"""Measures bytes, time and memory of models on this machine, in the runtime of their format."""
