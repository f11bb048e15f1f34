"""Sources of TFDS datasets, including `python_docs`; TensorFlow is not needed to read them."""

import abc
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilellm_jax import config
from mobilellm_jax.data.sources import files, source
from mobilellm_jax.data.sources.source import (
    TRAIN,
    VALIDATION,
    Document,
    OnBadLine,
    Piece,
    Source,
)
from mobilellm_jax.errors import UserError

# Approximate size of a request. TFDS starts threads for every request, so one request reads many
# records.
_BATCH_BYTES = 1 << 20


class _RecordSource(Source):
    """A source of the records of a TFDS dataset; a piece is a range of records.

    TFDS knows the size of a whole split, but not of a record or of a slice such as train[:10%]. The
    sizes of pieces are therefore estimates from the average size of a record.
    """

    _field = "text"
    _split: str | None = None  # TFDS's name of the split that the user gave.

    @property
    @abc.abstractmethod
    def _builder(self) -> Any:
        """The TFDS builder, after it has written its files."""

    def pieces(self, split: str) -> list[Piece]:
        records, size = self._extent(self._split or split)
        count = min(records, max(1, -(-size // source.PIECE_BYTES)))
        return [
            Piece(self.spec, split, size * stop // records - size * start // records, (start, stop))
            for start, stop in files.cuts(records, count)
        ]

    def documents(self, piece: Piece, on_bad: OnBadLine) -> Iterator[Document]:
        name = self.spec if self._split else f"{self.spec} {piece.split}"
        records = self._records(self._split or piece.split)
        start, stop = piece.where
        at_once = max(1, _BATCH_BYTES * (stop - start) // max(1, piece.size_bytes))
        for first in range(start, stop, at_once):
            indices = range(first, min(first + at_once, stop))
            for index, record in zip(indices, records.__getitems__(indices), strict=True):
                yield from source.decoded_record(
                    name, index + 1, repr(self._field), record[self._field], on_bad
                )

    def _extent(self, split: str) -> tuple[int, int]:
        """Returns the numbers of records and bytes of a split; for a slice, bytes are estimates."""
        splits = self._builder.info.splits
        records = splits[split].num_examples
        if split in splits:
            return records, int(splits[split].num_bytes)
        whole = sum(int(known.num_bytes) for known in splits.values())
        return records, whole * records // max(1, splits.total_num_examples)

    @functools.cache  # noqa: B019  # A source lives as long as its process.
    def _records(self, split: str) -> Any:
        builder = self._builder
        try:
            return builder.as_data_source(split)
        except NotImplementedError as error:  # TFDS raises it for files without random access.
            raise UserError(
                f"source={self.spec!r}: the files of the dataset in {builder.data_path} have a "
                "format without random access, which only TensorFlow can read. Build the dataset "
                f"again as array_record, e.g. with tfds.builder({builder.name!r}, "
                "file_format='array_record', data_dir=OTHER_FOLDER).download_and_prepare(), and "
                "set TFDS_DATA_DIR to that folder."
            ) from error


class PythonDocsSource(_RecordSource):
    """The source `python_docs`; the first call of `pieces` builds the dataset under `scratch`."""

    def __init__(self, spec: str, scratch: Path) -> None:
        super().__init__(spec)
        self._scratch = scratch

    def identity(self) -> str:
        from mobilellm_jax.data.sources import python_docs

        return python_docs.identity()

    def splits(self) -> tuple[str, ...]:
        return (TRAIN, VALIDATION)

    @functools.cached_property
    def _builder(self) -> Any:
        from mobilellm_jax.data.sources import python_docs

        return python_docs.build(self._scratch)


class TfdsSource(_RecordSource):
    """A TFDS dataset; TFDS downloads and builds it as array_record if its files are missing."""

    def __init__(self, spec: str, name: str, split: str | None, field: str) -> None:
        super().__init__(spec)
        self._name = name
        self._split = split
        self._field = field

    def identity(self) -> str:
        extents = ", ".join(
            "{}: {} records, {} bytes".format(split, *self._extent(split))
            for split in ([self._split] if self._split else self.splits())
        )
        return f"tfds {self._builder.info.full_name} {self._field} ({extents})"

    def splits(self) -> tuple[str, ...]:
        own = not self._split and VALIDATION in self._builder.info.splits
        return (TRAIN, VALIDATION) if own else (TRAIN,)

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(self._name)  # The files may have any format.
            if not builder.is_prepared():
                builder = tfds.builder(self._name, file_format="array_record")
                builder.download_and_prepare()
        except tfds.core.DatasetNotFoundError as error:
            hint = config.near_miss(self._name, tfds.list_builders(with_community_datasets=False))
            raise UserError(
                f"source={self.spec!r}: TFDS does not know this dataset.{hint}"
            ) from error
        except ModuleNotFoundError as error:
            raise UserError(
                f"source={self.spec!r}: building this dataset needs the Python package "
                f"{error.name!r}. Install it, or build the dataset elsewhere with "
                f"tfds.builder({self._name!r}, file_format='array_record').download_and_prepare() "
                "and set TFDS_DATA_DIR to its folder; reading it needs no TensorFlow."
            ) from error
        features = builder.info.features
        texts = [name for name, feature in features.items() if _is_text(feature)]
        if self._field not in texts:
            raise source.field_error(self.spec, "feature", self._field, features, texts, "")
        wanted = re.split(r"[\[+]", self._split or TRAIN)[0]
        if wanted not in builder.info.splits and wanted != "all":
            names = list(builder.info.splits)
            raise UserError(
                f"source={self.spec!r}: the dataset has no split {wanted!r}, only "
                f"{', '.join(names)}.{config.near_miss(wanted, names)}"
            )
        return builder


def _is_text(feature: Any) -> bool:
    """Returns whether a feature is a single string: a Text, or a scalar Tensor of bytes."""
    import tensorflow_datasets as tfds

    return (
        isinstance(feature, tfds.features.Tensor)
        and feature.shape == ()
        and feature.np_dtype == "O"
    )
