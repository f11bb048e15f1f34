"""Wraps the JAX model in the interface of a runtime, for tests that need a runtime."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.runtime import Runtime
from mobilellm_jax.model.cache import init_cache
from mobilellm_jax.model.transformer import Params, Transformer


class JaxRuntime(Runtime):
    """Reads and appends tokens through a cache, in float32."""

    def __init__(self, config: ModelConfig, params: Params) -> None:
        super().__init__("JAX", config)
        self._config = dataclasses.replace(config, compute_dtype="float32")
        model = Transformer(self._config).bind({"params": jax.device_put(params)})

        def extend(tokens_BT, cache):
            x_BTD, cache = model.extend(tokens_BT, cache)
            return model.logits(x_BTD)[0], cache

        self._jitted = jax.jit(extend)

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if self._length == 0:
            padded_T = np.zeros(self.max_seq_len, np.int32)  # one program for all lengths
            padded_T[: len(tokens)] = tokens
            cache = init_cache(self._config, 1, self.max_seq_len, jnp.float32)
        else:
            padded_T = np.asarray(tokens, np.int32)
            length_B = jnp.full(1, self._length, jnp.int32)
            cache = dataclasses.replace(self._cache, length_B=length_B)
        logits_TV, self._cache = self._jitted(padded_T[None], cache)
        return np.asarray(logits_TV)[: len(tokens)]
