import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from mobilellm_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from mobilellm_jax.sharding import AXES, Rules, logical_rules, put_batch
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import TrainState, init_state
from mobilellm_jax.train.step import TrainStep, make_train_step

CONFIG = Config(
    model=ModelConfig(
        vocab_size=48,
        embed_dim=24,
        num_blocks=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        ffn_dim=40,
        max_seq_len=32,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=16),
    # With a warm-up of one step, the first update is zero and the second has the full rate.
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=1),
    # A loss chunk of 20 positions over 8 rows makes chunks of 2 positions.
    train=TrainConfig(steps=20, global_batch=8, loss_chunk=20, seed=3),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A compiled step on one device, and copies of one initial state to start it from."""

    config: Config
    optimizer: optax.GradientTransformation
    mesh: Mesh
    rules: Rules
    initial: TrainState
    step_fn: TrainStep

    def state(self) -> TrainState:
        """Returns a new copy, because a step donates its input state."""
        return jax.tree.map(lambda x: jax.device_put(x.copy(), x.sharding), self.initial)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return put_batch(batch, self.mesh, self.config.train.global_batch)


@functools.cache
def _initial() -> tuple[optax.GradientTransformation, Mesh, Rules, TrainState]:
    shape = (1, 1, 1, 1)
    mesh = jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:1]
    )
    rules = logical_rules(CONFIG.model, mesh.shape)
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.train.steps)
    return optimizer, mesh, rules, init_state(CONFIG, optimizer, mesh, rules)


@functools.cache
def _prepare(accumulation_steps: int, spike_factor: float = 0.0) -> Run:
    train = dataclasses.replace(
        CONFIG.train, accumulation_steps=accumulation_steps, spike_factor=spike_factor
    )
    config = dataclasses.replace(CONFIG, train=train)
    optimizer, mesh, rules, initial = _initial()
    step_fn = make_train_step(config, optimizer, mesh, rules, initial)
    return Run(config, optimizer, mesh, rules, initial, step_fn)


@pytest.fixture
def config() -> Config:
    """Returns the config of the run that `prepare` compiles."""
    return CONFIG


@pytest.fixture
def prepare() -> Callable[..., Run]:
    """Returns a function of micro-batches and spike factor; all tests share its programs."""
    return _prepare


@pytest.fixture
def make_batch() -> Callable[[int], dict[str, Any]]:
    """Returns a function from a seed to random rows; about a third of the targets do not count."""

    def make(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        shape = (CONFIG.train.global_batch, CONFIG.data.seq_len)
        return {
            "tokens": rng.integers(0, CONFIG.model.vocab_size, shape, dtype=np.int32),
            "targets": rng.integers(0, CONFIG.model.vocab_size, shape, dtype=np.int32),
            "weights": (rng.random(shape) < 0.7).astype(np.float32),
        }

    return make
