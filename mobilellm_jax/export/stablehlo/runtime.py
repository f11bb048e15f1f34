"""Runs StableHLO functions in jax on its default device, without code of the model."""

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
from mobilellm_jax.export.runtime import ArtifactInfo, check_room

PREFILL, WEIGHTS = "model.prefill.stablehlo", "model.safetensors"
HASHES = "sha256 of prefill and decode"
"""The key of the functions' hashes in the metadata of the weights."""
_SMALLEST_BUCKET = 16  # number of tokens; jax would compile another program for every length


def load(file: Path, info: ArtifactInfo) -> "StableHloRuntime":
    """Loads an export that `stablehlo/writer.py` wrote.

    Raises:
      UserError: if the files are damaged, or come from different exports.
    """
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
        # jax trusts what it deserializes. Other bytes could end in any error, or in a crash.
        if [hashlib.sha256(content).hexdigest()] != hashes[i : i + 1]:
            raise UserError(
                f"{part} is not the function that {weights_file.name} was exported with; export "
                "again."
            )
        functions.append(export.deserialize(bytearray(content)))
    prefill, decode = functions
    logits, *state = (value.shape for value in decode.out_avals)
    model = info.model
    slot = (model.num_kv_heads, model.max_seq_len, model.head_dim)
    if logits != (1, model.vocab_size) or sorted(state) != [(), *[slot] * 2 * model.applied_depth]:
        raise UserError(
            f"{file} is not the model of {info.vocab_size:,} tokens and sequences of "
            f"{info.max_seq_len:,} that its manifest names; export again."
        )
    return StableHloRuntime(prefill, decode, weights, info)


class StableHloRuntime:
    """The two functions, compiled at their first use, and a cache that is updated in place.

    Args:
      prefill: (weights, tokens [1, T], count) -> (logits [1, T, V], cache).
      decode: (weights, token [1], cache) -> (logits [1, V], cache).
      weights: arrays by name.
      info: the manifest's description.
    """

    def __init__(
        self,
        prefill: export.Exported,
        decode: export.Exported,
        weights: dict[str, np.ndarray],
        info: ArtifactInfo,
    ) -> None:
        self.name = f"jax {jax.__version__}, {jax.default_backend()}"
        self.vocab_size, self.max_seq_len = info.vocab_size, info.max_seq_len
        self._weights = jax.device_put(weights)
        self._prefill = jax.jit(prefill.call)
        self._decode = jax.jit(decode.call, donate_argnums=2)
        self._cache: Any = None
        self._length = 0

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        check_room(self, len(tokens))
        self._length = len(tokens)
        bucket = max(_SMALLEST_BUCKET, 1 << (self._length - 1).bit_length())
        padded_1T = np.zeros((1, min(bucket, self.max_seq_len)), np.int32)
        padded_1T[0, : self._length] = tokens
        self._cache = None  # reuses the memory of the old cache
        logits_1TV, self._cache = self._prefill(self._weights, padded_1T, np.int32(self._length))
        return np.asarray(logits_1TV[0, : self._length])

    def append(self, token: int) -> NDArray[np.float32]:
        check_room(self, self._length + 1)
        token_1 = jnp.asarray([token], jnp.int32)
        logits_1V, self._cache = self._decode(self._weights, token_1, self._cache)
        self._length += 1
        return np.asarray(logits_1V[0])
