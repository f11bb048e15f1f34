"""The training step: loss, gradient, update; pure, jitted, sharded, its state donated."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypedDict, TypeVar, cast

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
    batch_sharding,
    batch_shards,
    replicated,
    use,
    with_rules,
)
from mobilellm_jax.train.loss import token_losses, weighted_loss
from mobilellm_jax.train.optimizer import learning_rate
from mobilellm_jax.train.spikes import judge
from mobilellm_jax.train.state import TrainState

Batch = Mapping[str, jax.Array]
"""tokens, targets [B, T] int; weights [B, T] float, 0 where there is no target; and with document
masking segments and positions [B, T] int."""


class StepMetrics(TypedDict):
    """What a step reports, as device scalars that the host reads one step late."""

    loss: Float[Array, ""]  # nats per target
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]  # tokens that counted
    update_norm: Float[Array, ""]  # of what was to be added to the parameters
    skipped: Bool[Array, ""]  # not finite, or a spike; nothing was updated
    spike: Bool[Array, ""]  # finite, but far above the steps before
    bad_steps: Array  # not finite, in a row
    skipped_steps: Array  # in the whole run


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
Transform = Callable[[Params], Params]
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class UnderMesh(Generic[Result]):
    """A jitted function that is traced under its own mesh and rules, whatever surrounds the call.

    `lower` is for those who look at the program instead of running it.
    """

    jitted: jax.stages.Wrapped
    mesh: Mesh
    rules: Rules

    def __call__(self, *arguments: Any) -> Result:
        with use(self.mesh, self.rules):
            return cast(Result, self.jitted(*arguments))

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        with use(self.mesh, self.rules):
            return self.jitted.lower(*arguments)


def chunk_positions(config: Config, rows: int, shards: int) -> int:
    """Returns how many positions of each row are scored at once (see `train.loss_chunk`)."""
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
    """Returns the jitted step. `state` tells the shardings: concrete or abstract.

    The model computes with `transform(params)`, through which gradients flow to the parameters.

    The loss is the mean over all targets of the global batch, however it is split into
    micro-batches and devices: each part is divided by the targets of the whole. A step whose loss,
    gradient or update is not finite leaves parameters and optimizer as they were. The update has a
    say of its own because a damaged optimizer state makes one that is not finite from a gradient
    that is. With `train.spike_factor`, so does a step that is a spike (`spikes.py`).
    """
    model = Transformer(config.model)
    schedule = learning_rate(config.optimizer, config.train.steps)
    accumulation = config.train.accumulation_steps
    rows = config.train.global_batch // accumulation
    chunk = chunk_positions(config, rows, batch_shards(mesh))

    def loss_of(params: Params, batch: Batch, total: jax.Array) -> jax.Array:
        params = transform(params)
        x_BTD = _hidden(model, params, batch)
        x_BTD, head_VD = operands("BTD,VD->BTV", x_BTD, head_matrix(params, config.model))
        return weighted_loss(x_BTD, head_VD, batch["targets"], batch["weights"], chunk) / total

    def loss_and_gradient(
        params: Params, batch: Batch, total: jax.Array
    ) -> tuple[jax.Array, Params]:
        if accumulation == 1:
            return jax.value_and_grad(loss_of)(params, batch, total)

        def add(
            carry: tuple[jax.Array, Params], micro_batch: Batch
        ) -> tuple[tuple[jax.Array, Params], None]:
            part = jax.value_and_grad(loss_of)(params, micro_batch, total)
            return jax.tree.map(jnp.add, carry, part), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        sums, _ = jax.lax.scan(add, zeros, _micro_batches(batch, accumulation, mesh))
        return sums

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        targets = jnp.sum(batch["weights"])
        loss, gradient = loss_and_gradient(state.params, batch, jnp.maximum(targets, 1.0))
        grad_norm = optax.tree.norm(gradient)
        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        new_params = optax.apply_updates(state.params, updates)
        update_norm = optax.tree.norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        spike, recent = judge(state.recent, loss, grad_norm, finite, config.train.spike_factor)
        good = finite & ~spike
        keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        skipped_steps = jnp.where(good, state.skipped_steps, state.skipped_steps + 1)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=jax.tree.map(keep, new_params, state.params),
            optimizer=jax.tree.map(keep, new_optimizer, state.optimizer),
            bad_steps=bad_steps,
            skipped_steps=skipped_steps,
            recent=recent,
        )
        return new_state, StepMetrics(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=schedule(_updates_made(state.optimizer)),
            targets=targets,
            update_norm=update_norm,
            skipped=~good,
            spike=spike,
            bad_steps=bad_steps,
            skipped_steps=skipped_steps,
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(
        with_rules(step, rules),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )

    return UnderMesh(jitted, mesh, rules)


def make_loss_sums(
    config: Config, mesh: Mesh, rules: Rules, rows: int
) -> UnderMesh[tuple[jax.Array, jax.Array]]:
    """Returns a jitted function to (sum of losses in nats, number of targets) of a batch."""
    model = Transformer(config.model)
    chunk = chunk_positions(config, rows, batch_shards(mesh))

    def loss_sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        x_BTD = _hidden(model, params, batch)
        losses_BT = token_losses(x_BTD, head_matrix(params, config.model), batch["targets"], chunk)
        return jnp.sum(losses_BT * batch["weights"]), jnp.sum(batch["weights"])

    return UnderMesh(jax.jit(with_rules(loss_sums, rules)), mesh, rules)


def _updates_made(optimizer: optax.OptState) -> jax.Array:
    """Optax counts in several places, all alike; a skipped step counts in none."""
    (_, count), *_ = optax.tree.get_all_with_path(optimizer, "count")
    return cast(jax.Array, count)


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
    """[B, T] -> [accumulation, B / accumulation, T].

    Micro-batch a takes rows a, a + accumulation, ...: every device cuts the rows it already holds
    and none moves.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, "sequence"))

    def split(x_BT: jax.Array) -> jax.Array:
        parts = x_BT.reshape(-1, accumulation, *x_BT.shape[1:]).swapaxes(0, 1)
        return cast(jax.Array, jax.lax.with_sharding_constraint(parts, sharding))

    return {name: split(x_BT) for name, x_BT in batch.items()}
