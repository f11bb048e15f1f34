"""The interface between an evaluation and a model: a checkpoint in JAX or an exported file."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.prefix_trees import Query
from mobilellm_jax.evaluate.scoring import Score, Scorer, checked_score, log_softmax
from mobilellm_jax.export.runtime import Runtime, greedy
from mobilellm_jax.generation.generate import Request, prepare, stream
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.model.precision import compute_dtype
from mobilellm_jax.model.transformer import Params

Continuations = Iterator[list[list[int]]]
"""Yields some new tokens of every prompt at a time; EOS ends a row and is not part of it."""


class Writer(Protocol):
    """Continues prompts, as `generate.stream` does."""

    def __call__(self, request: Request) -> Continuations: ...


class Engine(Protocol):
    """A model that scores continuations and writes texts."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    @property
    def precision(self) -> str:
        """Name of the number format that the model computes in, for the record."""

    @property
    def prompts_at_once(self) -> int:
        """Largest number of prompts for one call of the writer."""

    def scores(self, queries: Sequence[Query]) -> Iterator[list[tuple[int, Score]]]:
        """Yields pairs of a query's number and its score, some queries at a time."""

    def writer(self) -> Writer:
        """Returns a function that continues prompts; it may hold a copy of the weights."""


@dataclasses.dataclass(frozen=True)
class JaxEngine:
    """A checkpoint on the mesh of its scorer."""

    config: ModelConfig
    scorer: Scorer
    params: Params
    prompts_at_once: int = 32

    @property
    def precision(self) -> str:
        return str(compute_dtype(self.config))

    def scores(self, queries: Sequence[Query]) -> Iterator[list[tuple[int, Score]]]:
        return self.scorer.scores(self.params, queries)

    def writer(self) -> Writer:
        return functools.partial(stream, self.config, prepare(self.config, self.params))


@dataclasses.dataclass(frozen=True)
class RuntimeEngine:
    """An exported model in its own runtime, which reads one sequence at a time."""

    config: ModelConfig
    precision: str
    runtime: Runtime
    prompts_at_once: int = 1

    def scores(self, queries: Sequence[Query]) -> Iterator[list[tuple[int, Score]]]:
        """Scores each query; queries with the same tokens are read once."""
        order = sorted(range(len(queries)), key=lambda i: queries[i].tokens)
        tokens: tuple[int, ...] = ()
        log_TV: NDArray[np.float64] = np.zeros((0, 0))
        for number in order:
            query = queries[number]
            if query.tokens != tokens:
                tokens, log_TV = query.tokens, log_softmax(self.runtime.read(query.tokens))
            rows_SV = log_TV[len(tokens) - len(query.targets) :]
            found_S = rows_SV[np.arange(len(query.targets)), list(query.targets)]
            is_greedy = bool((rows_SV.argmax(axis=-1) == query.targets).all())
            yield [(number, checked_score(found_S.tolist(), is_greedy))]

    def writer(self) -> Writer:
        return self._write

    def _write(self, request: Request) -> Continuations:
        if request.sampling != GREEDY:
            raise UserError(
                "A task asks for sampled texts, and an exported model only writes the likeliest "
                "tokens; leave the task out, or evaluate the checkpoint."
            )
        [prompt] = request.prompts
        for token in greedy(self.runtime, prompt, request.max_new_tokens):
            if token == request.eos_id:
                return
            yield [[token]]
