"""What every runtime answers, and what it takes from a sequence to the next."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """What the manifest says of a model file."""

    format: str  # of RUNTIMES
    file: str  # the model's, in the folder
    precision: str  # of the weights: float32, q8_0, ...
    model: ModelConfig
    loss: float | None  # nats per token of the text of the verification, in its runtime
    origin: str  # the checkpoint

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_seq_len(self) -> int:
        """Tokens that the artefact's cache has room for."""
        return self.model.max_seq_len


class Runtime(Protocol):
    """A model loaded in the runtime of its format, with room for one sequence."""

    @property
    def name(self) -> str:
        """The runtime and its version, for the eye."""

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""

    @property
    def max_seq_len(self) -> int:
        """Tokens that a sequence may have."""

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Forgets everything and reads a sequence at once; returns [tokens, vocabulary] logits.

        Row t holds the logits of what follows token t. The sequence, of at least a token, is kept
        in the cache.
        """

    def append(self, token: int) -> NDArray[np.float32]:
        """Reads one token more by the cache; returns the logits of what follows it."""


def greedy(runtime: Runtime, prompt: Sequence[int], count: int) -> Iterator[int]:
    """Yields the likeliest `count` tokens after `prompt`, decoded one by one."""
    logits_V = runtime.read(prompt)[-1]
    for left in reversed(range(count)):
        token = int(np.argmax(logits_V))
        yield token
        if left:
            logits_V = runtime.append(token)


def check_room(runtime: Runtime, tokens: int) -> None:
    """Refuses a sequence that the cache has no room for.

    Raises:
      UserError: if `tokens` is none, or more than the artefact was exported for.
    """
    if not 1 <= tokens <= runtime.max_seq_len:
        raise UserError(
            f"A sequence of {tokens:,} tokens must have at least 1 and at most max_seq_len="
            f"{runtime.max_seq_len:,}, for which the artefact was exported."
        )
