"""Turns tokens into text while the model still draws more tokens."""

from collections.abc import Iterable, Iterator, Sequence

from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, common_prefix

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def decode_stream(
    tokenizer: Tokenizer, prompt: Sequence[int], chunks: Iterable[Sequence[int]]
) -> Iterator[str]:
    """Yields the pieces of text that the chunks of new tokens add after `prompt`.

    The text of the prompt, followed by all pieces, is the text of all tokens. A piece never ends
    inside a character: if several byte tokens form a character, the character is yielded with its
    last byte. If a sequence of byte tokens is not UTF-8, each byte becomes U+FFFD when the sequence
    ends.
    """
    ids = list(prompt)
    text = tokenizer.decode(ids)
    shown = len(text)
    byte = _lone_byte(tokenizer)
    for chunk in chunks:
        ids.extend(chunk)
        # All tokens are decoded together, because the text of a token depends on its neighbours:
        # the decoder drops a text's first space, and several tokens may hold the bytes of one
        # character.
        text = tokenizer.decode(ids)
        stable = len(text.rstrip(_REPLACEMENT))
        if byte is not None:
            # If a sequence of byte tokens is not UTF-8, the `tokenizers` library replaces the whole
            # sequence by U+FFFD, even its valid characters. So these characters can still change
            # until the sequence ends.
            longer = tokenizer.decode([*ids, byte])
            stable = min(stable, common_prefix(text, longer))
        if stable > shown:
            yield text[shown:stable]
            shown = stable
    if len(text) > shown:
        yield text[shown:]


def _lone_byte(tokenizer: Tokenizer) -> int | None:
    """Returns the lowest id of a token that is only a part of a character, or None."""
    ids = range(tokenizer.vocab_size)
    return next((i for i in ids if tokenizer.decode([i]) == _REPLACEMENT), None)
