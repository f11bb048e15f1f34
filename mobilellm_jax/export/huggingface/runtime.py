"""Runs Hugging Face directories in transformers and PyTorch, in float32 on the CPU."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.modeling_outputs import CausalLMOutputWithPast

from mobilellm_jax.export.runtime import check_room

# transformers 5.24 renamed this argument.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _FIELDS else "past_key_values"


class HuggingFaceRuntime:
    """A causal language model with transformers' own cache.

    Args:
      folder: a directory that you trust, because its modelling file is run.
    """

    def __init__(self, folder: Path) -> None:
        logging: Any = transformers.utils.logging
        logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True, local_files_only=True
        )
        self._model = model.eval()
        self._cache: Any = None
        self.name = f"transformers {transformers.__version__}"
        self.vocab_size = int(self._model.config.vocab_size)
        self.max_seq_len = int(self._model.config.max_position_embeddings)
        self._length = 0

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        check_room(self, len(tokens))
        self._cache, self._length = None, 0
        return self._extend(tokens)

    def append(self, token: int) -> NDArray[np.float32]:
        check_room(self, self._length + 1)
        last_V: NDArray[np.float32] = self._extend([token])[-1]
        return last_V

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            out = self._model(torch.tensor([list(tokens)]), use_cache=True, **{_CACHE: self._cache})
        self._cache = out[_CACHE]
        self._length += len(tokens)
        logits_TV: NDArray[np.float32] = out.logits[0].float().numpy()
        return logits_TV
