"""Runs StableHLO functions with jax on its default device; needs no model code."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax import export
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime, wrong_model

PREFILL, DECODE, WEIGHTS = "model.prefill.stablehlo", "model.stablehlo", "model.safetensors"
HASHES = "sha256 of prefill and decode"
"""The key under which the metadata of the weights file contains the hashes of both functions."""
_SMALLEST_BUCKET = 16  # Lengths are padded to 16, 32, 64, ...: jax compiles once per length.


class StableHloRuntime(Runtime):
    """The functions that `stablehlo/writer.py` wrote; jax compiles each at its first call.

    Decoding updates the cache in place. The files must come from one export.
    """

    def __init__(self, file: Path, info: ArtifactInfo) -> None:
        model = info.model
        super().__init__(f"jax {jax.__version__}, {jax.default_backend()}", model)
        prefill, decode, weights = _opened(file)
        logits, *state = (value.shape for value in decode.out_avals)
        slot = (model.num_kv_heads, model.max_seq_len, model.head_dim)
        cache = [(), *[slot] * 2 * model.applied_depth]
        if logits != (1, model.vocab_size) or sorted(state) != cache:
            raise wrong_model(file, info)
        self._weights = jax.device_put(weights)
        self._prefill = jax.jit(prefill.call)
        self._decode = jax.jit(decode.call, donate_argnums=2)
        self._cache: Any = None

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if self._length > 0:
            token_1 = jnp.asarray(tokens, jnp.int32)
            logits_1V, self._cache = self._decode(self._weights, token_1, self._cache)
            return np.asarray(logits_1V)
        count = len(tokens)
        bucket = max(_SMALLEST_BUCKET, 1 << (count - 1).bit_length())
        padded_1T = np.zeros((1, min(bucket, self.max_seq_len)), np.int32)
        padded_1T[0, :count] = tokens
        self._cache = None  # Frees the memory of the old cache.
        logits_1TV, self._cache = self._prefill(self._weights, padded_1T, np.int32(count))
        return np.asarray(logits_1TV[0, :count])


def _opened(file: Path) -> tuple[export.Exported, export.Exported, dict[str, np.ndarray]]:
    weights_file = file.with_name(WEIGHTS)
    try:
        with safetensors.safe_open(weights_file, framework="np") as tensors:
            hashes = (tensors.metadata() or {}).get(HASHES, "").split()
            weights = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{weights_file} is not a whole safetensors file: {error}") from error
    functions = []
    for i, part in enumerate((file.with_name(PREFILL), file)):
        content = part.read_bytes() if part.is_file() else b""
        # jax does not check the bytes that it deserializes; damaged bytes may crash the process.
        if [hashlib.sha256(content).hexdigest()] != hashes[i : i + 1]:
            raise UserError(
                f"{part} is not the function that {weights_file.name} was exported with; export "
                "again."
            )
        functions.append(export.deserialize(bytearray(content)))
    prefill, decode = functions
    return prefill, decode, weights
