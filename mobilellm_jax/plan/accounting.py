"""Computes the parameters, FLOPs and bytes of a run from its config, without compiling."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.config import Config, DataConfig, ModelConfig, changed
from mobilellm_jax.model.size import flops_per_token, parameter_count
from mobilellm_jax.model.transformer import Params, Transformer, param_shapes
from mobilellm_jax.sharding import batch_shards, bytes_per_device
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import abstract_state, mesh_of
from mobilellm_jax.train.step import chunk_positions


@dataclasses.dataclass(frozen=True)
class Account:
    """The computed sizes of a run; all bytes are bytes per device."""

    parameters: int
    flops_per_token: int  # Forward and backward pass, by the convention in `model/size.py`.
    tokens_per_step: int  # Number of tokens in a global batch.
    num_devices: int
    rows: int  # Number of sequences that a device processes at the same time.
    weight_bytes: int
    optimizer_bytes: int
    gradient_bytes: int  # Gradients in float32; two copies if gradients are accumulated.
    activation_bytes: int  # Values that are kept for the backward pass (`model.remat`).
    loss_bytes: int  # Logits of one chunk, and the gradient of the output head.

    @property
    def total_bytes(self) -> int:
        """Sum of the byte counts; the compiled step can need less memory or more memory."""
        state = self.weight_bytes + self.optimizer_bytes
        return state + self.gradient_bytes + self.activation_bytes + self.loss_bytes

    @property
    def flops_per_step(self) -> int:
        """Model FLOPs of one step on one device."""
        return self.flops_per_token * self.tokens_per_step // self.num_devices


def account_of(config: Config, devices: Sequence[jax.Device]) -> Account:
    """Returns the sizes of a run; `settle` must have replaced every "auto" in `config`."""
    mesh, _ = mesh_of(config, devices)
    train, model, seq_len = config.train, config.model, config.data.seq_len
    shards = batch_shards(mesh)
    rows = train.global_batch // train.accumulation_steps // shards
    # Accumulation and remat do not change the size of the training state. With fixed values for
    # both, all candidates of `fit.py` share one trace.
    plain = changed(config, {"train.accumulation_steps": 1, "model.remat": "none"})
    weights, optimizer = _state_bytes(plain, tuple(devices))
    chunk = chunk_positions(config, rows * shards, shards) * rows
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    return Account(
        parameters=parameter_count(model),
        flops_per_token=flops_per_token(model, seq_len),
        tokens_per_step=config.tokens_per_step,
        num_devices=mesh.size,
        rows=rows,
        weight_bytes=weights,
        optimizer_bytes=optimizer,
        gradient_bytes=weights * (1 if train.accumulation_steps == 1 else 2),
        # This number is an upper bound: the mesh axis `tensor` splits some activations, but this
        # formula divides no activations by the size of that axis.
        activation_bytes=rows * activation_bytes_per_row(model, config.data) // sequence,
        loss_bytes=4 * model.vocab_size * (chunk // sequence + model.embed_dim) // tensor,
    )


@functools.lru_cache(maxsize=16)
def _state_bytes(config: Config, devices: tuple[jax.Device, ...]) -> tuple[int, int]:
    """Returns the bytes of the weights and of the optimizer state on each device."""
    mesh, rules = mesh_of(config, devices)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = abstract_state(config, optimizer, mesh, rules)
    return bytes_per_device(state.params), bytes_per_device(state.optimizer)


@functools.lru_cache
def activation_bytes_per_row(model: ModelConfig, data: DataConfig) -> int:
    """Returns the bytes of the values that the forward pass keeps for one sequence."""
    transformer = Transformer(model)
    params = param_shapes(model)

    def kept(rows: int) -> int:
        tokens_BT = jax.ShapeDtypeStruct((rows, data.seq_len), jnp.int32)

        def residuals(params: Params, tokens_BT: jax.Array) -> Any:
            segments_BT = tokens_BT if data.boundaries == "document_mask" else None

            def forward(params: Params) -> Any:
                return transformer.apply(
                    {"params": params}, tokens_BT, segments_BT=segments_BT, method="hidden"
                )

            return jax.vjp(forward, params)[1]  # The leaves of this tree are the kept values.

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params, tokens_BT))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return kept(2) - kept(1)  # The subtraction removes the weights, which both terms contain.
