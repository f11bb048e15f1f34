"""A source of Parquet tables: each row is a document, and one column contains the text."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mobilellm_jax.data.sources import files
from mobilellm_jax.data.sources.finding import File
from mobilellm_jax.data.sources.source import (
    BadLine,
    Document,
    OnBadLine,
    Piece,
    decoded_record,
    field_error,
)
from mobilellm_jax.errors import UserError, require
from mobilellm_jax.storage import file_kind

# Number of threads that read footers. A footer is small, but reading it may wait for a network.
_FOOTERS_AT_ONCE = 16
_BATCH_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 20


class ParquetSource(files.FileSource):
    """A source whose documents are the rows of the files, in the order of the paths.

    An empty text is a document. A null value is a bad record.

    The source reads only the column with the text, in batches of rows. A piece consists of whole
    row groups, so several processes cannot share a file that has only one row group. `pieces` reads
    the footer of every file, and raises a UserError if a file is not Parquet or has no text column
    `field`.
    """

    def __init__(self, spec: str, pattern: str, field: str) -> None:
        super().__init__(spec, pattern)
        self._field = field

    def documents(self, piece: Piece, on_bad: OnBadLine) -> Iterator[Document]:
        for (path, size), parts in itertools.groupby(piece.where, lambda part: tuple(part[:2])):
            with self._opened(path, size) as table:
                for _, _, group, first_row in parts:
                    yield from self._rows(path, table, group, first_row, on_bad)

    @functools.cached_property
    def _parts(self) -> list[files.Part]:
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            return list(
                itertools.chain.from_iterable(pool.map(self._row_groups, self._checked_files))
            )

    def _rows(
        self, path: str, table: Any, group: int, first_row: int, on_bad: OnBadLine
    ) -> Iterator[Document]:
        import pyarrow

        metadata = table.metadata.row_group(group)
        batch_rows = max(1, _BATCH_BYTES * metadata.num_rows // max(1, metadata.total_byte_size))
        batches = table.iter_batches(
            batch_rows, row_groups=[group], columns=[self._field], use_threads=False
        )
        row, column = first_row, f"column {self._field!r}"
        while True:
            with _refused(path):
                batch = next(batches, None)
                if batch is None:
                    return
                # The text is read as bytes, because PyArrow does not check that text is UTF-8.
                texts = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            for content in texts:
                row += 1
                if content is None:
                    on_bad(BadLine(path, row, None, f"{column} is null"))
                else:
                    yield from decoded_record(path, row, column, content, on_bad)

    def _row_groups(self, file: File) -> list[files.Part]:
        """Returns a part for every row group; their `stored_bytes` add up to the file's size."""
        with self._opened(file.path, file.size_bytes) as table:
            schema = table.schema_arrow
            index = schema.get_field_index(self._field)
            if index < 0 or not _is_text(schema.field(index).type):
                columns = {column.name: str(column.type) for column in schema}
                texts = [column.name for column in schema if _is_text(column.type)]
                place = f" in {file.path}"
                raise field_error(self.spec, "column", self._field, columns, texts, place)
            rows, encoded = [0], [0]  # Totals before each row group.
            for i in range(table.num_row_groups):
                # The sizes include all columns. A request for the size of one column would be
                # unsafe: if that part of the footer is damaged, PyArrow 26 aborts the process.
                with _refused(file.path):
                    group = table.metadata.row_group(i)
                rows.append(rows[-1] + group.num_rows)
                encoded.append(encoded[-1] + max(0, group.total_byte_size))
        parts = []
        for i, (before, after) in enumerate(itertools.pairwise(encoded)):
            first, last = (file.size_bytes * e // max(1, encoded[-1]) for e in (before, after))
            where = (file.path, file.size_bytes, i, rows[i])
            parts.append(files.Part(where, after - before, last - first))
        return parts

    @contextlib.contextmanager
    def _opened(self, path: str, size_bytes: int) -> Iterator[Any]:
        require("pyarrow", "data", "parquet: sources")
        import pyarrow.parquet

        with files.opened(path, size_bytes) as file:
            kind = file_kind.explanation(files.first_bytes(file, path))
            with _refused(path, kind):
                # With its default settings, PyArrow would hold the whole column of a row group in
                # memory.
                table = pyarrow.parquet.ParquetFile(
                    file, buffer_size=_BUFFER_BYTES, pre_buffer=False
                )
            yield table


def _is_text(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pyarrow.types.is_string(kind)
        or pyarrow.types.is_large_string(kind)
        or pyarrow.types.is_binary(kind)
        or pyarrow.types.is_large_binary(kind)
        or pyarrow.types.is_string_view(kind)
        or pyarrow.types.is_binary_view(kind)
    )


@contextlib.contextmanager
def _refused(path: str, kind: str = "") -> Iterator[None]:
    """Turns PyArrow's errors about the contents of a file into a UserError that names the file.

    `kind` is the explanation of the file's first bytes.
    """
    import pyarrow

    try:
        yield
    # PyArrow raises UnicodeDecodeError for a column name that is not UTF-8.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # This is an error of the disk, not of the format.
        why = " ".join(str(error).split())
        raise UserError(
            f"{path} is not a Parquet file, or it is damaged: {why}{kind}; download it again, "
            "or exclude it from the pattern."
        ) from error
