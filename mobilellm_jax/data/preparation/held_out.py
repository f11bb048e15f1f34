"""Which documents are validation, and which text a tokenizer is trained on.

Both are settled before anything is encoded, from as little of the sources as will do.
"""

from collections.abc import Callable, Iterator, Sequence

from mobilellm_jax.data.preparation.parts import DIGESTS, digest
from mobilellm_jax.data.sources.source import TRAIN, VALIDATION, BadLine, Source, TokenDocument
from mobilellm_jax.errors import UserError

# Enough for the merges of any vocabulary; SentencePiece trains on it for minutes, not hours.
TOKENIZER_TRAINING_CHARACTERS = 50_000_000
# Of a source too large to be read for its tokenizer, this many places are.
_PLACES = 256


def is_divided(source: Source) -> bool:
    """Returns whether validation documents are held out of the source's training documents."""
    return VALIDATION not in source.splits()


def held_out_below(
    sources: Sequence[Source], validation_fraction: float, on_bad: Callable[[BadLine], None]
) -> int:
    """Returns the digest below which a document of a divided source is held out; 0 for none.

    That is the fraction of all digests, unless no document or every document were below it, which
    happens to a few documents; then one document goes to the other side. Reading stops where there
    is a document on each side: nearly at once for all but small sources.

    Raises:
      UserError: if there is a single document and no source brings validation of its own.
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
    """Yields training text of at most `most_characters`, from all over every source.

    Each source gives by its weight, or else by its size; a source smaller than its share gives all
    that it has. What is held out is left out. The sample does not change with the number of
    workers.
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
            # What a short piece leaves over goes to those after it.
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
