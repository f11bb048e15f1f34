"""The types of stored weights, and the checks that several writers share."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def narrowed(
    name: str, values: np.ndarray, precision: str, dtype: np.dtype[Any] | None = None
) -> np.ndarray:
    """Casts weights to `dtype`, by default that of `precision`; infinity or NaN is an error."""
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype or DTYPES[precision], copy=False)
    if not np.isfinite(narrow.astype(np.float32, copy=False)).all():
        remedy = "; use --dtype=bfloat16 or float32" if np.isfinite(values).all() else ""
        raise UserError(f"{name} holds values that are not finite in {precision}{remedy}.")
    return narrow


def check_groups(config: ModelConfig, size: int, precision: str, remedy: str) -> None:
    """Raises a `UserError` if the number of inputs of a matrix is not a multiple of `size`."""
    inputs = {
        "model.embed_dim": config.embed_dim,
        "model.num_heads * model.head_dim": config.num_heads * config.head_dim,
        "model.ffn_dim": config.ffn_dim,
    }
    for name, number in inputs.items():
        if number % size:
            raise UserError(
                f"{name}={number} must be a multiple of {size}, the weights that {precision} "
                f"quantizes together; use {remedy}."
            )
