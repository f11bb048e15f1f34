"""Describes a model that is ready for use, wherever it comes from."""

import dataclasses
from typing import Any

from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """The parameters of a model, its tokenizer, and the run that trained it."""

    config: ModelConfig
    params: dict[str, Any]  # `Params` (transformer.py): float32 or quantized arrays.
    tokenizer: Tokenizer
    origin: str  # Path of the checkpoint, for messages and records.
    run_config: Config | None = None  # None for a Hugging Face directory.
    # Completed optimizer steps; None for a Hugging Face directory, and for a renamed copy of a step
    # that an older release wrote.
    step: int | None = None
