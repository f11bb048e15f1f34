import dataclasses
import functools
import os
import tempfile

# Where transformers copies the modelling files it runs; read once, when it is first imported.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mobilellm_modules.")
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.model.transformer import Transformer, param_shapes

torch.set_num_threads(1)  # two thread pools on one machine would wait for each other
VOCAB = 320
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def f(x):\n    return x + 1  # one more\n",
    "It was the best of times, it was the worst of times; straße, naïve, 日本.",
] * 3


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(TEXTS, VOCAB, file)


@pytest.fixture(scope="session")
def make_model():
    """Returns a function that gives a tiny config, its parameters, tokens and logits for them."""

    def make(scale: float = 1.0, **fields):
        config = tiny(**fields)
        params = random_params(config, scale)
        tokens_BT = np.random.default_rng(7).integers(0, VOCAB, (2, 256), dtype=np.int32)
        return config, params, tokens_BT, np.asarray(compiled(config)(params, tokens_BT))

    make.logits = compiled
    return make


@functools.cache
def compiled(config: ModelConfig):
    return jax.jit(lambda p, t: Transformer(config).apply({"params": p}, t))


def tiny(**fields) -> ModelConfig:
    values = {
        "vocab_size": VOCAB,
        "embed_dim": 64,
        "num_blocks": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "ffn_dim": 96,
        "max_seq_len": 512,
        "compute_dtype": "float32",
    }
    return ModelConfig(**(values | fields))


@functools.cache
def shapes(config: ModelConfig):
    return param_shapes(config)


def random_params(config: ModelConfig, scale: float = 1.0):
    """Returns standard initial matrices times `scale`, and norms that all differ."""
    rng = np.random.default_rng(3)

    def values(path, leaf):
        if path[-1].key == "scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0.0, 0.02 * scale, leaf.shape).astype(np.float32)

    unshared = dataclasses.replace(config, num_repeats=1, sharing="immediate")
    return jax.tree_util.tree_map_with_path(values, shapes(unshared))


@pytest.fixture
def tiny_config():
    return tiny


@pytest.fixture
def tiny_params():
    return random_params


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "export"
