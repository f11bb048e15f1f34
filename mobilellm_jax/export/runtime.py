"""Defines the interface of all runtimes, and the description of a model file.

A runtime raises a `UserError` if it cannot load a file, or if the file contains another model than
the description says.
"""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import NotFiniteError, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """The manifest's description of a model file."""

    format: str  # A key of FORMATS.
    file: str  # Name of the model file in the folder.
    precision: str  # Precision of the weights: float32, q8_0, ...
    model: ModelConfig
    # The loss that the runtime computes on the verification text, in nats per token.
    loss: float | None
    origin: str  # The checkpoint that was exported.


class Runtime(abc.ABC):
    """A loaded model in the runtime of its format, with a cache for one sequence.

    `name` is the runtime's name and version. A call of `_extend` reads at most `chunk` tokens, by
    default a whole sequence.
    """

    def __init__(self, name: str, model: ModelConfig, chunk: int | None = None) -> None:
        self.name = name
        self.max_seq_len = model.max_seq_len
        self._chunk = chunk or model.max_seq_len
        self._length = 0  # Number of tokens in the cache.

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Reads `tokens` as a new sequence; returns their logits [tokens, vocabulary].

        The logits in row t predict token t + 1.

        Raises:
          UserError: if there is no token, or more tokens than the export allows.
        """
        self._check_room(len(tokens))
        self._length = 0
        chunks = (tokens[i : i + self._chunk] for i in range(0, len(tokens), self._chunk))
        parts = [self._read_on(chunk) for chunk in chunks]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def append(self, token: int) -> NDArray[np.float32]:
        """Reads one more token into the cache, and returns the logits for the token after it."""
        self._check_room(self._length + 1)
        last_V: NDArray[np.float32] = self._read_on([token])[-1]
        return last_V

    def encode(self, text: str) -> list[int] | None:
        """Returns the ids of a text in the export's own tokenizer; None if it runs no tokenizer."""
        del text
        return None

    @abc.abstractmethod
    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Reads `tokens`, which follow the `_length` cached tokens; 0 means a new sequence.

        Returns the logits [tokens, vocabulary] in an array that later calls do not change.
        """

    def _read_on(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        logits_TV = self._extend(tokens)
        self._length += len(tokens)
        return logits_TV

    def _check_room(self, tokens: int) -> None:
        if not 1 <= tokens <= self.max_seq_len:
            raise UserError(
                f"A sequence of {tokens:,} tokens must have at least 1 and at most max_seq_len="
                f"{self.max_seq_len:,}, for which the artefact was exported."
            )


def greedy(
    runtime: Runtime, prompt: Sequence[int], count: int, *, finite: bool = False
) -> Iterator[int]:
    """Yields `count` tokens after `prompt`; each is the most likely next token.

    With `finite`, logits that are NaN or infinite raise a `NotFiniteError`.
    """
    logits_V = runtime.read(prompt)[-1]
    for left in reversed(range(count)):
        if finite and not np.isfinite(logits_V.max()):
            raise NotFiniteError(
                f"{runtime.name} computes logits that are not finite, so it cannot choose a token; "
                "the weights are damaged or too large."
            )
        token = int(np.argmax(logits_V))
        yield token
        if left:
            logits_V = runtime.append(token)


def wrong_model(file: Path, info: ArtifactInfo, found: str = "") -> UserError:
    """Returns the error for a file that contains another model than its manifest describes."""
    return UserError(
        f"{file} is not the model of {info.model.vocab_size:,} tokens and sequences of "
        f"{info.model.max_seq_len:,} that its manifest names{found}; export again."
    )
