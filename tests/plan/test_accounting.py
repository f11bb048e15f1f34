import dataclasses
import functools
from typing import Any

import jax
import pytest

from mobilellm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from mobilellm_jax.plan.accounting import Account, account_of, activation_bytes_per_row

# Attention has 32 x 8 x (2 + 1 + 1) + 2 x 8 x 32 weights, the feed-forward 3 x 32 x 48, norms 64.
BLOCK = 1024 + 512 + 4608 + 64
CONFIG = Config(
    model=ModelConfig(
        vocab_size=128,
        embed_dim=32,
        num_blocks=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=48,
        max_seq_len=64,
        remat="full",
        compute_dtype="float32",
        attention="xla",
    ),
    data=DataConfig(seq_len=64),
    train=TrainConfig(global_batch=16, loss_chunk=32),
)


def account(devices: int = 1, **groups: Any) -> Account:
    changed = {
        group: dataclasses.replace(getattr(CONFIG, group), **fields)
        for group, fields in groups.items()
    }
    config = dataclasses.replace(CONFIG, **changed)
    return account_of(config, jax.devices()[:devices])


def test_one_device_holds_everything() -> None:
    found = account()
    parameters = 128 * 32 + 3 * BLOCK + 32
    assert found.parameters == parameters
    assert found.weight_bytes == found.gradient_bytes == 4 * parameters
    # The optimizer holds two moments and Optax's counters of steps.
    assert 0 < found.optimizer_bytes - 8 * parameters <= 16
    assert found.rows == 16
    # Every token keeps the inputs of three blocks and the values of the last norm.
    assert 16 * 64 * 3 * 32 * 4 < found.activation_bytes < 16 * 64 * (3 + 4) * 32 * 4
    # The loss holds logits of two positions of 16 rows, and the gradient of the head.
    assert found.loss_bytes == 4 * 128 * (32 + 32)
    assert found.total_bytes == sum(
        getattr(found, f"{part}_bytes")
        for part in ("weight", "optimizer", "gradient", "activation", "loss")
    )
    assert found.flops_per_token == 6 * (3 * (BLOCK - 64) + 128 * 32) + 6 * 3 * 2 * 8 * 64
    assert found.flops_per_step == 16 * 64 * found.flops_per_token


def test_data_parallelism_splits_the_batch_only() -> None:
    one, eight = account(), account(devices=8)
    assert eight.rows == 2
    assert eight.activation_bytes == one.activation_bytes // 8
    assert eight.weight_bytes == one.weight_bytes
    assert eight.flops_per_step == one.flops_per_step // 8
    assert eight.tokens_per_step == one.tokens_per_step == 1024


def test_fsdp_splits_the_state_too() -> None:
    one, eight = account(), account(devices=8, mesh={"data": 1, "fsdp": 8})
    norms = 4 * (3 * 64 + 32)  # every device has a copy of the norms
    assert eight.weight_bytes == (one.weight_bytes - norms) // 8 + norms
    assert eight.activation_bytes == one.activation_bytes // 8


def test_accumulation_keeps_fewer_rows_and_two_gradients() -> None:
    one, four = account(), account(train={"accumulation_steps": 4})
    assert four.rows == 4
    assert four.activation_bytes == one.activation_bytes // 4
    assert four.gradient_bytes == 2 * one.gradient_bytes
    assert four.tokens_per_step == one.tokens_per_step


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
def test_policies_keep_what_they_say(boundaries: str) -> None:
    """Each block keeps its input per token, and depending on the policy some other values.

    The other values are the output of attention with a normalizer per head, and gate and up.
    """

    @functools.cache
    def per_token(remat: str) -> float:
        data = dataclasses.replace(CONFIG.data, boundaries=boundaries)
        three, five = (
            activation_bytes_per_row(
                dataclasses.replace(CONFIG.model, remat=remat, num_blocks=n), data
            )
            for n in (3, 5)
        )
        return (five - three) / (64 * 2 * 4)

    assert per_token("full") == 32
    assert per_token("attention") == 32 + 16 + 2
    assert per_token("dots") == 32 + 16 + 2 + 2 * 48
    assert per_token("none") > per_token("dots") + 3 * 64
