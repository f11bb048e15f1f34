"""The interface through which evaluations use a model: a checkpoint in JAX or an export."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import MeshConfig, ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.prefix_trees import Query
from mobilellm_jax.evaluate.scoring import Score, Scorer, checked_score
from mobilellm_jax.export.runtime import Runtime, greedy
from mobilellm_jax.generation.generate import Request, prepare, stream
from mobilellm_jax.model.on_device import compute_dtype
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.sharding import logical_rules, make_mesh, replicated

Continuations = Iterator[list[list[int]]]
"""Each item holds a few new tokens of every prompt; the EOS that ends a row is left out."""

Writer = Callable[[Request], Continuations]
"""A function that continues the prompts of a request, as `generate.stream` does."""


@dataclasses.dataclass(frozen=True)
class JaxEngine:
    """A checkpoint that runs in JAX, with its parameters on the mesh of the scorer."""

    scorer: Scorer
    params: Params
    prompts_at_once: int = 32  # The largest number of prompts in one call of the text generator.

    @property
    def config(self) -> ModelConfig:
        return self.scorer.config

    @property
    def precision(self) -> str:
        """Name of the number format in which the model computes."""
        return str(compute_dtype(self.config))

    @property
    def name(self) -> str:
        """Name and version of the library that runs the model."""
        return f"JAX {jax.__version__}"

    def scores(self, queries: Sequence[Query]) -> Iterator[list[tuple[int, Score]]]:
        """Yields lists of pairs: the index of a query in `queries`, and the score of this query."""
        return self.scorer.scores(self.params, queries)

    def writer(self) -> Writer:
        """Returns a function that continues prompts; the function holds a copy of the weights."""
        return functools.partial(stream, self.config, prepare(self.config, self.params))


def jax_engine(
    config: ModelConfig, params: Params, devices: Sequence[jax.Device] | None = None
) -> JaxEngine:
    """Returns an engine that keeps all parameters on each of `devices` (None: every device)."""
    mesh = make_mesh(MeshConfig(), devices)
    scorer = Scorer(config, mesh, logical_rules(config, mesh.shape))
    return JaxEngine(scorer, jax.device_put(params, replicated(mesh)))


@dataclasses.dataclass(frozen=True)
class RuntimeEngine:
    """An exported model in its own runtime; the runtime reads one sequence at a time."""

    config: ModelConfig
    precision: str
    runtime: Runtime
    prompts_at_once: int = 1

    @property
    def name(self) -> str:
        return self.runtime.name

    def scores(self, queries: Sequence[Query]) -> Iterator[list[tuple[int, Score]]]:
        """Scores one query at a time; if queries have equal tokens, the model reads them once."""
        from scipy.special import log_softmax  # The import takes half a second of CPU time.

        order = sorted(range(len(queries)), key=lambda i: queries[i].tokens)
        tokens: tuple[int, ...] = ()
        log_TV: NDArray[np.float64] = np.zeros((0, 0))
        for number in order:
            query = queries[number]
            if query.tokens != tokens:
                tokens = query.tokens
                # With float64, large logits of a runtime lose no digits.
                logits_TV = self.runtime.read(tokens).astype(np.float64)
                log_TV = log_softmax(logits_TV, axis=-1)
            rows_SV = log_TV[len(tokens) - len(query.targets) :]
            found_S = rows_SV[np.arange(len(query.targets)), list(query.targets)]
            is_greedy = bool((rows_SV.argmax(axis=-1) == query.targets).all())
            yield [(number, checked_score(found_S.tolist(), is_greedy))]

    def writer(self) -> Writer:
        return self._write

    def _write(self, request: Request) -> Continuations:
        if request.sampling.temperature > 0:
            raise UserError("An exported model only writes the likeliest tokens.")
        [prompt], [limit] = request.prompts, request.limits
        for token in greedy(self.runtime, prompt, limit, finite=True):
            if token in request.end_ids:
                return
            yield [[token]]


Engine = JaxEngine | RuntimeEngine
"""A model that scores continuations and continues prompts."""
