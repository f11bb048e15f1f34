"""Runs GGUF files in llama.cpp on the CPU, through the C functions of llama-cpp-python.

The cache holds keys and values in float32, and flash attention is off. The logits can then differ
from the checkpoint's only because of the file or the order of floating-point additions. With
llama.cpp's default cache, in float16, the difference is 300 times larger.
"""

import collections
import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.gguf.header import check_header
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime
from mobilellm_jax.startup.cpu import available_cores, cpu_features

_c: Any = llama_cpp.llama_cpp
_CHUNK = 512  # Largest number of tokens per call; two copies of their logits are in memory.
_ERROR = 4  # GGML_LOG_LEVEL_ERROR in llama.cpp.

_messages: collections.deque[str] = collections.deque(maxlen=20)


@_c.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes
def _log(level: int, text: bytes, user_data: Any) -> None:
    """Collects llama.cpp's error messages; by default, llama.cpp prints them to stderr."""
    del user_data
    if level == _ERROR:
        _messages.append(text.decode(errors="replace").strip())


class LlamaCppRuntime(Runtime):
    """A model with llama.cpp's cache for one sequence."""

    def __init__(self, file: Path, info: ArtifactInfo) -> None:
        check_header(file, info)
        name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        super().__init__(name, info.model, chunk=min(_CHUNK, info.model.max_seq_len))
        self._vocab_size = info.model.vocab_size
        model = load_model(file, vocab_only=False)
        context = _c.llama_init_from_model(model, self._settings())
        if not context:
            _c.llama_model_free(model)
            raise UserError(f"llama.cpp cannot run {file}: {_said()}.")
        self._context = context
        self._batch = _c.llama_batch_init(self._chunk, 0, 1)
        weakref.finalize(self, _free, self._batch, context, model)

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if self._length == 0:
            _c.llama_memory_clear(_c.llama_get_memory(self._context), True)
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self._length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = True
        _messages.clear()
        code = _c.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"{self.name} failed with code {code}: {_said()}.")
        logits_TV: NDArray[np.float32] = np.ctypeslib.as_array(
            _c.llama_get_logits(self._context), (len(tokens), self._vocab_size)
        ).copy()  # The next call overwrites the array.
        return logits_TV

    def _settings(self) -> Any:
        settings = _c.llama_context_default_params()
        settings.n_ctx = self.max_seq_len
        settings.n_batch = settings.n_ubatch = self._chunk
        settings.n_threads = settings.n_threads_batch = available_cores()
        settings.type_k = settings.type_v = _c.GGML_TYPE_F32
        settings.flash_attn_type = _c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.offload_kqv = False
        return settings


class LlamaCppVocabulary:
    """The tokenizer in a GGUF file of this program; llama.cpp runs it."""

    def __init__(self, file: Path) -> None:
        model = load_model(file, vocab_only=True)
        weakref.finalize(self, _c.llama_model_free, model)
        self.pointer = _c.llama_model_get_vocab(model)

    def encode(self, text: str) -> list[int]:
        """Returns BOS and the ids of `text`; a literal "<s>" in `text` is not a special token."""
        content = text.encode()
        room = len(content) + 2  # One token per byte at most, plus BOS and a leading space.
        found = (_c.llama_token * room)()
        count = _c.llama_tokenize(self.pointer, content, len(content), found, room, True, False)
        assert 0 <= count <= room, f"{count} tokens of {len(content)} bytes"
        return list(found[:count])


def load_model(file: Path, *, vocab_only: bool) -> Any:
    """Returns llama.cpp's model, which the caller must free with llama_model_free."""
    _c.llama_log_set(_log, ctypes.c_void_p(0))  # llama-cpp-python also prints.
    _messages.clear()
    settings = _c.llama_model_default_params()
    settings.vocab_only = vocab_only
    settings.n_gpu_layers = 0
    # llama.cpp's matrix multiplications with AMX instructions crash the process on virtual machines
    # (0.3.36, Q8_0). llama.cpp does not use AMX without the extra buffer types.
    settings.use_extra_bufts = "amx_tile" not in cpu_features()
    model = _c.llama_model_load_from_file(os.fsencode(file), settings)
    if not model:
        raise UserError(f"llama.cpp cannot load {file}: {_said()}.")
    return model


def _said() -> str:
    return "; ".join(_messages).rstrip(".") or "it does not say why"


def _free(batch: Any, context: Any, model: Any) -> None:
    _c.llama_batch_free(batch)
    _c.llama_free(context)
    _c.llama_model_free(model)
