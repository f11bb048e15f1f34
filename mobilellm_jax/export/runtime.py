"""The interface of every runtime, and the description of a model file."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """The manifest's description of a model file."""

    format: str  # of RUNTIMES
    file: str  # name of the model file in the folder
    precision: str  # precision of the weights: float32, q8_0, ...
    model: ModelConfig
    loss: float | None  # loss of the verification's text in the runtime, in nats per token
    origin: str  # the checkpoint

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_seq_len(self) -> int:
        """Largest number of tokens in the cache of the export."""
        return self.model.max_seq_len


class Runtime(Protocol):
    """A model that is loaded in the runtime of its format; it holds one sequence."""

    @property
    def name(self) -> str:
        """Name and version of the runtime, for messages."""

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""

    @property
    def max_seq_len(self) -> int:
        """Largest number of tokens in a sequence."""

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Starts a new sequence, reads all its tokens at once, and returns their logits.

        Args:
          tokens: at least one token; the cache keeps them.

        Returns:
          Logits of shape [tokens, vocabulary]; row t predicts the token after token t.
        """

    def append(self, token: int) -> NDArray[np.float32]:
        """Reads one more token with the cache and returns the logits of the next token."""


def greedy(runtime: Runtime, prompt: Sequence[int], count: int) -> Iterator[int]:
    """Yields the `count` most likely tokens after `prompt`, decoded one by one."""
    logits_V = runtime.read(prompt)[-1]
    for left in reversed(range(count)):
        token = int(np.argmax(logits_V))
        yield token
        if left:
            logits_V = runtime.append(token)


def check_room(runtime: Runtime, tokens: int) -> None:
    """Checks that a sequence is not empty and fits into the cache.

    Raises:
      UserError: if `tokens` is empty or has more tokens than the export allows.
    """
    if not 1 <= tokens <= runtime.max_seq_len:
        raise UserError(
            f"A sequence of {tokens:,} tokens must have at least 1 and at most max_seq_len="
            f"{runtime.max_seq_len:,}, for which the artefact was exported."
        )
