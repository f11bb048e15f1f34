"""Builds the training step: loss, gradient and update, as a pure, jitted and sharded function."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypedDict, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from mobilellm_jax.config import Config
from mobilellm_jax.model.products import operands
from mobilellm_jax.model.transformer import Params, Transformer, head_matrix
from mobilellm_jax.sharding import (
    BATCH_AXES,
    Rules,
    UnderMesh,
    batch_sharding,
    batch_shards,
    jit_under,
    replicated,
)
from mobilellm_jax.train.loss import token_losses, weighted_loss
from mobilellm_jax.train.optimizer import learning_rate, updates_made
from mobilellm_jax.train.spikes import judge
from mobilellm_jax.train.state import TrainState

Batch = Mapping[str, jax.Array]
"""Holds tokens and targets [B, T] int, and weights [B, T] float, which are 0 without a target. With
document masking, it also holds segments and positions [B, T] int."""


class StepMetrics(TypedDict):
    """Metrics of a step as device scalars; the host reads them while the next step runs."""

    loss: Float[Array, ""]  # Mean loss in nats per target.
    grad_norm: Float[Array, ""]  # Norm of the gradient before clipping.
    learning_rate: Float[Array, ""]  # Learning rate of the step.
    targets: Float[Array, ""]  # Number of targets in the batch.
    update_norm: Float[Array, ""]  # Norm of the update of the parameters.
    skipped: Bool[Array, ""]  # Whether the step updated nothing: a spike, or not finite.
    spike: Bool[Array, ""]  # Whether loss or gradient norm is finite, but far above recent steps.
    bad_steps: Array  # Number of latest consecutive steps that were not finite.
    skipped_steps: Array  # Number of skipped steps in the whole run.


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
Transform = Callable[[Params], Params]


def chunk_positions(config: Config, rows: int, shards: int) -> int:
    """Returns the number of positions of each row in a chunk of the loss (`train.loss_chunk`)."""
    rows_per_device = max(1, rows // shards)
    return max(1, min(config.data.seq_len, config.train.loss_chunk // rows_per_device))


def make_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules,
    state: TrainState,
    transform: Transform = lambda params: params,
) -> UnderMesh[tuple[TrainState, StepMetrics]]:
    """Returns the jitted step, which donates its input state.

    The loss is the mean over all targets of the global batch. The number of micro-batches and
    devices does not change it.

    A step changes neither parameters nor optimizer state if its loss, gradient or update is not
    finite, or if it is a spike (`train.spike_factor`, see `spikes.py`). The step also checks the
    update, because a damaged optimizer state can turn a finite gradient into an update that is not
    finite.

    The step takes its shardings from `state`, which may be abstract. The model computes with
    `transform(params)`, and gradients flow through `transform` to the parameters.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jit_under(
        mesh,
        rules,
        _step(config, optimizer, mesh, transform),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, transform: Transform
) -> TrainStep:
    schedule = learning_rate(config.optimizer, config.train.steps)
    loss_and_gradient = _loss_and_gradient(config, mesh, transform)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        targets = jnp.sum(batch["weights"])
        loss, gradient = loss_and_gradient(state.params, batch, jnp.maximum(targets, 1.0))
        grad_norm = optax.tree.norm(gradient)
        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        new_params = optax.apply_updates(state.params, updates)
        update_norm = optax.tree.norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        # The loss of a batch without targets is 0, which must not become one of the recent values.
        measured = finite & (targets > 0)
        spike, recent = judge(state.recent, loss, grad_norm, measured, config.train.spike_factor)
        good = finite & ~spike
        kept_params, kept_optimizer = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (new_params, new_optimizer),
            (state.params, state.optimizer),
        )
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=kept_params,
            optimizer=kept_optimizer,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            skipped_steps=jnp.where(good, state.skipped_steps, state.skipped_steps + 1),
            recent=recent,
        )
        return new_state, StepMetrics(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=schedule(updates_made(state.optimizer)),
            targets=targets,
            update_norm=update_norm,
            skipped=~good,
            spike=spike,
            bad_steps=new_state.bad_steps,
            skipped_steps=new_state.skipped_steps,
        )

    return step


def _loss_and_gradient(
    config: Config, mesh: Mesh, transform: Transform
) -> Callable[[Params, Batch, jax.Array], tuple[jax.Array, Params]]:
    model = Transformer(config.model)
    accumulation = config.train.accumulation_steps
    rows = config.train.global_batch // accumulation
    chunk = chunk_positions(config, rows, batch_shards(mesh))

    def loss_of(params: Params, batch: Batch, total: jax.Array) -> jax.Array:
        params = transform(params)
        x_BTD = _hidden(model, params, batch)
        x_BTD, head_VD = operands("BTD,VD->BTV", x_BTD, head_matrix(params, config.model))
        return weighted_loss(x_BTD, head_VD, batch["targets"], batch["weights"], chunk) / total

    def accumulated(params: Params, batch: Batch, total: jax.Array) -> tuple[jax.Array, Params]:
        def add(
            carry: tuple[jax.Array, Params], micro_batch: Batch
        ) -> tuple[tuple[jax.Array, Params], None]:
            part = jax.value_and_grad(loss_of)(params, micro_batch, total)
            return jax.tree.map(jnp.add, carry, part), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        sums, _ = jax.lax.scan(add, zeros, _micro_batches(batch, accumulation, mesh))
        return sums

    return jax.value_and_grad(loss_of) if accumulation == 1 else accumulated


def make_loss_sums(
    config: Config, mesh: Mesh, rules: Rules, rows: int
) -> UnderMesh[tuple[jax.Array, jax.Array]]:
    """Returns a jitted function that computes the sum of losses and the number of targets."""
    model = Transformer(config.model)
    chunk = chunk_positions(config, rows, batch_shards(mesh))

    def loss_sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        x_BTD = _hidden(model, params, batch)
        losses_BT = token_losses(x_BTD, head_matrix(params, config.model), batch["targets"], chunk)
        return jnp.sum(losses_BT * batch["weights"]), jnp.sum(batch["weights"])

    return jit_under(mesh, rules, loss_sums)


def _hidden(model: Transformer, params: Params, batch: Batch) -> jax.Array:
    x_BTD = model.apply(
        {"params": params},
        batch["tokens"],
        segments_BT=batch.get("segments"),
        positions_BT=batch.get("positions"),
        method="hidden",
    )
    return cast(jax.Array, x_BTD)


def _micro_batches(batch: Batch, accumulation: int, mesh: Mesh) -> Batch:
    """Splits [B, T] into [accumulation, B / accumulation, T].

    Micro-batch number m has the rows m, m + accumulation, m + 2 * accumulation and so on. With this
    order every device splits its own rows, and no row moves to another device.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "sequence"))

    def split(x_BT: jax.Array) -> jax.Array:
        parts = x_BT.reshape(-1, accumulation, *x_BT.shape[1:]).swapaxes(0, 1)
        return cast(jax.Array, jax.lax.with_sharding_constraint(parts, sharding))

    return {name: split(x_BT) for name, x_BT in batch.items()}
