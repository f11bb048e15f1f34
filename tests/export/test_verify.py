"""Verification finds the errors of a wrong artefact and passes a right artefact."""

import dataclasses

import numpy as np
import pytest

from mobilellm_jax.export.formats import EXACT, HALF
from mobilellm_jax.export.verify import VerificationError, verify
from mobilellm_jax.model.opened import OpenedModel
from tests.export.jax_runtime import JaxRuntime


@pytest.fixture
def source(tiny_config, tiny_params, tokenizer) -> OpenedModel:
    config = tiny_config(num_repeats=2)
    return OpenedModel(config, tiny_params(config, 6.0), tokenizer, "here")


class Wrong:
    """A runtime that changes one answer."""

    def __init__(self, inner: JaxRuntime, at_once=lambda x: x, by_cache=lambda x: x, ids=None):
        self._inner, self._at_once, self._by_cache, self._ids = inner, at_once, by_cache, ids
        self.name, self.max_seq_len = "wrong", inner.max_seq_len

    def read(self, tokens):
        return self._at_once(self._inner.read(tokens))

    def encode(self, text):
        return self._ids

    def append(self, token):
        return self._by_cache(self._inner.append(token))


def test_the_same_model_passes(source: OpenedModel) -> None:
    found = verify(JaxRuntime(source.config, source.params), source)
    assert found.problems(EXACT) == []
    assert found.positions == 256 and found.greedy_equal == found.greedy_tokens == 64
    assert found.read_error < 1e-4 and found.append_error < 1e-4
    assert found.loss == pytest.approx(found.loss_jax, abs=1e-5)
    # A random model of 320 tokens; and its logits are far enough apart to tell rows from another.
    assert abs(found.loss - np.log(320)) < 1.5 and found.largest_logit > 0.5


def changed(logits):
    out = logits.copy()
    out[..., 7] += 0.1
    return out


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"at_once": changed}, "logits read at once are off by 0.1"),
        ({"by_cache": changed}, "logits read by the cache are off by 0.1"),
        ({"by_cache": lambda x: x * np.nan}, "logits read by the cache are off by inf"),
        ({"by_cache": lambda x: -x}, "greedy token 2 differs"),
        ({"ids": [3, 4, 5]}, "its tokenizer gives a text other ids"),
    ],
)
def test_what_is_wrong_is_named(source: OpenedModel, wrong, problem: str) -> None:
    runtime = Wrong(JaxRuntime(source.config, source.params), **wrong)
    assert any(problem in each for each in verify(runtime, source).problems(EXACT))


def test_a_rise_of_the_loss_is_a_problem_and_a_fall_is_not(source: OpenedModel) -> None:
    found = verify(JaxRuntime(source.config, source.params), source)
    worse = dataclasses.replace(found, loss=found.loss_jax + HALF.loss * 1.5)
    assert "the loss rises by 0.015" in " ".join(worse.problems(HALF))
    assert dataclasses.replace(found, loss=found.loss_jax - 1).problems(HALF) == []
    assert "the loss rises by nan" in " ".join(
        dataclasses.replace(found, loss=float("nan")).problems(HALF)
    )


def test_another_vocabulary_is_refused(source: OpenedModel) -> None:
    runtime = Wrong(JaxRuntime(source.config, source.params), at_once=lambda x: x[:, :-1])
    with pytest.raises(VerificationError, match=r"\(256, 319\), and the model has \(256, 320\)"):
        verify(runtime, source)


def test_a_short_model_is_verified_over_what_it_reads(source: OpenedModel) -> None:
    config = dataclasses.replace(source.config, max_seq_len=48)
    short = dataclasses.replace(source, config=config)
    found = verify(JaxRuntime(config, source.params), short)
    assert (found.positions, found.greedy_tokens) == (48, 24) and found.problems(EXACT) == []
