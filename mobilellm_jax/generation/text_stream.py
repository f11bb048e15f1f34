"""The text of a model's tokens while the model draws them."""

from collections.abc import Iterable, Iterator, Sequence

from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns BOS and the tokens of `prompt`; training documents start with BOS too."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def decode_stream(
    tokenizer: Tokenizer, prompt: Sequence[int], chunks: Iterable[Sequence[int]]
) -> Iterator[str]:
    """Yields the text that each chunk of new tokens adds to the text of `prompt`.

    The text of the prompt and all pieces together are the text of all tokens. A piece ends at the
    end of a character: if several byte tokens spell a character, its piece comes with the last
    byte. Bytes that are not UTF-8 become U+FFFD at the end of their run.
    """
    ids = list(prompt)
    text = tokenizer.decode(ids)
    shown = len(text)
    byte = _lone_byte(tokenizer)
    for chunk in chunks:
        ids.extend(chunk)
        # All tokens are decoded together, because the text of a token depends on its neighbours: a
        # text drops its first space, and several tokens may hold the bytes of one character.
        text = tokenizer.decode(ids)
        stable = len(text.rstrip(_REPLACEMENT))
        if byte is not None:
            # The `tokenizers` library replaces a whole run of bytes by U+FFFD if the run is not
            # UTF-8, valid characters included. So no character of a run is final before its end.
            longer = tokenizer.decode([*ids, byte])
            stable = min(stable, common_prefix(text, longer))
        if stable > shown:
            yield text[shown:stable]
            shown = stable
    if len(text) > shown:
        yield text[shown:]


def _lone_byte(tokenizer: Tokenizer) -> int | None:
    """Returns the first token that is only a part of a character, or None."""
    ids = range(tokenizer.vocab_size)
    return next((i for i in ids if tokenizer.decode([i]) == _REPLACEMENT), None)


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Returns the number of equal items at the beginning of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
