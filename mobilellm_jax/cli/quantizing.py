"""What --quantize and --quantized_parts mean, for every command that has them."""

import dataclasses
import sys
from typing import TYPE_CHECKING

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.quantize.schemes import Scheme, find_scheme

if TYPE_CHECKING:
    from mobilellm_jax.open_model import OpenedModel

QUANTIZE_HELP = (
    "scheme: w8a8, or w8, w4 (weights alone) or w4a8, with g32 or g128 behind it for groups of "
    "that size (default 32)"
)
PARTS_HELP = (
    "what --quantize takes in besides the blocks' matrices, in 8 bits: of embedding, head, "
    "attention (its products) and cache (keys and values), separated by commas (default: "
    "embedding,head)"
)


def chosen_scheme(name: str | None, parts: str | None) -> Scheme | None:
    """Returns the scheme that the two flags name; None without them.

    Raises:
      UsageError: for parts of nothing.
      ConfigError: if there is no such scheme or part.
    """
    if name is None:
        if parts is not None:
            raise UsageError(f"--quantized_parts={parts} goes with --quantize only.")
        return None
    return find_scheme(name) if parts is None else find_scheme(name, parts)


def quantize_opened(opened: "OpenedModel", scheme: Scheme | None) -> "OpenedModel":
    """Returns the model with integers for parameters, and says so; without a scheme, as it is.

    Raises:
      ConfigError: if the scheme takes in half of a matrix.
      ValueError: if parameters are not finite.
    """
    if scheme is None:
        return opened
    from mobilellm_jax.quantize.parameters import bits_per_weight, quantize_model, stored_bytes

    params = quantize_model(opened.config, opened.params, scheme)
    print(
        f"quantized {scheme}; {stored_bytes(params):,} bytes, "
        f"{bits_per_weight(params):.2f} bits per weight",
        file=sys.stderr,
        flush=True,
    )
    return dataclasses.replace(opened, params=params)
