"""Writes Hugging Face directories, for tests that read one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.export.exporting import Exported, export
from mobilellm_jax.model.opened import OpenedModel


def write_huggingface(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    folder: Path,
    layout: str = "hf",
    dtype: str = "float32",
) -> Exported:
    """Exports a model without running the export."""
    source = OpenedModel(config, params, tokenizer, "a test")
    return export(source, folder, format_name=layout, precision=dtype, verified=False)
