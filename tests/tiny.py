"""Makes tiny texts, models and runs for the tests that need a whole one."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from mobilellm_jax.checkpoint import save_model
from mobilellm_jax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.model.transformer import Params, param_shapes

MODEL = ModelConfig(
    vocab_size=300,
    embed_dim=16,
    num_blocks=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=32,
    max_seq_len=64,
)
RUN = Config(
    model=dataclasses.replace(MODEL, num_blocks=2, ffn_dim=24, max_seq_len=32),
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
    ),
    evaluate=EvaluateConfig(every=8, samples=1),
)


def prepared_words(folder: Path) -> Path:
    """Returns tokens of twenty documents of 300 words, with a vocabulary of 300."""
    rng = np.random.default_rng(0)
    words = ["thin", "deep", "block", "shared", "twice", "phone", "small", "model"]
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)) + ".\n")
    output = folder / "tokens"
    prepare([f"text:{folder}/*.txt"], output, vocab_size=300, validation_fraction=0.1)
    return output


def random_params(config: ModelConfig) -> Params:
    """Returns parameters with different logits for every token. The norms' weights vary as well."""
    shapes = param_shapes(config)
    rng = np.random.default_rng(0)
    params: Params = jax.tree.map(
        lambda shape: rng.normal(0, 0.3, shape.shape).astype(np.float32), shapes
    )
    return params


def tokenizer_of_few_words(folder: Path, vocab_size: int) -> Tokenizer:
    """Returns a SentencePiece tokenizer and saves its file in the folder."""
    text = "the cat sat on the mat and the dog ran to the cat\n" * 20
    return train_tokenizer([text], vocab_size, folder / "tokenizer.model")


def save_run(run: Path, model: ModelConfig, params: Params) -> Tokenizer:
    """Saves a run of a tiny model and returns its tokenizer."""
    run.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of_few_words(run.parent, model.vocab_size)
    save_model(run, Config(model=model, data=DataConfig(seq_len=64)), params, tokenizer)
    return tokenizer
