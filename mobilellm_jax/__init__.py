"""MobileLLM in JAX: train language models of less than a billion parameters and ship them.

Implements Liu et al. 2024, arXiv:2402.14905. Importing this package starts no backend and reads
no flag. README.md describes the commands. `pretrain.py` is the training run, from top to bottom.
In a notebook, `mobilellm_jax.load(path)` opens a model (docs/models.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm_jax.open_model import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports `load` at its first use, because the import of jax takes seconds."""
    if name == "load":
        return importlib.import_module("mobilellm_jax.open_model").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
