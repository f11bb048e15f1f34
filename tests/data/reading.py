"""Helpers that read whole sources, and pieces of sources in a process of their own."""

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import BadLine, Document, Piece, Source, TokenDocument, stop

AnyDocument = Document | TokenDocument


def read(
    source: Source, split: str = "train", on_bad: Callable[[BadLine], None] = stop
) -> list[AnyDocument]:
    """Returns the documents of all pieces. Each piece has passed through JSON."""
    pieces = [Piece(**json.loads(json.dumps(vars(piece)))) for piece in source.pieces(split)]
    return [document for piece in pieces for document in source.documents(piece, on_bad)]


def texts(
    source: Source, split: str = "train", on_bad: Callable[[BadLine], None] = stop
) -> list[str]:
    documents = read(source, split, on_bad)
    assert all(isinstance(document, Document) for document in documents)
    return [document[1] for document in documents]


def read_piece(spec: str, scratch: Path, piece: Piece) -> tuple[list[AnyDocument], list[str]]:
    """Does the work of a worker and returns the heavy packages that it had to import."""
    documents = list(open_source(spec, scratch).documents(piece, stop))
    heavy = {"jax", "fsspec", "pyarrow", "tensorflow_datasets", "zstandard"}
    return documents, sorted(heavy.intersection(sys.modules))


def read_in_other_processes(
    sources: Sequence[tuple[str, Path]],
) -> Iterator[tuple[list[AnyDocument], set[str]]]:
    """Does the same as `read`, with a separate process for every piece."""
    for spec, scratch in sources:
        pieces = open_source(spec, scratch).pieces("train")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(read_piece, spec, scratch, piece) for piece in pieces]
            results: list[Any] = [future.result() for future in futures]
        documents = [document for found, _ in results for document in found]
        yield documents, {package for _, heavy in results for package in heavy}
