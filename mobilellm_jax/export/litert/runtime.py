"""Runs `model.tflite` with LiteRT's `CompiledModel`, on all CPU cores."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.cpu_options import CpuOptions
from ai_edge_litert.options import Options
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.litert.signatures import cache_shapes, signatures
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime, wrong_model
from mobilellm_jax.startup.cpu import available_cores

_CACHE = "cache_"  # The converter adds this prefix to the names in the argument `cache`.
_Arrays = dict[str, tuple[str, tuple[int, ...]]]
"""Maps the name of an argument or result of a signature to its dtype and shape."""


class LitertRuntime(Runtime):
    """A model that `litert/writer.py` wrote; each call takes and returns the cache."""

    def __init__(self, file: Path, info: ArtifactInfo) -> None:
        model, found = _opened(file)
        lengths = signatures(info.model)
        expected = {name: _arrays(info.model, length) for name, (length, _) in lengths.items()}
        names = sorted(found.keys() | expected.keys())
        if wrong := [name for name in names if found.get(name) != expected.get(name)]:
            other = f", because it has other arguments or results in {', '.join(wrong)}"
            raise wrong_model(file, info, other)
        chunk, _ = lengths["prefill"]
        super().__init__(f"LiteRT {metadata.version('ai-edge-litert')}", info.model, chunk)
        self._vocab_size = info.model.vocab_size
        cache = {}
        for name, shape in cache_shapes(info.model).items():
            cache[name] = model.create_input_buffer_by_name("decode", _CACHE + name)
            # New memory may contain NaN. Unused rows have weight 0, but 0 * NaN is NaN.
            cache[name].write(np.zeros(shape, np.float32))
        self._model = model
        self._calls = [_call(model, name, *lengths[name], cache) for name in lengths]
        self._calls.sort(key=lambda call: (call.length, call.span))

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        # For each length, one call uses the whole cache, so the search always finds a call.
        call = next(
            call
            for call in self._calls
            if len(tokens) <= call.length and self._length + call.length <= call.span
        )
        padded_T = np.zeros(call.length, np.int32)
        padded_T[: len(tokens)] = tokens
        call.arguments["tokens"].write(padded_T)
        call.arguments["start"].write(np.asarray([self._length], np.int32))
        self._model.run_by_name(call.signature, call.arguments, call.results)
        logits_V = call.results["logits"].read(call.length * self._vocab_size, np.float32)
        logits_TV: NDArray[np.float32] = logits_V.reshape(call.length, -1)
        return logits_TV[: len(tokens)]


class _Call(NamedTuple):
    signature: str
    length: int  # Number of tokens that a call reads.
    span: int  # Number of cache rows that attention reads.
    arguments: dict[str, Any]
    results: dict[str, Any]


def _call(model: Any, signature: str, length: int, span: int, cache: Mapping[str, Any]) -> _Call:
    arguments = {_CACHE + name: buffer for name, buffer in cache.items()}
    for name in ("tokens", "start"):
        arguments[name] = model.create_input_buffer_by_name(signature, name)
    logits = model.create_output_buffer_by_name(signature, "logits")
    return _Call(signature, length, span, arguments, {"logits": logits, **cache})


def _opened(file: Path) -> tuple[Any, dict[str, _Arrays]]:
    # This in-memory cache lets XNNPACK pack the weights once for all signatures, and the system can
    # drop the file's pages. A file of 159 MB then takes 296 MB of memory instead of 527 MB.
    cpu = CpuOptions(num_threads=available_cores(), xnnpack_weight_cache_path=":memory")
    try:
        model = CompiledModel.from_file(str(file), options=Options(cpu_options=cpu))
        found = {}
        for name in model.get_signature_list():
            inputs, outputs = (
                model.get_input_tensor_details(name),
                model.get_output_tensor_details(name),
            )
            found[name] = {
                array: (str(details["dtype"]), tuple(details["shape"]))
                for array, details in (inputs | outputs).items()
            }
        return model, found
    except RuntimeError as error:
        raise UserError(f"LiteRT cannot load {file}: {error}") from error


def _arrays(config: ModelConfig, length: int) -> _Arrays:
    arrays: _Arrays = {
        "tokens": ("int32", (1, length)),
        "start": ("int32", (1,)),
        "logits": ("float32", (1, length, config.vocab_size)),
    }
    for name, shape in cache_shapes(config).items():
        arrays[name] = arrays[_CACHE + name] = ("float32", shape)
    return arrays
