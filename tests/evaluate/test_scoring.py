"""Scores from packed trees equal the scores of a separate pass for every query."""

import dataclasses

import jax
import numpy as np
import pytest

from mobilellm_jax.config import MeshConfig, ModelConfig
from mobilellm_jax.evaluate.prefix_trees import Query, make_query
from mobilellm_jax.evaluate.scoring import Score, Scorer
from mobilellm_jax.model.transformer import Params, Transformer, init_params
from mobilellm_jax.sharding import logical_rules, make_mesh

CONFIG = ModelConfig(
    vocab_size=40,
    embed_dim=16,
    num_blocks=2,
    num_repeats=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    max_seq_len=48,
    init_std=0.4,  # so that the likelihoods differ
    compute_dtype="float32",
)
# Up to 30 log-probabilities in float32, about 3 nats each, are summed in float64.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(CONFIG, jax.random.key(0))


def queries_like_a_task(count: int, seed: int = 0) -> list[Query]:
    rng = np.random.default_rng(seed)
    queries = []
    for _ in range(count):
        context = rng.integers(0, 40, rng.integers(1, 40)).tolist()
        for _ in range(rng.integers(1, 5)):
            ending = rng.integers(0, 40, rng.integers(1, 20)).tolist()
            queries.append(make_query(context, ending, CONFIG.max_seq_len))
    return queries


def alone(params: Params, query: Query) -> Score:
    logits_TV = np.asarray(_logits(params, _padded(query))[0, : len(query.tokens)], np.float64)
    rows = logits_TV[-len(query.targets) :]
    logs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    return Score(
        logs[np.arange(len(rows)), query.targets].sum(),
        rows.argmax(-1).tolist() == list(query.targets),
    )


def _padded(query: Query) -> np.ndarray:
    return np.pad(query.tokens, (0, CONFIG.max_seq_len - len(query.tokens)))[None]


@jax.jit
def _logits(params: Params, tokens_BT: jax.Array) -> jax.Array:
    logits_BTV: jax.Array = Transformer(CONFIG).apply({"params": params}, tokens_BT)
    return logits_BTV


def with_greedy_ones(params: Params, queries: list[Query]) -> list[Query]:
    """Replaces the targets of every third query by the model's likeliest tokens."""
    chosen = []
    for i, query in enumerate(queries):
        start = len(query.tokens) - len(query.targets)
        tokens = list(query.tokens)
        for t in range(start, len(tokens)) if i % 3 == 0 else []:
            guess = int(_logits(params, _padded(Query(tuple(tokens), ())))[0, t].argmax())
            if t + 1 < len(tokens):
                tokens[t + 1] = guess
            targets = (*tokens[start + 1 :], guess)
        chosen.append(Query(tuple(tokens), targets) if i % 3 == 0 else query)
    return chosen


@pytest.fixture(scope="module")
def task(params: Params) -> tuple[list[Query], list[Score]]:
    """Returns queries and their scores by separate passes."""
    queries = with_greedy_ones(params, queries_like_a_task(20))
    return queries, [alone(params, query) for query in queries]


def score_all(scorer: Scorer, params: Params, queries: list[Query]) -> list[Score]:
    found = dict(pair for batch in scorer.scores(params, queries) for pair in batch)
    assert sorted(found) == list(range(len(queries)))
    return [found[i] for i in range(len(queries))]


@pytest.mark.parametrize(
    "axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "sequence": 2}]
)
def test_scores_equal_the_scores_of_separate_passes(
    axes: dict[str, int], params: Params, task: tuple[list[Query], list[Score]]
) -> None:
    mesh = make_mesh(MeshConfig(**axes))
    queries, expected = task
    assert 10 < sum(score.is_greedy for score in expected) < len(expected)
    scorer = Scorer(CONFIG, mesh, logical_rules(CONFIG, mesh.shape), batch_tokens=512)
    found = score_all(scorer, params, queries)
    for one, other in zip(found, expected, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=CLOSE)
        assert one.is_greedy == other.is_greedy


def test_the_size_of_batches_and_of_logits_changes_nothing(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    rules = logical_rules(CONFIG, mesh.shape)
    queries = queries_like_a_task(30)
    at_once = score_all(Scorer(CONFIG, mesh, rules, batch_tokens=1 << 16), params, queries)
    monkeypatch.setattr("mobilellm_jax.evaluate.scoring._LOGITS_BYTES", 40 * 4 * 11)
    apart = score_all(Scorer(CONFIG, mesh, rules, batch_tokens=256), params, queries)
    for one, other in zip(at_once, apart, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=CLOSE)
        assert one.is_greedy == other.is_greedy


def test_other_parameters_compile_nothing_new(params: Params) -> None:
    mesh = make_mesh(MeshConfig())
    scorer = Scorer(CONFIG, mesh, logical_rules(CONFIG, mesh.shape))
    queries = queries_like_a_task(5)
    first = score_all(scorer, params, queries)
    programs = scorer._forward.jitted._cache_size()
    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    second = score_all(scorer, other, queries)
    assert scorer._forward.jitted._cache_size() == programs
    assert [s.log_likelihood for s in first] != [s.log_likelihood for s in second]


def test_the_attention_kernel_of_training_is_not_used(params: Params) -> None:
    mesh = make_mesh(MeshConfig())
    rules = logical_rules(CONFIG, mesh.shape)
    kernel = dataclasses.replace(CONFIG, attention="splash")
    queries = queries_like_a_task(2)
    assert score_all(Scorer(kernel, mesh, rules), params, queries) == score_all(
        Scorer(CONFIG, mesh, rules), params, queries
    )


def test_parameters_that_are_not_numbers_fail(params: Params) -> None:
    mesh = make_mesh(MeshConfig())
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    scorer = Scorer(CONFIG, mesh, logical_rules(CONFIG, mesh.shape))
    with pytest.raises(FloatingPointError, match="not finite"):
        score_all(scorer, broken, queries_like_a_task(1))


def test_no_queries_no_scores(params: Params) -> None:
    mesh = make_mesh(MeshConfig())
    scorer = Scorer(CONFIG, mesh, logical_rules(CONFIG, mesh.shape))
    assert list(scorer.scores(params, [])) == []
