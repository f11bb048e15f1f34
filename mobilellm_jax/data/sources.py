"""Where documents come from: `python_docs`, `tfds:NAME[:SPLIT]` and `text:GLOB`.

`python_docs` and a TFDS dataset with a validation split have their own validation documents; of
every other source `prepare` holds out a part.
"""

import abc
import functools
import glob
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from mobilellm_jax import config
from mobilellm_jax.data import python_docs

TRAIN = "train"
VALIDATION = "validation"

_FORMS = ("python_docs", "tfds:NAME[:SPLIT]", "text:GLOB")
# A version belongs to the name: tfds:lm1b:1.1.0:train[:10%].
_TFDS = re.compile(r"(?P<name>[^:]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(?P<split>.+))?")


class Document(NamedTuple):
    """`name` says in messages where the text is from."""

    name: str
    text: str


class Source(abc.ABC):
    """Documents in a fixed order; `spec` is the text that named them."""

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @abc.abstractmethod
    def identity(self) -> str:
        """Returns a line that changes when the documents do."""

    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Returns the splits that the source itself has: train, and perhaps validation."""

    @abc.abstractmethod
    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of a split that have any text; may be called again."""


def open_source(spec: str, scratch: Path) -> Source:
    """Returns the source that `spec` names; what it must build for itself goes under `scratch`.

    Raises:
      ValueError: for an unknown form.
    """
    scheme, _, rest = spec.partition(":")
    if spec == "python_docs":
        return _PythonDocsSource(spec, scratch)
    if scheme == "tfds" and (match := _TFDS.fullmatch(rest)):
        return _TfdsSource(spec, match["name"], match["split"])
    if scheme == "text" and rest:
        return _TextSource(spec, rest)
    forms = {form.partition(":")[0]: form for form in _FORMS}
    if scheme in forms:
        rule = f"must have the form {forms[scheme]}"
    else:
        rule = f"must be one of {', '.join(_FORMS)}"
    hint = "" if scheme in forms else config.near_miss(scheme, forms)
    raise ValueError(f"source={spec!r} {rule}.{hint}")


class _PythonDocsSource(Source):
    def __init__(self, spec: str, scratch: Path) -> None:
        super().__init__(spec)
        self._scratch = scratch

    def identity(self) -> str:
        return python_docs.identity()

    def splits(self) -> tuple[str, ...]:
        return (TRAIN, VALIDATION)

    def documents(self, split: str) -> Iterator[Document]:
        yield from _records(self.spec, self._builder, split)

    @functools.cached_property
    def _builder(self) -> Any:
        return python_docs.build(self._scratch)


class _TfdsSource(Source):
    """A TFDS dataset in array_record form, downloaded and built in TFDS's own folder if needed."""

    def __init__(self, spec: str, name: str, split: str | None) -> None:
        super().__init__(spec)
        self._name = name
        self._split = split

    def identity(self) -> str:
        info = self._builder.info
        splits = ", ".join(
            f"{name}: {info.splits[name].num_examples} records, "
            f"{int(info.splits[name].num_bytes)} bytes"
            for name in ([self._split] if self._split else self.splits())
        )
        return f"tfds {info.full_name} ({splits})"

    def splits(self) -> tuple[str, ...]:
        own = not self._split and VALIDATION in self._builder.info.splits
        return (TRAIN, VALIDATION) if own else (TRAIN,)

    def documents(self, split: str) -> Iterator[Document]:
        yield from _records(self.spec, self._builder, self._split or split)

    @functools.cached_property
    def _builder(self) -> Any:
        try:
            builder = tfds.builder(self._name)  # in whatever format it lies there
            if not builder.is_prepared():
                builder = tfds.builder(self._name, file_format="array_record")
                builder.download_and_prepare()
        except tfds.core.DatasetNotFoundError as error:
            hint = config.near_miss(self._name, tfds.list_builders(with_community_datasets=False))
            raise ValueError(f"source={self.spec!r}: TFDS knows no such dataset.{hint}") from error
        except ModuleNotFoundError as error:
            raise ValueError(
                f"source={self.spec!r}: building this dataset needs the Python package "
                f"{error.name!r}. Install it, or build the dataset elsewhere with "
                f"tfds.builder({self._name!r}, file_format='array_record').download_and_prepare() "
                "and set TFDS_DATA_DIR to its folder; reading it needs no TensorFlow."
            ) from error
        features = builder.info.features
        if "text" not in features:
            raise ValueError(
                f"source={self.spec!r} must have a feature named 'text'; it has "
                f"{', '.join(features)}."
            )
        wanted = re.split(r"[\[+]", self._split or TRAIN)[0]
        if wanted not in builder.info.splits and wanted != "all":
            names = list(builder.info.splits)
            raise ValueError(
                f"source={self.spec!r}: the dataset has no split {wanted!r}, only "
                f"{', '.join(names)}.{config.near_miss(wanted, names)}"
            )
        return builder


class _TextSource(Source):
    """Every file is a document, in the order of the paths, byte for byte.

    There is no marker that would part a file into documents; empty files have no text and are left
    out. `**` in the pattern matches folders of any depth.
    """

    def __init__(self, spec: str, pattern: str) -> None:
        super().__init__(spec)
        self._pattern = pattern

    def identity(self) -> str:
        digest = hashlib.sha256()
        files = self._files
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return f"text {len(files)} files, SHA-256 of contents {digest.hexdigest()}"

    def splits(self) -> tuple[str, ...]:
        return (TRAIN,)

    def documents(self, split: str) -> Iterator[Document]:
        assert split == TRAIN, f"text has no split {split}"
        for file in self._files:
            if text := _decoded(file.read_bytes(), str(file)):
                yield Document(str(file), text)

    @functools.cached_property
    def _files(self) -> list[Path]:
        found = sorted(glob.glob(self._pattern, recursive=True, include_hidden=False))
        files = [path for path in map(Path, found) if path.is_file()]
        if not files:
            what = "folders only; add /**/*.txt or the like" if found else "nothing"
            raise FileNotFoundError(f"source={self.spec!r}: the pattern matches {what}.")
        return files


def _records(spec: str, builder: Any, split: str) -> Iterator[Document]:
    try:
        records = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"source={spec!r}: the dataset lies in {builder.data_path} in a format without random "
            "access, which needs TensorFlow to read. Build it once more as array_record, e.g. "
            f"tfds.builder({builder.name!r}, file_format='array_record', data_dir=OTHER_FOLDER)"
            ".download_and_prepare(), and set TFDS_DATA_DIR to that folder."
        ) from error
    for index, record in enumerate(records):
        if text := _decoded(record["text"], f"{spec} {split} record {index}"):
            yield Document(f"{spec} {split} record {index}", text)


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {content[error.start]:#04x} at offset {error.start} is not UTF-8 "
            f"({error.reason}); convert the text to UTF-8 first, e.g. with iconv."
        ) from error
