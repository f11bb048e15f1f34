"""The model that an export starts from, and the precisions of its weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """The model that is exported."""

    config: ModelConfig
    params: Mapping[str, Any]  # float32
    tokenizer: Tokenizer
    origin: str  # the checkpoint


@dataclasses.dataclass(frozen=True)
class Precision:
    """A way to store weights, and the differences that verification allows."""

    bits: float  # bits per weight of a matrix, scales included
    # largest difference as a share of max(1, largest logit); None: logits are not compared
    logits: float | None
    loss: float  # largest rise of the loss on the verification's text, in nats per token
    tokens: bool = False  # whether greedy tokens must be equal


def check_groups(config: ModelConfig, size: int, precision: str, remedy: str) -> None:
    """Checks that the inputs of every matrix divide into groups of `size`.

    Raises:
      UserError: naming the field that does not.
    """
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
