"""Chooses the validation documents, and the text that trains a tokenizer.

`prepare` makes both choices before it encodes documents. The functions read only as much of the
sources as they need.
"""

from collections.abc import Callable, Iterator, Sequence

from mobilellm_jax.data.preparation.cutting import (
    DIGESTS,
    Cut,
    HeldOut,
    cut_documents,
    digest,
    is_held_out,
)
from mobilellm_jax.data.sources.source import (
    TRAIN,
    VALIDATION,
    BadLine,
    Document,
    Source,
    TokenDocument,
)
from mobilellm_jax.errors import UserError

# This much text is enough to learn the merges of any vocabulary, and SentencePiece trains on it in
# minutes.
TOKENIZER_TRAINING_CHARACTERS = 50_000_000
# If the document to hold out is longer than three limits, only its end is held out. The limits are
# `_LONG` characters, the share `_LARGE_SHARE` of all text, and `_MOST_TIMES_TOO_MUCH` times the
# wanted length of the validation text.
_LONG = 10_000
_LARGE_SHARE = 0.1
_MOST_TIMES_TOO_MUCH = 3
# Smallest number of characters that are held out at the end of a long document.
_SHORTEST_END = 1_000
# Largest number of pieces that `tokenizer_sample` reads from one source.
_PLACES = 256


def is_divided(source: Source) -> bool:
    """Returns whether `prepare` takes validation documents from the source's training split."""
    return VALIDATION not in source.splits()


def choose_held_out(
    sources: Sequence[Source], validation_fraction: float, on_bad: Callable[[BadLine], None]
) -> HeldOut:
    """Returns the rule that holds out about `validation_fraction` of the documents.

    A document is held out if its digest is less than `validation_fraction` of the range of digests.
    If this selects no document or every document, the threshold moves so that one document changes
    sides. If that document is far longer than the text to hold out, its end is held out instead.
    Reading stops as soon as one document below the threshold and one other document are found, so
    only small sources are read completely. A threshold of 0 selects no document.

    Raises:
      UserError: if there is a single document that cannot be divided, and no source has a
        validation split.
    """
    threshold = int(validation_fraction * DIGESTS)
    divided = [source for source in sources if is_divided(source)]
    if not threshold or not divided:
        return HeldOut(0)
    smallest, largest, length, total = DIGESTS, -1, 0, 0
    may_cut = True
    for source in divided:
        for piece in source.pieces(TRAIN):
            for document in source.documents(piece, on_bad):
                is_text = isinstance(document, Document)
                size = len(document.text if isinstance(document, Document) else document.ids)
                if is_text and not size:
                    continue
                found = digest(document)
                total += size
                if found < smallest:
                    length, may_cut = size, is_text and size > 1
                smallest, largest = min(smallest, found), max(largest, found)
                if smallest < threshold <= largest:
                    return HeldOut(threshold)
    alone = largest >= 0 and smallest == largest and len(divided) == len(sources)
    wanted = validation_fraction * total
    too_long = length > max(_MOST_TIMES_TOO_MUCH * wanted, _LARGE_SHARE * total, _LONG)
    if may_cut and (alone or (too_long and threshold <= smallest < largest)):
        return HeldOut(
            threshold, Cut(smallest, max(wanted, min(_SHORTEST_END, length / 10)) / length)
        )
    if smallest < largest:
        return HeldOut(min(max(threshold, smallest + 1), largest))
    if alone:
        raise UserError(
            f"validation_fraction={validation_fraction} cannot be held out of a single document "
            f"({sources[0].spec}); divide the text into several files, add a source, or set "
            "--validation_fraction=0 to go without validation."
        )
    return HeldOut(0)


def tokenizer_sample(
    sources: Sequence[Source],
    weights: Sequence[float] | None,
    held_out: HeldOut,
    on_bad: Callable[[BadLine], None],
    most_characters: int = TOKENIZER_TRAINING_CHARACTERS,
) -> Iterator[str]:
    """Yields up to `most_characters` characters of training text, spread over every source.

    Each source contributes in proportion to its weight, or to its size if there are no weights. A
    source that is smaller than its share contributes all its text. The sample contains no documents
    that are held out for validation. It does not depend on the number of workers.
    """
    pieces = [source.pieces(TRAIN) for source in sources]
    sizes = [sum(piece.size_bytes for piece in of_source) for of_source in pieces]
    shares = weights or sizes
    for source, of_source, size, share in zip(sources, pieces, sizes, shares, strict=True):
        count = min(len(of_source), _PLACES)
        places = [of_source[(2 * i + 1) * len(of_source) // (2 * count)] for i in range(count)]
        characters_left = int(most_characters * share / max(sum(shares), 1e-9))
        bytes_left = size if count == len(of_source) else sum(p.size_bytes for p in places)
        for piece in places:
            # If a piece has less text than its quota, later pieces get the remaining characters.
            quota = characters_left * piece.size_bytes // max(bytes_left, 1)
            bytes_left -= piece.size_bytes
            documents = source.documents(piece, on_bad)
            divided = held_out.below > 0 and is_divided(source)
            for document in cut_documents(documents, held_out.cut if divided else None):
                if quota <= 0:
                    break
                assert not isinstance(document, TokenDocument), "refused before: it has no text"
                if divided and is_held_out(document, held_out.below):
                    continue
                text = document.text[:quota]
                quota -= len(text)
                characters_left -= len(text)
                yield text
