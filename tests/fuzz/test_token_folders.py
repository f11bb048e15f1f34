"""Tests token folders: the manifest, and the arrays of a shard with right checksums."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from mobilellm_jax.data import shards
from mobilellm_jax.data.mixture import mixture_of, open_mixture
from mobilellm_jax.data.preparation.parts import read_part, record_file
from mobilellm_jax.data.verification import verify_files
from mobilellm_jax.data.windows import count_targets, count_windows, read_windows
from tests.fuzz.hostile import damaged_bytes, damaged_json, fuzz

VOCABULARY = 40
ARRAYS = {
    "tokens": np.array([1, 5, 6, 2, 1, 39, 2, 1, 2], "<u2"),
    "offsets": np.array([0, 4, 7], "<u8"),
    "loss_mask": np.array([1, 1, 0, 1, 1, 1, 1, 0, 1], "u1"),
}
COUNTS = {"documents": 3, "tokens": 9, "text_bytes": 20}


def write_folder(folder: Path, arrays: dict[str, bytes]) -> dict[str, Any]:
    """Writes a folder of one shard per split and returns its manifest."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"not opened here")
    splits = {}
    for split in ("train", "validation"):
        name = f"{split}-00000-of-00001"
        files = {}
        for suffix, content in arrays.items():
            (folder / f"{name}.{suffix}").write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files[suffix] = {"bytes": len(content), "sha256": digest}
        shard = {"name": name, "documents": 3, "tokens": 9, "files": files}
        splits[split] = {**COUNTS, "shards": [shard]}
    half = {"documents": 1, "tokens": 4, "text_bytes": 9}
    rest = {"documents": 2, "tokens": 5, "text_bytes": 11}
    sources = [
        {
            "spec": "jsonl:*.jsonl",
            "weight": weight,
            "splits": {"train": counts, "validation": counts},
            "empty_documents": 0,
            "bad_lines": [{"file": "a", "line": 1, "byte_offset": None, "reason": "x"}],
        }
        for weight, counts in ((0.25, half), (0.75, rest))
    ]
    manifest = {
        "format_version": shards.FORMAT_VERSION,
        "tokenizer": "tokenizer.model",
        "tokenizer_sha256": hashlib.sha256(b"not opened here").hexdigest(),
        "vocab_size": VOCABULARY,
        "bos_id": 1,
        "eos_id": 2,
        "dtype": "uint16",
        "splits": splits,
        "sources": sources,
        "settings": {"sources": ["jsonl:*.jsonl"], "weights": [0.25, 0.75]},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def use(dataset: shards.Dataset) -> None:
    """Does what a run does with a folder, as far as the content decides it."""
    mixture = mixture_of(dataset)
    assert dataset.fingerprint and mixture.fingerprint
    streams = [c.stream("train") for c in mixture.components]
    for stream in filter(None, streams):
        windows = np.arange(count_windows(stream, 4))
        batch = read_windows([stream], 0 * windows, windows, 4, "document_mask")
        assert batch["weights"].sum() <= stream.tokens
        assert count_targets(stream, "document_mask") <= stream.tokens


def test_manifest(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "data", {k: a.tobytes() for k, a in ARRAYS.items()})

    def parse(content: bytes) -> None:
        (tmp_path / "data" / "manifest.json").write_bytes(content)
        dataset = shards.open_tokens(tmp_path / "data")
        verify_files(dataset)
        use(dataset)

    valid = json.dumps(manifest)
    fuzz(parse, damaged_json(manifest), tmp_path, valid=valid.encode())
    (tmp_path / "data" / "manifest.json").write_text(valid)
    use(shards.open_tokens(tmp_path / "data"))  # what was refused has harmed nothing


@pytest.mark.parametrize("verify", [True, False])
def test_arrays(verify: bool, tmp_path: Path) -> None:
    folder = tmp_path
    whole = {k: a.tobytes() for k, a in ARRAYS.items()}
    joined = b"".join(whole.values())

    def parse(content: bytes) -> None:
        # The array has the size that the manifest says. Other sizes are refused earlier.
        content = content[: len(joined)].ljust(len(joined), b"\0")
        arrays, at = {}, 0
        for suffix, array in whole.items():
            arrays[suffix] = content[at : at + len(array)]
            at += len(array)
        write_folder(folder / "data", arrays)
        dataset = shards.open_tokens(folder / "data")
        if verify:
            verify_files(dataset)
            tokens = dataset.splits["train"].read(0, 9)
            assert tokens.max() < VOCABULARY
        use(dataset)

    counts = fuzz(parse, damaged_bytes(joined), folder, valid=joined, share=0.5)
    assert counts["refused"] and counts["taken"], "an id may become another one of the vocabulary"


def test_records_of_an_interrupted_preparation(tmp_path: Path) -> None:
    record = {
        "number": 0,
        "source": 0,
        "splits": {"train": {**COUNTS, "shards": []}},
        "empty_documents": 0,
        "bad_lines": [],
    }

    def parse(content: bytes) -> None:
        record_file(tmp_path, 0).write_bytes(content)
        # A damaged record is refused. The answer "not complete" would have the arrays overwritten.
        assert read_part(tmp_path, 0) is not None

    fuzz(parse, damaged_json(record), tmp_path, valid=json.dumps(record).encode())


def test_path_of_a_mixture(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", {k: a.tobytes() for k, a in ARRAYS.items()})
    write_folder(tmp_path / "more", {k: a.tobytes() for k, a in ARRAYS.items()})
    valid = f"{tmp_path}/data:0.7,{tmp_path}/more:.3"

    def parse(content: bytes) -> None:
        mixture = open_mixture(content.decode("utf-8", "replace"))
        assert sum(component.share for component in mixture.components) == 1

    weights = st.sampled_from(
        ["0.7", ".3", "1", "7.", "0", "-1", "1e5", "nan", "0.125", "", "9" * 40]
    )
    weighted = st.builds(lambda a, b: f"{tmp_path}/data:{a},{tmp_path}/more:{b}".encode(),
                         weights, weights)  # fmt: skip
    inputs = st.one_of(damaged_bytes(valid.encode()), weighted)
    fuzz(parse, inputs, tmp_path, valid=valid.encode())
