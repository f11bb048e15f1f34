"""Tests GGUF files from others."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs the extra 'gguf'")

import gguf

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.gguf.reader import read_gguf
from mobilellm_jax.export.gguf.writer import write
from mobilellm_jax.model.opened import OpenedModel
from tests.fuzz.hostile import damaged_bytes, fuzz
from tests.tiny import random_params, tokenizer_of_few_words

TINY = ModelConfig(
    vocab_size=300,
    embed_dim=32,
    num_blocks=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    ffn_dim=32,
    rope_scaling="llama3",
    rope_factor=8.0,
)


def test_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilellm_jax.export.gguf.writer._check_in_llama_cpp", lambda *_: None)
    tokenizer = tokenizer_of_few_words(tmp_path, 300)
    (tmp_path / "gguf").mkdir()
    source = OpenedModel(TINY, random_params(TINY), tokenizer, "a test")
    write(source, tmp_path / "gguf", "float32")
    file, files = tmp_path / "gguf" / "model.gguf", tmp_path / "files"
    files.mkdir()
    content = file.read_bytes()
    # The numbers of the weights are most of the file. The damage goes to what stands before them.
    with_header = len(content) - 4 * sum(
        np.asarray(tensor.data).size for tensor in gguf.GGUFReader(file).tensors
    )
    weights = content[with_header:]

    def parse(header: bytes) -> None:
        file.write_bytes(header + weights)
        read_gguf(file, files)

    fuzz(parse, damaged_bytes(content[:with_header]), tmp_path, valid=content[:with_header])
