import hashlib
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.data import shards
from mobilellm_jax.data.verification import verify_files
from mobilellm_jax.storage import sealing

# One folder has shards of 8 tokens in two documents, one has shards of 4 tokens in one document.
DOCUMENTS = [[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 9, 2]]
MASKS = [[1, 1, 0, 1]] * 3
FIRST = "train-00000-of-00002"
ARRAYS = {"tokens": "<u2", "offsets": "<u8", "loss_mask": "u1"}


@pytest.fixture
def dataset(write_tokens: Any) -> shards.Dataset:
    masks = {"train": MASKS}
    written: shards.Dataset = write_tokens(
        train=DOCUMENTS, loss_masks=masks, shard_tokens=8, vocab_size=10
    )
    return written


def replaced(dataset: shards.Dataset, suffix: str, values: list[int]) -> shards.Dataset:
    """Replaces an array in the first shard, and the checksum of the array in the manifest."""
    file, manifest = dataset.path / f"{FIRST}.{suffix}", dataset.path / "manifest.json"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    np.array(values, ARRAYS[suffix]).tofile(file)
    after = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(before, after))
    return shards.open_tokens(dataset.path)


def test_a_whole_folder_is_right_in_chunks_of_any_size(
    dataset: shards.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_files(dataset)
    monkeypatch.setattr(sealing, "BLOCK_BYTES", 8)
    verify_files(dataset)
    # The last chunk is checked as well.
    file = dataset.path / f"{FIRST}.tokens"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="has SHA-256"):
        verify_files(dataset)


@pytest.mark.parametrize("suffix", ARRAYS)
def test_checksums_find_a_changed_byte(dataset: shards.Dataset, suffix: str) -> None:
    file = dataset.path / f"{FIRST}.{suffix}"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{FIRST}\.{suffix} has SHA-256 .* prepare it again"):
        verify_files(dataset)


@pytest.mark.parametrize(
    ("suffix", "values", "message"),
    [
        ("tokens", [1, 5, 6, 2, 1, 7, 10, 2], "holds the token id 10, which must be below 10"),
        ("loss_mask", [1, 1, 0, 1, 1, 1, 2, 1], "holds the loss mask 2, which must be below 2"),
        ("offsets", [1, 4], "does not ascend"),
        ("offsets", [0, 0], "does not ascend"),
        ("offsets", [0, 8], "does not ascend"),
        ("offsets", [0, (1 << 64) - 1], "does not ascend"),
        ("offsets", [4, 0], "does not ascend"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [8, 1 << 20])
def test_right_checksums_of_nonsense(
    dataset: shards.Dataset,
    suffix: str,
    values: list[int],
    message: str,
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealing, "BLOCK_BYTES", chunk_bytes)
    misleading = replaced(dataset, suffix, values)
    with pytest.raises(ValueError, match=rf"{FIRST}\.{suffix} {message}"):
        verify_files(misleading)


@pytest.mark.parametrize("starts", [[0, 0], [4, 0], [0, (1 << 64) - 1], [0, 1 << 40]])
def test_unverified_documents_never_start_outside_of_what_is_read(
    dataset: shards.Dataset, starts: list[int]
) -> None:
    stream = replaced(dataset, "offsets", starts).splits["train"]
    try:
        found = stream.document_starts(0, 8)
    except ValueError as error:
        assert f"{FIRST}.offsets does not ascend" in str(error)
    else:
        assert found.tolist() == [0]  # the other one is beyond the shard
