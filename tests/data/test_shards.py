import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.data import shards

DOCUMENTS = [[1, 10, 11, 2], [1, 2], [1, 12, 13, 14, 2], [1, 15, 2], [1, 16, 17, 18, 19, 20, 2]]
STREAM = [token for document in DOCUMENTS for token in document]


def test_files_hold_what_the_layout_says(write_tokens: Any) -> None:
    """Reads the shards raw. A document ends its shard once the shard holds 6 tokens."""
    path = write_tokens(train=DOCUMENTS, shard_tokens=6).path
    assert {file.name for file in path.iterdir()} == {
        "manifest.json",
        "tokenizer.model",
        *(f"train-0000{i}-of-00003.{suffix}" for i in range(3) for suffix in ("tokens", "offsets")),
    }
    raw = [np.fromfile(path / f"train-0000{i}-of-00003.tokens", "<u2").tolist() for i in range(3)]
    assert raw == [STREAM[:6], STREAM[6:14], STREAM[14:]]
    offsets = [
        np.fromfile(path / f"train-0000{i}-of-00003.offsets", "<u8").tolist() for i in range(3)
    ]
    assert offsets == [[0, 4], [0, 5], [0]]
    manifest = json.loads((path / "manifest.json").read_text())
    split = manifest["splits"]["train"]
    assert (split["documents"], split["tokens"], split["text_bytes"]) == (5, 21, 63)
    first = (path / "train-00000-of-00003.tokens").read_bytes()
    assert split["shards"][0] == {
        "name": "train-00000-of-00003",
        "documents": 2,
        "tokens": 6,
        "files": {
            "tokens": {"bytes": 12, "sha256": hashlib.sha256(first).hexdigest()},
            "offsets": {
                "bytes": 16,
                "sha256": hashlib.sha256(np.array([0, 4], "<u8").tobytes()).hexdigest(),
            },
        },
    }


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint32"), (128_000, "uint32")]
)
def test_width_of_ids(write_tokens: Any, vocab_size: int, dtype: str) -> None:
    path = write_tokens(train=[[1, vocab_size - 1, 2]], vocab_size=vocab_size).path
    assert json.loads((path / "manifest.json").read_text())["dtype"] == dtype
    raw = np.fromfile(path / "train-00000-of-00001.tokens", np.dtype(dtype).newbyteorder("<"))
    assert raw.tolist() == [1, vocab_size - 1, 2]


@pytest.mark.parametrize(("suffix", "found"), [("tokens", 11), ("offsets", 15)])
def test_a_truncated_shard_is_refused(write_tokens: Any, suffix: str, found: int) -> None:
    path = write_tokens(train=DOCUMENTS, shard_tokens=6).path
    file = path / f"train-00000-of-00003.{suffix}"
    file.write_bytes(file.read_bytes()[:-1])
    message = rf"train-00000-of-00003\.{suffix} has {found} bytes, expected {found + 1}"
    with pytest.raises(ValueError, match=message):
        shards.open_tokens(path)


def test_a_missing_shard_is_refused(write_tokens: Any) -> None:
    path = write_tokens(train=DOCUMENTS, shard_tokens=6).path
    (path / "train-00002-of-00003.offsets").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00002-of-00003\.offsets is missing"):
        shards.open_tokens(path)


def test_another_tokenizer_is_refused(write_tokens: Any) -> None:
    path = write_tokens(train=DOCUMENTS).path
    (path / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(ValueError, match=hashlib.sha256(b"another").hexdigest()):
        shards.open_tokens(path)
    (path / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is missing"):
        shards.open_tokens(path)


def test_only_the_manifest_makes_a_folder_complete(write_tokens: Any, tmp_path: Path) -> None:
    path = write_tokens(train=DOCUMENTS).path
    (path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete: it has no manifest\.json"):
        shards.open_tokens(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*mobilellm prepare"):
        shards.open_tokens(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format_version": 1, "spl', "is damaged"),
        ('{"format_version": 2, "splits": {}}', "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 1}', "format_version=1 must be 2"),
    ],
)
def test_a_damaged_manifest_is_refused(write_tokens: Any, content: str, message: str) -> None:
    path = write_tokens(train=DOCUMENTS).path
    (path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        shards.open_tokens(path)


def test_the_manifest_survives_a_round_trip(write_tokens: Any) -> None:
    dataset = write_tokens(train=DOCUMENTS, validation=DOCUMENTS[:1], shard_tokens=6)
    before = (dataset.path / "manifest.json").read_bytes()
    shards.write_manifest(dataset.path, shards.read_manifest(dataset.path))
    assert (dataset.path / "manifest.json").read_bytes() == before
    assert dataset.manifest.splits["validation"].tokens == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train-00001-of-00003", "../../etc/passwd", "passwd' is not the name of shard 1"),
        ("train-00001-of-00003", "train-00000-of-00003", "is not the name of shard 1 of split"),
        ('"train": {', '"../x": {', r"'\.\./x' is not the name of a split"),
        ('"vocab_size": 1000', '"vocab_size": 4294967296', "is not between 1 and 16777216"),
        ('"vocab_size": 1000', '"vocab_size": 70000', "dtype='uint16' is not uint32"),
        ('"bos_id": 1', '"bos_id": -1', "bos_id=-1 is not an id below vocab_size"),
        ('"documents": 2', '"documents": -2', "has -2 documents in"),
        ('"documents": 2', '"documents": 0', "has 6 tokens without a document"),
        ('"weight": null', '"weight": 0', "weight=0.0 of source 1 is not above 0"),
        ('"tokenizer": "tokenizer.model"', '"tokenizer": "../tokenizer.model"', "is not one of"),
        ('"dtype": "uint16"', '"dtype": "object"', "dtype='object' is not uint16"),
        ('"offsets": {', '"elsewhere": {', "has files 'tokens', 'elsewhere'"),
        ('"documents": 5', '"documents": 6', "have 5 documents, the split has 6"),
        ('"tokens": 21', '"tokens": 20', "have 21 tokens, the split has 20"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    write_tokens: Any, old: str, new: str, message: str
) -> None:
    path = write_tokens(train=DOCUMENTS, shard_tokens=6).path
    file = path / "manifest.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=f"manifest.json: .*{message}.* is damaged"):
        shards.open_tokens(path)


def test_the_fingerprint_is_that_of_the_contents(write_tokens: Any) -> None:
    """Not of the name of the folder or of how it was asked for; of weights, it is."""
    one = write_tokens(name="one", train=DOCUMENTS, shard_tokens=6)
    moved = one.path.rename(one.path.with_name("moved"))
    (moved / "manifest.json").write_text(
        (moved / "manifest.json")
        .read_text()
        .replace('"sources": [\n      "test"', '"sources": [\n "x"')
    )
    assert shards.open_tokens(moved).fingerprint == one.fingerprint
    half = {"train": 2}, {"train": 3}
    others = [
        write_tokens(name="two", train=DOCUMENTS[::-1], shard_tokens=6),
        write_tokens(
            name="three",
            train=DOCUMENTS,
            shard_tokens=6,
            sources=[("a", 0.5, half[0]), ("b", 0.5, half[1])],
        ),
        write_tokens(
            name="four",
            train=DOCUMENTS,
            shard_tokens=6,
            sources=[("a", 0.4, half[0]), ("b", 0.6, half[1])],
        ),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_stream_of_a_source(write_tokens: Any) -> None:
    dataset = write_tokens(
        train=DOCUMENTS,
        validation=DOCUMENTS[:1],
        shard_tokens=6,
        sources=[("a", None, {"train": 1, "validation": 1}), ("b", None, {"train": 4})],
    )
    first, second = (dataset.source_stream("train", i) for i in (0, 1))
    assert first.read(0, first.tokens).tolist() == DOCUMENTS[0]
    assert second.read(0, second.tokens).tolist() == STREAM[4:]
    assert (first.documents, second.documents) == (1, 4)
    assert dataset.source_stream("validation", 1).tokens == 0
