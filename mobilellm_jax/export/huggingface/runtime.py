"""Runs Hugging Face directories with transformers and PyTorch, in float32 on the CPU."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.modeling_outputs import CausalLMOutputWithPast

from mobilellm_jax.export.runtime import ArtifactInfo, Runtime

# transformers 5.24 renamed `past_key_values` to `cache`.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _FIELDS else "past_key_values"


class HuggingFaceRuntime(Runtime):
    """A model in transformers; loading runs Python code from `folder`, which must be trusted."""

    def __init__(self, folder: Path, info: ArtifactInfo) -> None:
        super().__init__(f"transformers {transformers.__version__}", info.model)
        logging: Any = transformers.utils.logging
        logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True, local_files_only=True
        )
        self._model = model.eval()
        self._folder = folder
        self._cache: Any = None

    def encode(self, text: str) -> list[int]:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            self._folder, trust_remote_code=True, local_files_only=True
        )
        return list(tokenizer(text).input_ids)

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if self._length == 0:
            self._cache = None
        with torch.inference_mode():
            out = self._model(torch.tensor([list(tokens)]), use_cache=True, **{_CACHE: self._cache})
        self._cache = out[_CACHE]
        logits_TV: NDArray[np.float32] = out.logits[0].float().numpy()
        return logits_TV
