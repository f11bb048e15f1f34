"""Runs ONNX models in ONNX Runtime, on all cores of the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from mobilellm_jax.data.preparation.workers import available_cores
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.runtime import ArtifactInfo, check_room

# ONNX Runtime's errors derive from Exception only, and a name that is not UTF-8 raises
# UnicodeDecodeError.
_REFUSALS = (
    UnicodeDecodeError,
    *(errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf),
    *(errors.NoModel, errors.NoSuchFile, errors.NotImplemented, errors.RuntimeException),
)
_ONLY_ERRORS = 3


def load(file: Path, info: ArtifactInfo) -> "OnnxRuntime":
    """Loads a model that `onnx/writer.py` wrote.

    Raises:
      UserError: if ONNX Runtime refuses the file, or the file contains another model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = _ONLY_ERRORS
    try:
        session = onnxruntime.InferenceSession(
            str(file),
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # ONNX Runtime would otherwise try again and print a warning
        )
        arrays = (*session.get_inputs(), *session.get_outputs())
        shapes = {array.name: array.shape for array in arrays}
    except _REFUSALS as error:
        raise UserError(
            f"{file} is no model that ONNX Runtime {onnxruntime.__version__} loads; export again: "
            f"{error}"
        ) from error
    cache = shapes.get("past_key_0", [])
    if cache[:3] != [1, info.model.num_kv_heads, info.max_seq_len] or shapes != {
        "tokens": [1, "T"],
        "length": [1],
        "logits_from": [1],
        "logits": [1, "scored", info.vocab_size],
        **{name: cache for name in _cache_names(info.model.applied_depth)},
    }:
        raise UserError(
            f"{file} is not the model of {info.vocab_size:,} tokens and sequences of "
            f"{info.max_seq_len:,} that its manifest names; export again."
        )
    return OnnxRuntime(session, info, cache)


class OnnxRuntime:
    """A session that updates its cache in place: input and output are bound to the same memory.

    Args:
      session: session of a model from `onnx/writer.py`.
      info: description of the model.
      cache: shape of a key or value array.
    """

    def __init__(self, session: Any, info: ArtifactInfo, cache: Sequence[int]) -> None:
        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        self.vocab_size, self.max_seq_len = info.vocab_size, info.max_seq_len
        self._session, self._length = session, 0
        past = [name for name in _cache_names(info.model.applied_depth) if "past" in name]
        # The session reads the memory of these arrays, so writing to an array changes the input.
        self._cache = {name: _value(np.zeros(cache, np.float32)) for name in past}
        self._length_1 = np.zeros(1, np.int32)
        self._token_11 = np.zeros((1, 1), np.int64)
        self._logits_11V: NDArray[np.float32] = np.zeros((1, 1, self.vocab_size), np.float32)
        # The arrays are bound once, so a token needs no call per cache array.
        self._one = self._binding(self._token_11)
        self._one.bind_ortvalue_output("logits", _value(self._logits_11V))

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        check_room(self, len(tokens))
        self._length = 0
        logits_1TV = np.empty((1, len(tokens), self.vocab_size), np.float32)
        binding = self._binding(np.array([tokens], np.int64))
        binding.bind_ortvalue_output("logits", _value(logits_1TV))
        self._run(binding, len(tokens))
        logits_TV: NDArray[np.float32] = logits_1TV[0]
        return logits_TV

    def append(self, token: int) -> NDArray[np.float32]:
        check_room(self, self._length + 1)
        self._token_11[:] = token
        self._run(self._one, 1)
        last_V: NDArray[np.float32] = self._logits_11V[0, 0].copy()
        return last_V

    def _binding(self, tokens_1T: NDArray[np.int64]) -> Any:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("tokens", _value(tokens_1T))
        binding.bind_ortvalue_input("length", _value(self._length_1))
        binding.bind_ortvalue_input("logits_from", _value(np.zeros(1, np.int64)))  # all
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
        return binding

    def _run(self, binding: Any, tokens: int) -> None:
        self._length_1[:] = self._length
        self._session.run_with_iobinding(binding)
        self._length += tokens


def _cache_names(depth: int) -> list[str]:
    kinds = [f"{when}_{kind}" for when in ("past", "present") for kind in ("key", "value")]
    return [f"{kind}_{slot}" for kind in kinds for slot in range(depth)]


def _value(array: NDArray[Any]) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
