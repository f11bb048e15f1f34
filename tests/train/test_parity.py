"""Compares training with PyTorch, and gradients of shared blocks with gradients of copies."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from transformers import LlamaForCausalLM

from mobilellm_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Sharing,
    TrainConfig,
)
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.export.huggingface.directory import read_huggingface
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.transformer import Params, Transformer, param_shapes
from mobilellm_jax.sharding import AXES, logical_rules, put_batch
from mobilellm_jax.train.loss import weighted_loss
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import init_state
from mobilellm_jax.train.step import make_train_step
from tests.huggingface import write_huggingface

TOLERANCE = 1e-4  # for losses and weights after up to 50 steps in float32
STEPS, WARMUP, PEAK = 50, 5, 1e-3
BATCH, LENGTH, VOCAB = 8, 32, 300
CONFIG = Config(
    model=ModelConfig(
        vocab_size=VOCAB,
        embed_dim=48,
        num_blocks=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        ffn_dim=64,
        max_seq_len=LENGTH,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=LENGTH),
    # Betas, decay, clipping and the final learning rate have their defaults from the paper.
    optimizer=OptimizerConfig(peak_lr=PEAK, warmup_steps=WARMUP),
    train=TrainConfig(steps=STEPS, global_batch=BATCH, loss_chunk=80),
)


def markov_batches() -> list[dict[str, np.ndarray]]:
    """Returns tokens with two possible successors each, so the best loss is 0.69 nats."""
    rng = np.random.default_rng(0)
    # Only 40 tokens occur, so 50 steps are enough to lower the loss.
    follows = rng.integers(0, 40, (40, 2))
    batches = []
    for _ in range(STEPS):
        tokens = np.empty((BATCH, LENGTH + 1), np.int32)
        tokens[:, 0] = rng.integers(0, 40, BATCH)
        for t in range(LENGTH):
            tokens[:, t + 1] = follows[tokens[:, t], rng.integers(0, 2, BATCH)]
        weights = np.ones((BATCH, LENGTH), np.float32)
        batches.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    return batches


def torch_optimizer(model: LlamaForCausalLM) -> tuple[Any, Any]:
    """Returns the paper's AdamW and schedule; weight decay applies to matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    assert (len(matrices), len(norms)) == (1 + 2 * 7, 2 * 2 + 1)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)

    def factor(step: int) -> float:
        if step < WARMUP:
            return step / WARMUP
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_torch(folder: Path, batches: list[dict[str, np.ndarray]]) -> list[float]:
    """Trains the model in `folder`, replaces it by the trained model and returns the losses."""
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer, scheduler = torch_optimizer(model)
    losses = []
    for batch in batches:
        logits = model(input_ids=torch.from_numpy(batch["tokens"]).long()).logits
        targets = torch.from_numpy(batch["targets"]).long()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    return losses


def test_fifty_steps_equal_pytorchs(tmp_path: Path) -> None:
    mesh = jax.make_mesh(
        (1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1]
    )
    rules = logical_rules(CONFIG.model, mesh.shape)
    optimizer = make_optimizer(CONFIG.optimizer, STEPS)
    state = init_state(CONFIG, optimizer, mesh, rules)
    # Any tokenizer with the vocabulary size of the model serves the test.
    tokenizer = train_tokenizer(["the quick brown fox jumps"] * 9, VOCAB, tmp_path / "t.model")
    folder = tmp_path / "export"
    write_huggingface(CONFIG.model, jax.device_get(state.params), tokenizer, folder)
    batches = markov_batches()
    expected = train_torch(folder, batches)

    step_fn = make_train_step(CONFIG, optimizer, mesh, rules, state)
    before, losses = jax.device_get(state.params), []
    for batch in batches:
        state, metrics = step_fn(state, put_batch(batch, mesh, BATCH))
        losses.append(float(metrics["loss"]))

    assert losses[0] - losses[-1] > 0.5, "the model does not learn, so nothing is compared"
    np.testing.assert_allclose(losses, expected, atol=TOLERANCE, rtol=0)
    theirs = read_huggingface(folder).params
    assert jax.tree.structure(theirs) == jax.tree.structure(state.params)
    for path, start in jax.tree_util.tree_leaves_with_path(before):
        ours, there = (
            functools.reduce(lambda t, k: t[k.key], path, t) for t in (state.params, theirs)
        )
        assert np.abs(ours - start).max() > 10 * TOLERANCE, path
        np.testing.assert_allclose(ours, there, atol=TOLERANCE, rtol=0, err_msg=str(path))


SMALL = dataclasses.replace(CONFIG.model, vocab_size=40, embed_dim=24, head_dim=6, ffn_dim=32)


@functools.cache
def gradient_of(config: ModelConfig) -> Callable[[Params], Params]:
    rng = np.random.default_rng(2)
    tokens, targets = (jnp.asarray(rng.integers(0, 40, (2, 9), dtype=np.int32)) for _ in range(2))

    def loss(params: Params) -> jax.Array:
        x_BTD = Transformer(config).apply({"params": params}, tokens, method="hidden")
        return weighted_loss(x_BTD, params["embedding"]["table"], targets, jnp.ones((2, 9)), 4)

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("sharing", ["immediate", "repeat_all", "reverse"])
def test_gradient_of_a_shared_block_is_the_sum_over_its_copies(sharing: Sharing) -> None:
    shared = dataclasses.replace(SMALL, num_repeats=2, sharing=sharing)
    unshared = dataclasses.replace(SMALL, num_blocks=4)
    rng = np.random.default_rng(1)
    shapes = param_shapes(SMALL)
    params = jax.tree.map(
        lambda leaf: rng.normal(1 if leaf.ndim < 2 else 0, 0.2, leaf.shape).astype(np.float32),
        shapes,
    )
    order = np.array(application_order(2, 2, sharing))
    copied = {**params, "blocks": jax.tree.map(lambda x: x[order], params["blocks"])}
    found, by_copy = gradient_of(shared)(params), gradient_of(unshared)(copied)
    summed = jax.tree.map(
        lambda g: np.stack([np.asarray(g)[order == u].sum(axis=0) for u in range(2)]),
        by_copy["blocks"],
    )
    expected = {**by_copy, "blocks": summed}
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def assert_close(ours: Any, theirs: Any) -> None:
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=1e-5)

    jax.tree.map(assert_close, found, expected)
    # The gradients of the copies differ, so a multiple of a single gradient would fail.
    query = np.asarray(by_copy["blocks"]["attention"]["query"])[order == 0]
    assert np.abs(query[0] - query[1]).max() > 0.1 * np.abs(query).max()
