"""Divides one document, so that a corpus of very few documents has text for validation.

The end of the document becomes a validation document of its own. It begins at a paragraph if one
begins near the wanted place, or else at a line, or else at a word.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mobilellm_jax.data.sources.source import Document, TokenDocument

DIGESTS = 1 << 64
_BREAKS = ("\n\n", "\n\r\n", "\n", " ")


class Cut(NamedTuple):
    """The digest of the document to divide, and the share of it that is held out."""

    digest: int
    share: float


class HeldOut(NamedTuple):
    """The rule that selects validation text from sources without a validation split.

    Documents with a digest less than `below` are held out. If there is a `cut`, the end of one
    document is held out as well.
    """

    below: int
    cut: Cut | None = None


def digest(document: Document | TokenDocument) -> int:
    """Returns a 64-bit hash of a document; documents with small hashes are held out."""
    if isinstance(document, TokenDocument):
        content = np.asarray(document.ids, "<i8").tobytes()
    else:
        content = document.text.encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def is_held_out(document: Document | TokenDocument, below: int) -> bool:
    """Returns whether a document is for validation."""
    if isinstance(document, Document) and document.held_out is not None:
        return document.held_out
    return digest(document) < below


def cut_documents(
    documents: Iterator[Document | TokenDocument], cut: Cut | None
) -> Iterator[Document | TokenDocument]:
    """Yields the documents; divides the document that `cut` names into two documents."""
    if cut is None:
        yield from documents
        return
    for document in documents:
        if isinstance(document, TokenDocument) or digest(document) != cut.digest:
            yield document
            continue
        at = place_to_cut(document.text, cut.share)
        for text, held_out in ((document.text[:at], False), (document.text[at:], True)):
            yield Document(document.name, text, held_out)


def place_to_cut(text: str, share: float) -> int:
    """Returns where to cut a text so that the end has about `share` of it; no part is empty."""
    length = max(1, round(len(text) * share))
    wanted = max(1, len(text) - length)
    for mark in _BREAKS:
        if (found := text.rfind(mark, max(0, wanted - length // 2), wanted)) >= 0:
            return found + len(mark)
    return wanted
