"""Runs `model.tflite` in LiteRT's compiled model, on all cores of the CPU."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.cpu_options import CpuOptions
from ai_edge_litert.options import Options
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.preparation.workers import available_cores
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime, check_room

_DECODE, _PREFILL = "decode", "prefill"
_SPAN = 256
_CACHE = "cache_"


class LitertRuntime:
    """A model, and the buffers of its cache, which are both arguments and results.

    Args:
      model: a model with the signatures `decode` and `prefill`, and with `decode_256` and
        `prefill_256` if it reads more than 256 tokens.
      chunk: number of tokens that `prefill` reads.
      info: the manifest's description.
    """

    def __init__(self, model: Any, chunk: int, info: ArtifactInfo) -> None:
        self._model = model
        self._chunk = chunk
        self.name = f"LiteRT {metadata.version('ai-edge-litert')}"
        self.vocab_size = info.vocab_size
        self.max_seq_len = info.max_seq_len
        self._length = 0
        inputs = model.get_input_tensor_details(_DECODE)
        cache = {
            name.removeprefix(_CACHE): model.create_input_buffer_by_name(_DECODE, name)
            for name in inputs
            if name.startswith(_CACHE)
        }
        for name, buffer in cache.items():
            # New memory may contain NaN, and a weight of 0 times NaN is NaN.
            buffer.write(np.zeros(inputs[_CACHE + name]["shape"], np.float32))
        self._calls = {name: _Call(model, name, cache) for name in model.get_signature_list()}

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        check_room(self, len(tokens))
        self._length = 0
        chunks = (tokens[i : i + self._chunk] for i in range(0, len(tokens), self._chunk))
        return np.concatenate([self._extend(_PREFILL, chunk) for chunk in chunks])

    def append(self, token: int) -> NDArray[np.float32]:
        check_room(self, self._length + 1)
        last_V: NDArray[np.float32] = self._extend(_DECODE, [token])[-1]
        return last_V

    def _extend(self, signature: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        call = self._calls[signature]
        if self._length + call.length <= _SPAN:
            call = self._calls.get(f"{signature}_{_SPAN}", call)
        logits_TV = call(tokens, self._length)
        self._length += len(tokens)
        return logits_TV


class _Call:
    """A signature with its buffers."""

    def __init__(self, model: Any, signature: str, cache: dict[str, Any]) -> None:
        self._run = model.run_by_name
        self._signature = signature
        self._tokens = model.create_input_buffer_by_name(signature, "tokens")
        self._start = model.create_input_buffer_by_name(signature, "start")
        self._logits = model.create_output_buffer_by_name(signature, "logits")
        shape = model.get_output_tensor_details(signature)["logits"]["shape"]
        self.length, self._vocab_size = shape[1:]
        arguments = {_CACHE + name: buffer for name, buffer in cache.items()}
        self._arguments = {"tokens": self._tokens, "start": self._start, **arguments}
        self._results = {"logits": self._logits, **cache}

    def __call__(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        padded_T = np.zeros(self.length, np.int32)
        padded_T[: len(tokens)] = tokens
        self._tokens.write(padded_T)
        self._start.write(np.asarray([start], np.int32))
        self._run(self._signature, self._arguments, self._results)
        logits_V = self._logits.read(self.length * self._vocab_size, np.float32)
        logits_TV: NDArray[np.float32] = logits_V.reshape(self.length, self._vocab_size)
        return logits_TV[: len(tokens)]


def load(file: Path, info: ArtifactInfo) -> Runtime:
    """Loads a model that `litert/writer.py` wrote.

    Raises:
      UserError: if LiteRT cannot load the file.
    """
    # XNNPACK packs the weights once for both signatures, and the file's pages can be dropped: a
    # file of 159 MB takes 296 MB instead of 527 MB.
    cpu = CpuOptions(num_threads=available_cores(), xnnpack_weight_cache_path=":memory")
    options = Options(cpu_options=cpu)
    try:
        model = CompiledModel.from_file(str(file), options=options)
        found = {
            name: (
                _layout(model.get_input_tensor_details(name)),
                _layout(model.get_output_tensor_details(name)),
            )
            for name in model.get_signature_list()
        }
    except RuntimeError as error:
        raise UserError(f"{file} is no model that LiteRT loads: {error}") from error
    inputs, _ = found.get(_PREFILL, ({}, {}))
    chunk, capacity = _axis(inputs.get("tokens"), 1), _axis(inputs.get(f"{_CACHE}keys_0"), 2)
    room = chunk and capacity % chunk == 0 and capacity >= info.max_seq_len
    expected = {
        name + suffix: _expected(info.model, length, capacity)
        for name, length in ((_DECODE, 1), (_PREFILL, chunk))
        for suffix in ("", f"_{_SPAN}")
    }
    wrong = sorted(name for name in found if found[name] != expected.get(name))
    if wrong or not room or _DECODE not in found:
        raise UserError(
            f"{file} is no model of ours for what the manifest says: it has the signatures "
            f"{', '.join(found) or 'none'}, a chunk of {chunk:,} and room for {capacity:,} tokens"
            + (f", and other arguments or results in {', '.join(wrong)}." if wrong else ".")
        )
    return LitertRuntime(model, chunk, info)


class _Array(NamedTuple):
    """An argument or a result of a signature."""

    dtype: str
    shape: tuple[int, ...]


def _axis(array: _Array | None, axis: int) -> int:
    return array.shape[axis] if array is not None and axis < len(array.shape) else 0


def _layout(details: dict[str, Any]) -> dict[str, _Array]:
    return {
        name: _Array(str(array["dtype"]), tuple(array["shape"])) for name, array in details.items()
    }


def _expected(
    config: ModelConfig, length: int, capacity: int
) -> tuple[dict[str, _Array], dict[str, _Array]]:
    """Returns the arguments and results of a signature for `length` tokens."""
    rows = _Array("float32", (1, config.num_kv_heads, capacity, config.head_dim))
    names = [f"{kind}_{i}" for i in range(config.applied_depth) for kind in ("keys", "values")]
    tokens, start = _Array("int32", (1, length)), _Array("int32", (1,))
    logits = _Array("float32", (1, length, config.vocab_size))
    inputs = {"tokens": tokens, "start": start, **{_CACHE + name: rows for name in names}}
    return inputs, {"logits": logits, **{name: rows for name in names}}
