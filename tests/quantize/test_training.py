"""Quantization-aware training: the loss of the step, its gradient, and meshes."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizeConfig,
    QuantizeScheme,
    TrainConfig,
)
from mobilellm_jax.model.transformer import Params, Transformer
from mobilellm_jax.quantize.kernels import TrainedKernel
from mobilellm_jax.quantize.parameters import derivation, training_transform
from mobilellm_jax.sharding import logical_rules, make_mesh, put_batch
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import abstract_state, init_state
from mobilellm_jax.train.step import make_loss_sums, make_train_step

CONFIG = Config(
    model=ModelConfig(
        vocab_size=64,
        embed_dim=32,
        num_blocks=2,
        num_repeats=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        max_seq_len=32,
        init_std=0.1,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=16),
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=1),
    train=TrainConfig(steps=4, global_batch=8, accumulation_steps=2, loss_chunk=20),
)


def config_of(scheme: QuantizeScheme) -> Config:
    return dataclasses.replace(CONFIG, quantize=QuantizeConfig(scheme=scheme))


def batch_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, CONFIG.model.vocab_size, (8, 17), dtype=np.int32)
    weights = np.ones((8, 16), np.float32)
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": weights}


@functools.cache
def run(config: Config, mesh_config: MeshConfig, steps: int = 3) -> tuple[Params, list[float]]:
    devices = jax.devices()[:1] if mesh_config == MeshConfig(data=1) else None
    mesh = make_mesh(mesh_config, devices)
    rules = logical_rules(config.model, mesh.shape)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    step_fn = make_train_step(
        config,
        optimizer,
        mesh,
        rules,
        abstract_state(config, optimizer, mesh, rules),
        training_transform(config),
    )
    state, losses = init_state(config, optimizer, mesh, rules), []
    for seed in range(steps):
        state, metrics = step_fn(state, put_batch(batch_of(seed), mesh, 8))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state.params), losses


def losses_of_integers(config: Config, params: Params, seeds: Sequence[int]) -> list[float]:
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    loss_sums = make_loss_sums(config, mesh, logical_rules(config.model, mesh.shape), 8)
    integers = derivation(config)(params)
    sums = [loss_sums(integers, put_batch(batch_of(seed), mesh, 8)) for seed in seeds]
    return [float(nats) / float(targets) for nats, targets in sums]


@functools.cache
def float_loss() -> float:
    """Returns the loss of the model before the first step, without quantization."""
    (loss,) = losses_of_integers(CONFIG, run(CONFIG, MeshConfig(data=1), steps=0)[0], [0])
    return loss


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_step_has_the_loss_of_the_integer_model(scheme: QuantizeScheme) -> None:
    config = config_of(scheme)
    params, losses = run(config, MeshConfig(data=1))
    start, _ = run(CONFIG, MeshConfig(data=1), steps=0)
    # The first update is zero, because of the warm-up. A number at the border of two levels may
    # round to either. In the mean of 128 targets this changes less than the scheme does.
    expected = losses_of_integers(config, start, [0, 1])
    assert losses[:2] == pytest.approx(expected, rel=3e-5)
    assert abs(losses[0] - float_loss()) > 1e-4 * losses[0]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, start)
    assert all(distance > 1e-4 for distance in jax.tree.leaves(moved))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_gradient_is_that_at_the_levels() -> None:
    """With quantized weights alone, the gradient equals that of a float model on the levels."""
    config = dataclasses.replace(CONFIG, quantize=QuantizeConfig(scheme="w4"))
    transform = training_transform(config)
    params = jax.tree.map(jnp.asarray, run(CONFIG, MeshConfig(data=1), steps=0)[0])
    tokens = jnp.asarray(batch_of(0)["tokens"])

    def total(params: Params) -> jax.Array:
        logits = Transformer(config.model).apply({"params": params}, tokens)
        return jnp.sum(jnp.sin(logits))

    levels = jax.tree.map(
        lambda node: node.values if isinstance(node, TrainedKernel) else node,
        transform(params),
        is_leaf=lambda node: isinstance(node, TrainedKernel),
    )
    found = jax.jit(jax.grad(lambda p: total(transform(p))))(params)
    expected, elsewhere = (jax.jit(jax.grad(total))(p) for p in (levels, params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        ours, float_model = (
            dict(jax.tree_util.tree_leaves_with_path(t))[path] for t in (found, elsewhere)
        )
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(ours, leaf, rtol=0, atol=1e-4 * scale, err_msg=str(path))
        assert float(jnp.abs(ours - float_model).max()) > 1e-2 * scale, path


def test_a_mesh_changes_nothing() -> None:
    config, mesh = config_of("w4a8"), MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)
    _, expected = run(config, MeshConfig(data=1))
    _, found = run(config, mesh)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_without_a_scheme_nothing_is_done() -> None:
    params = {"a": 1}
    assert training_transform(CONFIG)(params) is params
    assert derivation(CONFIG)(params) is params
