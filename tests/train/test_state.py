import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mobilellm_jax.model.transformer import init_params
from mobilellm_jax.train.state import abstract_state, init_state


def test_abstract_state_describes_the_state(prepare: Callable) -> None:
    run = prepare(1)
    abstract = abstract_state(run.config, run.optimizer, run.mesh, run.rules)
    assert jax.tree.structure(abstract) == jax.tree.structure(run.initial)

    def assert_described(leaf: jax.Array, by: Any) -> None:
        assert isinstance(by, jax.ShapeDtypeStruct)
        assert (leaf.shape, leaf.dtype) == (by.shape, by.dtype)
        assert leaf.sharding.is_equivalent_to(by.sharding, leaf.ndim)

    jax.tree.map(assert_described, run.initial, abstract)


def test_fresh_state_starts_at_nothing(prepare: Callable) -> None:
    state = prepare(1).initial
    assert (int(state.step), int(state.bad_steps)) == (0, 0)
    moments = jax.device_get(jax.tree.leaves(state.optimizer))
    assert sum(leaf.size for leaf in moments) > 2 * sum(
        leaf.size for leaf in jax.tree.leaves(state.params)
    )
    for leaf in moments:
        np.testing.assert_array_equal(leaf, 0)


def test_seed_fixes_parameters_and_the_key_of_sampling(prepare: Callable) -> None:
    run = prepare(1)
    init_key, run_key = jax.random.split(jax.random.key(run.config.train.seed))
    expected = init_params(run.config.model, init_key)
    jax.tree.map(np.testing.assert_array_equal, run.initial.params, expected)
    np.testing.assert_array_equal(run.initial.key_data, jax.random.key_data(run_key))

    train = dataclasses.replace(run.config.train, seed=run.config.train.seed + 1)
    config = dataclasses.replace(run.config, train=train)
    other = init_state(config, run.optimizer, run.mesh, run.rules)
    table = other.params["embedding"]["table"]
    assert float(abs(table - expected["embedding"]["table"]).max()) > 0.01
    assert not np.array_equal(other.key_data, run.initial.key_data)
