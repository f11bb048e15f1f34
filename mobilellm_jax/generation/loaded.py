"""A model for Python programs and notebooks: text or tokens in, logits or text out."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from mobilellm_jax.errors import UserError
from mobilellm_jax.generation.generate import Prepared, Request, generate, new_tokens_for, prepare
from mobilellm_jax.generation.sampling import Sampling
from mobilellm_jax.generation.text_stream import decode_stream
from mobilellm_jax.model.transformer import Transformer

_SMALLEST_BUCKET = 64  # In tokens; a program is compiled for each power of two from here.


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be used, as `mobilellm_jax.load` returns it."""

    config: ModelConfig
    params: dict[str, Any]  # A tree of float32 arrays, as `Transformer(config).apply` takes it.
    tokenizer: Tokenizer

    def tokens(self, text: str) -> list[int]:
        """Returns the tokens that the model reads for a text, with those around the text."""
        return prompt_ids(self.tokenizer, text)

    def logits(self, text: str | Sequence[int]) -> NDArray[np.float32]:
        """Returns the logits [T, V] after each of the T tokens of a text.

        Args:
          text: a text, or tokens, to which nothing is added.

        Raises:
          UserError: if there is no token or there are more than `max_seq_len`, or if a token is not
            in the vocabulary.
        """
        ids = self.tokens(text) if isinstance(text, str) else list(text)
        longest, vocabulary = self.config.max_seq_len, self.config.vocab_size
        if not 1 <= len(ids) <= longest:
            raise UserError(f"{len(ids)} tokens must be at least 1 and at most {longest}.")
        if outside := [token for token in ids if not 0 <= token < vocabulary]:
            raise UserError(f"The token {outside[0]} must be from 0 to {vocabulary - 1}.")
        # A token does not see the tokens after it, so padding on the right changes no logits.
        bucket = max(_SMALLEST_BUCKET, 1 << (len(ids) - 1).bit_length())
        padded_1T = np.zeros((1, min(bucket, longest)), np.int32)
        padded_1T[0, : len(ids)] = ids
        logits_1TV = _logits(self.params, jnp.asarray(padded_1T), config=self.config)
        return np.asarray(logits_1TV[0, : len(ids)])

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        seed: int = Sampling.seed,
    ) -> str:
        """Returns the text with which the model continues a prompt.

        The settings are those of `mobilellm generate`; temperature 0 takes the likeliest tokens.

        Raises:
          UserError: if a setting is out of its range, or the prompt does not fit `max_seq_len`.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        ids = self.tokens(prompt)
        limit = new_tokens_for(self.config, ids, max_new_tokens, 128)
        request = Request(
            [ids],
            max_new_tokens=limit,
            sampling=sampling,
            end_ids=self.tokenizer.convention.end_ids,
        )
        [new] = generate(self.config, self._prepared, request)
        return "".join(decode_stream(self.tokenizer, ids, [new]))

    @functools.cached_property
    def _prepared(self) -> Prepared:
        return prepare(self.config, self.params)


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: dict[str, Any], tokens_1T: jax.Array, *, config: ModelConfig) -> jax.Array:
    return cast(jax.Array, Transformer(config).apply({"params": params}, tokens_1T))
