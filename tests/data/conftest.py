"""Fixtures: folders of token shards with known tokens, and tokenizers of both kinds."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from mobilellm_jax.data import shards
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from tests.data.example_tokenizers import TEXTS, train_byte_level
from tests.data.token_folders import Documents, assemble_all, join_job, write_part

WriteTokens = Callable[..., shards.Dataset]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Returns a SentencePiece tokenizer of 400 tokens, trained as `prepare` trains one."""
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("trained") / "tokenizer.model")


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Returns a tokenizer.json of 350 tokens."""
    return train_byte_level(TEXTS, 350, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """Writes documents, given as lists of ids, and opens the folder.

    `loss_masks` has, per split, a list of zeros and ones for each document. `sources` lists (spec,
    weight, number of documents per split) for a folder of several sources.
    """

    def write(
        *,
        shard_tokens: int = 1_000,
        vocab_size: int = 1_000,
        name: str = "tokens",
        loss_masks: Mapping[str, Documents] | None = None,
        sources: Sequence[tuple[str, float | None, Mapping[str, int]]] | None = None,
        **splits: Documents,
    ) -> shards.Dataset:
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = folder / "tokenizer.model"
        tokenizer.write_bytes(b"not opened here")
        dtype = shards.token_dtype(vocab_size)
        job = join_job(tmp_path / f"{name}.preparing", dtype.str, shard_tokens)
        part = write_part(job.parts, 0, splits, dtype.str, loss_masks)
        written = {}
        for split in splits:
            made = assemble_all(job, folder, split, [part])
            counts = part.splits[split]
            written[split] = shards.Split(
                documents=counts.documents,
                tokens=counts.tokens,
                text_bytes=counts.text_bytes,
                shards=tuple(made),
            )
        sources = sources or [("test", None, {split: len(d) for split, d in splits.items()})]
        manifest = shards.Manifest(
            format_version=shards.FORMAT_VERSION,
            tokenizer=tokenizer.name,
            tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
            vocab_size=vocab_size,
            bos_id=1,
            eos_id=2,
            dtype=dtype.name,
            splits=written,
            sources=tuple(_source_records(sources, splits)),
            settings={"sources": ["test"]},
        )
        shards.write_manifest(folder, manifest)
        return shards.open_tokens(folder)

    return write


def _source_records(
    sources: Sequence[tuple[str, float | None, Mapping[str, int]]], splits: Mapping[str, Documents]
) -> list[shards.SourceRecord]:
    left = {split: list(documents) for split, documents in splits.items()}
    records = []
    for spec, weight, documents in sources:
        counts = {}
        for split, number in documents.items():
            mine, left[split] = left[split][:number], left[split][number:]
            tokens = sum(len(d) for d in mine)
            counts[split] = shards.Counts(documents=number, tokens=tokens, text_bytes=3 * tokens)
        records.append(
            shards.SourceRecord(
                spec=spec, weight=weight, splits=counts, empty_documents=0, bad_lines=()
            )
        )
    return records


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Yields the list of the package's log messages, which grows during the test.

    `caplog` would miss messages after a test that called `show_messages`.
    """
    logger, handler = logging.getLogger("mobilellm_jax"), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)
