import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mobilellm_jax.data.sources import Source, open_source


class RiverNotes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.3")
    RELEASE_NOTES = {"1.2.3": "Only."}  # noqa: RUF012

    def _info(self) -> Any:
        features = {"text": tfds.features.Text(), "length_km": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            "train": self._generate_examples("Rhine", "Elbe", "", "Saône"),
            "validation": self._generate_examples("Danube"),
            "test": self._generate_examples("Po", "Tiber"),
        }

    def _generate_examples(self, *texts: str) -> Iterator[tuple[str, Any]]:
        for text in texts:
            yield text, {"text": text, "length_km": 1}


class RiverLengths(RiverNotes):
    def _info(self) -> Any:
        features = {"length_km": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": ((i, {"length_km": i}) for i in range(3))}


class RiverTensors(RiverNotes):
    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        import tensorflow  # not installed, as the message has to say

        return {"train": tensorflow}


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What TFDS_DATA_DIR would have set before the start."""
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def texts(source: Source, split: str = "train") -> list[str]:
    return [document.text for document in source.documents(split)]


def test_tfds_without_tensorflow(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "tensorflow")
    source = open_source("tfds:river_notes", data_dir)
    assert source.splits() == ("train", "validation")
    assert sorted(texts(source)) == ["Elbe", "Rhine", "Saône"]  # the empty one has no text
    assert texts(source) == texts(open_source("tfds:river_notes", data_dir))
    assert texts(source, "validation") == ["Danube"]
    assert source.identity().startswith("tfds river_notes/1.2.3 (train: 4 records, ")


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("tfds:river_notes:test", 2),
        ("tfds:river_notes:1.2.3:test", 2),
        ("tfds:river_notes:train[:50%]", 2),
        ("tfds:river_notes:train+test", 5),
    ],
)
def test_an_explicit_split_is_all_that_is_read(data_dir: Path, spec: str, count: int) -> None:
    source = open_source(spec, data_dir)
    assert source.splits() == ("train",)
    assert count - 1 <= len(texts(source)) <= count  # the empty text may be among them
    assert "river_notes/1.2.3" in source.identity()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:river_note", r"TFDS knows no such dataset\. Did you mean river_notes\?"),
        ("tfds:river_lengths", r"must have a feature named 'text'; it has length_km"),
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
    """Built elsewhere, then copied: this program does not know the builder."""
    built(data_dir, "river_notes", renamed_to="lake_notes")
    source = open_source("tfds:lake_notes", data_dir)
    assert source.splits() == ("train", "validation")
    assert sorted(texts(source)) == ["Elbe", "Rhine", "Saône"]


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
    """Makes `import package` fail as if it were not installed, whether it is or not."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_text_files_are_documents_in_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"b\r\n \xc3\xa9\x00\n\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "deep" / "er" / "c.txt").write_bytes(b"c")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "d.md").write_bytes(b"d")
    source = open_source(f"text:{tmp_path}/**/*.txt", tmp_path)
    assert texts(source) == ["\ufeffa", "b\r\n é\x00\n\n", "c"]
    assert source.splits() == ("train",)


def test_identity_of_text_follows_the_contents(tmp_path: Path) -> None:
    def identity() -> str:
        return open_source(f"text:{tmp_path}/*.txt", tmp_path).identity()

    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    before = identity()
    (tmp_path / "a.txt").write_text("one")
    assert identity() == before
    (tmp_path / "a.txt").write_text("eno")
    assert identity() != before


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 noir".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: byte 0xe9 at offset 3 is not UTF-8"):
        texts(open_source(f"text:{tmp_path}/*.txt", tmp_path))


def test_a_pattern_without_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.md': the pattern matches nothing"):
        texts(open_source(f"text:{tmp_path}/nothing.md", tmp_path))
    with pytest.raises(FileNotFoundError, match="matches folders only"):
        texts(open_source(f"text:{tmp_path}", tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pythondocs", r"must be one of python_docs, tfds:.*Did you mean python_docs\?"),
        ("txt:*.txt", r"'txt:\*\.txt' must be one of.*Did you mean text\?"),
        ("", "must be one of"),
        ("text:", "must have the form text:GLOB"),
        ("tfds", r"must have the form tfds:NAME\[:SPLIT\]"),
        ("python_docs:train", "must have the form python_docs"),
    ],
)
def test_an_unknown_form(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(spec, tmp_path)
