"""A recipe whose runs take a moment."""

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
    to_json,
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
    ),
    data=DataConfig(seq_len=16),
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
    train=TrainConfig(
        steps=64,
        global_batch=8,
        log_every=1,
        eval_every=32,
        eval_batches=2,
        checkpoint_every=4,
        keep_checkpoints=2,
    ),
    evaluate=EvaluateConfig(every=32, samples=1),
)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["thin", "deep", "block", "shared", "twice", "phone", "small", "model"]
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)) + ".\n")
    output = folder / "tokens"
    prepare([f"text:{folder}/*.txt"], output, vocab_size=300, validation_fraction=0.1)
    return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, path=str(output)))


@pytest.fixture(scope="session")
def config_file(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "config.py"
    path.write_text(
        "from mobilellm_jax.config import from_json, to_config_dict\n\n"
        f"def get_config():\n    return to_config_dict(from_json({to_json(config)!r}))\n"
    )
    return path
