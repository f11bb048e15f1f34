"""Runs ONNX models in ONNX Runtime, on all cores of the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime, wrong_model
from mobilellm_jax.startup.cpu import available_cores

# These errors share only the base class Exception. A damaged name raises UnicodeDecodeError.
_REFUSALS = (
    UnicodeDecodeError,
    *(errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf),
    *(errors.NoModel, errors.NoSuchFile, errors.NotImplemented, errors.RuntimeException),
)
_ONLY_ERRORS = 3


class OnnxRuntime(Runtime):
    """An ONNX Runtime session; its cache arrays are inputs and outputs in the same memory."""

    def __init__(self, file: Path, info: ArtifactInfo) -> None:
        super().__init__(f"ONNX Runtime {onnxruntime.__version__}", info.model)
        self._session, shapes = _opened(file)
        self._vocab_size = info.model.vocab_size
        slots = [
            f"{kind}_{i}" for kind in ("key", "value") for i in range(info.model.applied_depth)
        ]
        cache = shapes.get("past_key_0", [])
        if cache[:3] != [1, info.model.num_kv_heads, self.max_seq_len] or shapes != {
            "tokens": [1, "T"],
            "length": [1],
            "logits_from": [1],
            "logits": [1, "scored", self._vocab_size],
            **{f"{when}_{slot}": cache for when in ("past", "present") for slot in slots},
        }:
            raise wrong_model(file, info)
        # The session uses the memory of the arrays below, so a write to an array changes the input.
        self._cache = {f"past_{slot}": _value(np.zeros(cache, np.float32)) for slot in slots}
        self._length_1 = np.zeros(1, np.int32)
        # The arrays for one token are bound only once: binding takes a call per cache array.
        self._token_11 = np.zeros((1, 1), np.int64)
        self._logits_11V: NDArray[np.float32] = np.zeros((1, 1, self._vocab_size), np.float32)
        self._one = self._binding(self._token_11, self._logits_11V)

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._length_1[:] = self._length
        if len(tokens) == 1:
            self._token_11[:] = tokens
            self._session.run_with_iobinding(self._one)
            last_1V: NDArray[np.float32] = self._logits_11V[0].copy()
            return last_1V
        logits_1TV = np.empty((1, len(tokens), self._vocab_size), np.float32)
        self._session.run_with_iobinding(self._binding(np.array([tokens], np.int64), logits_1TV))
        logits_TV: NDArray[np.float32] = logits_1TV[0]
        return logits_TV

    def _binding(self, tokens_1T: NDArray[np.int64], logits_1TV: NDArray[np.float32]) -> Any:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("tokens", _value(tokens_1T))
        binding.bind_ortvalue_input("length", _value(self._length_1))
        binding.bind_ortvalue_input("logits_from", _value(np.zeros(1, np.int64)))  # All tokens.
        binding.bind_ortvalue_output("logits", _value(logits_1TV))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
        return binding


def _opened(file: Path) -> tuple[Any, dict[str, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = _ONLY_ERRORS
    try:
        session = onnxruntime.InferenceSession(
            str(file),
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # Without this, ONNX Runtime retries after an error and warns.
        )
        arrays = (*session.get_inputs(), *session.get_outputs())
        return session, {array.name: array.shape for array in arrays}
    except _REFUSALS as error:
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file}; export again: {error}"
        ) from error


def _value(array: NDArray[Any]) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
