"""Measures size, speed and memory of models on this machine, each in its own runtime."""
