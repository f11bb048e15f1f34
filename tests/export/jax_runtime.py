"""Wraps the JAX model in the interface of a runtime, for tests that need a runtime."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.runtime import check_room
from mobilellm_jax.model.cache import init_cache
from mobilellm_jax.model.transformer import Params, Transformer


class JaxRuntime:
    """Reads and appends tokens through a cache, in float32."""

    def __init__(self, config: ModelConfig, params: Params) -> None:
        self._config = dataclasses.replace(config, compute_dtype="float32")
        model = Transformer(self._config).bind({"params": jax.device_put(params)})

        def extend(tokens_BT, cache):
            x_BTD, cache = model.extend(tokens_BT, cache)
            return model.logits(x_BTD)[0], cache

        self._extend = jax.jit(extend)
        self._tokens: list[int] = []
        self.name = "JAX"
        self.vocab_size = config.vocab_size
        self.max_seq_len = config.max_seq_len

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        check_room(self, len(tokens))
        self._tokens = list(tokens)
        padded_T = np.zeros(self.max_seq_len, np.int32)  # one program for all lengths
        padded_T[: len(tokens)] = tokens
        cache = init_cache(self._config, 1, self.max_seq_len, jnp.float32)
        logits_TV, self._cache = self._extend(padded_T[None], cache)
        return np.asarray(logits_TV)[: len(tokens)]

    def append(self, token: int) -> NDArray[np.float32]:
        check_room(self, len(self._tokens) + 1)
        length_B = jnp.full(1, len(self._tokens), jnp.int32)
        cache = dataclasses.replace(self._cache, length_B=length_B)
        logits_TV, self._cache = self._extend(np.asarray([[token]], np.int32), cache)
        self._tokens.append(token)
        return np.asarray(logits_TV)[0]
