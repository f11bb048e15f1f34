import json
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mobilellm_jax.data.sources import python_docs
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import BadLine, BadLineError, stop
from tests.data.reading import read, read_in_other_processes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pythondocs", r"must be one of python_docs, tfds:.*Did you mean python_docs\?"),
        ("txt:*.txt", r"'txt:\*\.txt' must be one of.*Did you mean text\?"),
        ("json:*.json", r"must be one of.*Did you mean jsonl\?"),
        ("", "must be one of"),
        ("text:", "must have the form text:GLOB"),
        ("tokens:", "must have the form tokens:GLOB"),
        ("jsonl:", r"must have the form jsonl:GLOB\[#FIELD\]"),
        ("jsonl:a.jsonl#", r"must have the form jsonl:GLOB\[#FIELD\]"),
        ("jsonl:#text", r"must have the form jsonl:GLOB\[#FIELD\]"),
        ("parquet", r"must have the form parquet:GLOB\[#FIELD\]"),
        ("tfds", r"must have the form tfds:NAME\[:SPLIT\]\[#FIELD\]"),
        ("tfds:a:#text", r"must have the form tfds:NAME\[:SPLIT\]\[#FIELD\]"),
        ("tfds:a#", r"must have the form tfds:NAME\[:SPLIT\]\[#FIELD\]"),
        ("python_docs:train", "must have the form python_docs"),
    ],
)
def test_an_unknown_form(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(spec, tmp_path)


def test_stopping_at_a_bad_line() -> None:
    with pytest.raises(BadLineError) as error:
        stop(BadLine("a.jsonl", 3, 17, "is not JSON"))
    assert str(error.value) == (
        "a.jsonl, line 3, byte 17: is not JSON. Correct it, or leave such lines out with "
        "--on_bad_line=skip, which counts them."
    )
    assert str(BadLine("a.parquet", 3, None, "is null")) == "a.parquet, record 3: is null"
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_every_kind_of_source_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 300)
    library = tmp_path / "lib"
    (library / "pydoc_data").mkdir(parents=True)
    topics = {name: f"About {name}. " * 9 for name in "abcdefgh"}
    (library / "pydoc_data/topics.py").write_text(f"topics = {topics!r}")
    (library / "module.py").write_text(f'"""{"Docstring. " * 40}"""')
    monkeypatch.setattr(python_docs, "standard_library", lambda: library)
    texts = [f"Text {i} é.\n" for i in range(40)]
    content = "".join(json.dumps({"text": t, "token_ids": [1]}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(content.encode()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=5)
    packages = {
        "python_docs": {"tensorflow_datasets"},
        f"jsonl:{tmp_path}/*.jsonl*": {"zstandard"},
        f"tokens:{tmp_path}/a.jsonl": set(),
        f"text:file://{tmp_path}/*.jsonl": {"fsspec"},
        f"parquet:{tmp_path}/*.parquet": {"pyarrow"},
    }
    specs = [(spec, tmp_path / "scratch") for spec in packages]
    others = read_in_other_processes(specs)
    for spec, (documents, heavy) in zip(packages, others, strict=True):
        own = read(open_source(spec, tmp_path / "scratch"))
        assert documents == own
        assert len(own) >= (1 if spec.startswith("text:") else 8)
        assert heavy >= packages[spec] and "jax" not in heavy
        assert (tmp_path / "scratch" / "python_docs").is_dir()
        if not heavy & {"fsspec", "pyarrow"}:  # which import what they may need one day
            assert heavy == packages[spec]


def test_importing_is_light() -> None:
    """Worker processes import these modules; TFDS alone would take half a second."""
    script = (
        "import sys; from mobilellm_jax.data.sources.opening import open_source; "
        "open_source('text:*', None); open_source('parquet:*', None); "
        "open_source('tfds:x', None); print(*sys.modules)"
    )
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"jax", "numpy", "tensorflow_datasets", "pyarrow", "fsspec", "zstandard"}
    assert heavy.isdisjoint(loaded)
    assert "mobilellm_jax.data.sources.lines" in loaded
