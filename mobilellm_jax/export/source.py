"""What a writer is given: the model that is exported, and how its weights are stored."""

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
    """One way to store the weights, and what verification allows it to change."""

    bits: float  # per weight of a matrix, scales included
    logits: float | None  # largest difference as a share of max(1, largest logit); None: not held
    loss: float  # largest rise of the loss of the verification's text, in nats per token
    tokens: bool = False  # whether greedy tokens must be equal


def check_groups(config: ModelConfig, size: int, precision: str, remedy: str) -> None:
    """Refuses a model whose matrices have inputs that are no whole groups of `size`.

    Raises:
      UserError: naming the field.
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
