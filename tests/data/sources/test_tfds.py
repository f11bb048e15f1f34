import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mobilellm_jax.data.sources import tfds as tfds_sources
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import BadLine, BadLineError, stop
from tests.data.reading import read, texts


class RiverNotes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.3")
    RELEASE_NOTES = {"1.2.3": "Only."}  # noqa: RUF012

    def _info(self) -> Any:
        features = {
            "text": tfds.features.Text(),
            "sea": tfds.features.Tensor(shape=(), dtype=np.str_),
            "length_km": tfds.features.Scalar(np.int32),
            "banks": tfds.features.Tensor(shape=(2,), dtype=np.str_),
            "towns": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            "train": self._generate_examples("Rhine", "Elbe", "", "Saône"),
            "validation": self._generate_examples("Danube"),
            "test": self._generate_examples("Po", b"Tib\xff"),
        }

    def _generate_examples(self, *texts: str | bytes) -> Iterator[tuple[str, Any]]:
        for text in texts:
            other = {"sea": "North", "length_km": 1, "banks": ["left", "right"], "towns": ["a"]}
            yield repr(text), {"text": text, **other}


class RiverTensors(RiverNotes):
    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        import tensorflow  # not installed, as the message has to say

        return {"train": tensorflow}


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets the folder that TFDS_DATA_DIR would have set before the start."""
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def test_tfds_without_tensorflow(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "tensorflow")
    source = open_source("tfds:river_notes", data_dir)
    assert source.splits() == ("train", "validation")
    assert sorted(texts(source)) == ["", "Elbe", "Rhine", "Saône"]
    assert read(source) == read(open_source("tfds:river_notes", data_dir))
    assert [document.name for document in read(source)] == [
        f"tfds:river_notes train, record {i}" for i in range(1, 5)
    ]
    assert texts(source, "validation") == ["Danube"]
    assert source.identity().startswith("tfds river_notes/1.2.3 text (train: 4 records, ")


def test_pieces_are_ranges_of_records(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("tfds:river_notes", data_dir)
    whole = read(source)
    size = sum(piece.size_bytes for piece in source.pieces("train"))
    info = tfds.builder("river_notes").info
    assert size == int(info.splits["train"].num_bytes) > 100
    for limit in (1, size // 3 + 1, size // 2 + 1, size):
        monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", limit)
        pieces = source.pieces("train")
        assert len(pieces) == min(4, -(-size // limit))
        assert sum(piece.size_bytes for piece in pieces) == size
        for at_once in (1, 2 * size // 4, 10**6):
            monkeypatch.setattr(tfds_sources, "_BATCH_BYTES", at_once)
            assert read(source) == whole


def test_a_piece_reads_only_its_range(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 1)
    source = open_source("tfds:river_notes", data_dir)
    expected = texts(source)[2]
    asked: list[int] = []
    kind = type(tfds.builder("river_notes").as_data_source("train"))
    getitems = kind.__getitems__

    def spy(self: Any, keys: Any) -> Any:
        asked.extend(keys)
        return getitems(self, keys)

    monkeypatch.setattr(kind, "__getitems__", spy)
    piece = source.pieces("train")[2]
    assert [d[1] for d in source.documents(piece, stop)] == [expected]
    assert asked == [2]


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("tfds:river_notes:validation", 1),
        ("tfds:river_notes:1.2.3:validation", 1),
        ("tfds:river_notes:train[:50%]", 2),
        ("tfds:river_notes:train+validation", 5),
        ("tfds:river_notes:train[2:]#sea", 2),
    ],
)
def test_an_explicit_split_is_all_that_is_read(data_dir: Path, spec: str, count: int) -> None:
    source = open_source(spec, data_dir)
    assert source.splits() == ("train",)
    documents = read(source)
    assert len(documents) == count
    assert documents[0].name == f"{spec}, record 1"
    sizes = [piece.size_bytes for piece in source.pieces("train")]
    assert len(sizes) == 1 and sizes[0] > 0
    assert "river_notes/1.2.3" in source.identity()


def test_the_feature_is_named(data_dir: Path) -> None:
    source = open_source("tfds:river_notes#sea", data_dir)
    assert source.splits() == ("train", "validation")
    assert texts(source) == ["North"] * 4
    assert source.identity() != open_source("tfds:river_notes", data_dir).identity()


def test_text_that_is_not_utf8_is_a_bad_record(data_dir: Path) -> None:
    source = open_source("tfds:river_notes:test", data_dir)
    bad: list[BadLine] = []
    ((name, text, _),) = read(source, on_bad=bad.append)
    (only,) = bad
    assert text == "Po"
    # TFDS orders the examples in its own way.
    assert {name, f"{only.file}, record {only.line}"} == {
        f"tfds:river_notes:test, record {i}" for i in (1, 2)
    }
    assert (only.file, only.byte_offset) == ("tfds:river_notes:test", None)
    assert only.reason == "byte 0xff at 3 of 'text' is not UTF-8 (invalid start byte)"
    with pytest.raises(BadLineError, match=r"tfds:river_notes:test, record [12]: byte 0xff at 3"):
        texts(source)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:river_note", r"TFDS does not know this dataset\. Did you mean river_notes\?"),
        ("tfds:river_notes#texts", r"no feature 'texts'\. .*: text, sea\. Did you mean text\?"),
        ("tfds:river_notes#length_km", r"feature 'length_km' is .*, not text\. .*: text, sea\."),
        ("tfds:river_notes#banks", r"feature 'banks' is .*, not text\. .*: text, sea\."),
        ("tfds:river_notes#towns", r"feature 'towns' is .*, not text\. .*: text, sea\."),
        ("tfds:river_notes:tset", r"no split 'tset', only .*Did you mean test\?"),
        ("tfds:river_tensors", r"needs the Python package 'tensorflow'.*array_record"),
    ],
)
def test_tfds_that_cannot_be_read(
    data_dir: Path, spec: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "tensorflow")
    with pytest.raises(ValueError, match=message):
        texts(open_source(spec, data_dir))


def test_tfds_files_without_their_code(data_dir: Path) -> None:
    """The dataset was built elsewhere and then copied. This program does not know the builder."""
    built(data_dir, "river_notes", renamed_to="lake_notes")
    source = open_source("tfds:lake_notes", data_dir)
    assert source.splits() == ("train", "validation")
    assert sorted(texts(source)) == ["", "Elbe", "Rhine", "Saône"]


@pytest.mark.parametrize("name", ["river_notes", "lake_notes"])
def test_tfds_in_a_format_without_random_access(data_dir: Path, name: str) -> None:
    folder = built(data_dir, "river_notes", renamed_to=name)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"without random access.*file_format='array_record'"):
        texts(open_source(f"tfds:{name}", data_dir))


def built(data_dir: Path, name: str, *, renamed_to: str) -> Path:
    """Builds a dataset and gives it another name on the disk; returns its folder."""
    assert texts(open_source(f"tfds:{name}", data_dir))
    folder = data_dir / name / "1.2.3"
    target = data_dir / renamed_to / "1.2.3"
    target.mkdir(parents=True, exist_ok=True)
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        if file.suffix == ".json":
            content = content.replace(name.encode(), renamed_to.encode())
        file.unlink()
        (target / file.name.replace(name, renamed_to)).write_bytes(content)
    return target


def forbid(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes `import package` fail as if the package were not installed."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
