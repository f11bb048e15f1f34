"""Folders of token shards whose every token is known."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.data import shards

WriteTokens = Callable[..., shards.Dataset]


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """Writes documents, given as lists of ids, and opens the folder."""

    def write(
        *, shard_tokens: int = 1_000, vocab_size: int = 1_000, **splits: Sequence[Sequence[int]]
    ) -> shards.Dataset:
        folder = tmp_path / "tokens"
        folder.mkdir()
        tokenizer = folder / "tokenizer.model"
        tokenizer.write_bytes(b"not opened here")
        dtype = shards.token_dtype(vocab_size)
        written = {}
        for name, documents in splits.items():
            writer = shards.SplitWriter(folder, name, dtype, shard_tokens)
            for document in documents:
                writer.add(np.array(document), text_bytes=3 * len(document))
            written[name] = writer.close()
        manifest = shards.Manifest(
            format_version=shards.FORMAT_VERSION,
            tokenizer=tokenizer.name,
            tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
            vocab_size=vocab_size,
            bos_id=1,
            eos_id=2,
            dtype=dtype.name,
            splits=written,
            sources=({"spec": "test", "documents": {}},),
            settings={"sources": ["test"]},
        )
        shards.write_manifest(folder, manifest)
        return shards.open_tokens(folder)

    return write
