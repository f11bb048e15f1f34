"""A run of a few seconds, to be hurt in every way."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mobilellm_jax.data.prepare import prepare

CONFIG = Config(
    model=ModelConfig(
        vocab_size=300,
        embed_dim=16,
        num_blocks=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=24,
        max_seq_len=32,
        compute_dtype="float32",
        attention="xla",
    ),
    data=DataConfig(seq_len=16),
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
    train=TrainConfig(
        steps=16,
        global_batch=8,
        log_every=1,
        eval_every=8,
        eval_batches=2,
        checkpoint_every=4,
        keep_checkpoints=3,
        max_bad_steps=3,
    ),
    evaluate=EvaluateConfig(every=8, samples=1),
)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["thin", "deep", "block", "shared", "twice", "phone", "small", "model"]
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)) + ".\n")
    output = folder / "tokens"
    prepare([f"text:{folder}/*.txt"], output, vocab_size=300, validation_fraction=0.1)
    return output


@pytest.fixture(scope="session")
def config(data: Path) -> Config:
    return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, path=str(data)))
