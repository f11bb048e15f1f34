"""MobileLLM in JAX: train language models of less than a billion parameters and ship them.

Implements Liu et al. 2024, arXiv:2402.14905. Importing this package starts no backend and reads
no flag. README.md describes the commands. `pretrain.py` is the training run, from top to bottom.
"""

__version__ = "0.1.0"
