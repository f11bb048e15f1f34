"""Chooses the validation documents, and the text that trains a tokenizer.

`prepare` makes both choices before it encodes documents. The functions read only as much of the
sources as they need.
"""

from collections.abc import Callable, Iterator, Sequence

from mobilellm_jax.data.preparation.parts import DIGESTS, digest
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION, BadLine, Source, TokenDocument
from mobilellm_jax.errors import UserError

# This much text is enough to learn the merges of any vocabulary, and SentencePiece trains on it in
# minutes.
TOKENIZER_TRAINING_CHARACTERS = 50_000_000
# Largest number of pieces that `tokenizer_sample` reads from one source.
_PLACES = 256


def is_divided(source: Source) -> bool:
    """Returns whether `prepare` takes validation documents from the source's training split."""
    return VALIDATION not in source.splits()


def held_out_below(
    sources: Sequence[Source], validation_fraction: float, on_bad: Callable[[BadLine], None]
) -> int:
    """Returns the threshold below which a document's digest selects it for validation, or 0.

    The threshold is `validation_fraction` of the range of digests. If no document or every document
    is below this threshold, the threshold moves so that one document changes sides. Reading stops
    as soon as one document below the threshold and one other document are found, so only small
    sources are read completely. A threshold of 0 selects no document.

    Raises:
      UserError: if there is a single document and no source has a validation split.
    """
    threshold = int(validation_fraction * DIGESTS)
    divided = [source for source in sources if is_divided(source)]
    if not threshold or not divided:
        return 0
    smallest, largest = DIGESTS, -1
    for source in divided:
        for piece in source.pieces(TRAIN):
            for document in source.documents(piece, on_bad):
                if isinstance(document, TokenDocument) or document.text:
                    found = digest(document)
                    smallest, largest = min(smallest, found), max(largest, found)
                    if smallest < threshold <= largest:
                        return threshold
    if smallest < largest:
        return min(max(threshold, smallest + 1), largest)
    if largest >= 0 and len(divided) == len(sources):
        raise UserError(
            f"validation_fraction={validation_fraction} cannot be held out of a single document "
            f"({sources[0].spec}); divide the text into several files, add a source, or set "
            "--validation_fraction=0 to go without validation."
        )
    return 0


def tokenizer_sample(
    sources: Sequence[Source],
    weights: Sequence[float] | None,
    held_out: int,
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
            for document in source.documents(piece, on_bad):
                if quota <= 0:
                    break
                assert not isinstance(document, TokenDocument), "refused before: it has no text"
                if held_out and is_divided(source) and digest(document) < held_out:
                    continue
                text = document.text[:quota]
                quota -= len(text)
                characters_left -= len(text)
                yield text
