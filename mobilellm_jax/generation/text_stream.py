"""Tokens of a model as text, while they come."""

from collections.abc import Iterable, Iterator, Sequence

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.generation.generate import Prepared, stream
from mobilellm_jax.generation.sampling import DEFAULT, Sampling
from mobilellm_jax.model.transformer import Params

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def stream_text(
    config: ModelConfig,
    params: Params | Prepared,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT,
) -> Iterator[str]:
    """Yields the continuation of `prompt` as it comes; "" starts from BOS alone."""
    ids = encode_prompt(tokenizer, prompt)
    chunks = stream(
        *(config, params, ids),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_id=tokenizer.eos_id,
    )
    yield from decode_stream(tokenizer, ids, chunks)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns BOS and the tokens of `prompt`, as training documents start."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def decode_stream(
    tokenizer: Tokenizer, prompt: Sequence[int], chunks: Iterable[Sequence[int]]
) -> Iterator[str]:
    """Yields the text that each chunk of new tokens adds to the text of `prompt`.

    The pieces together are the text of all tokens after that of the prompt. No piece ends inside a
    character: a character that several byte tokens spell is held back until its last byte is there,
    and bytes that never become one are shown as U+FFFD at the end of their run.
    """
    ids = list(prompt)
    text = tokenizer.decode(ids)
    shown = len(text)
    byte = _lone_byte(tokenizer)
    for chunk in chunks:
        ids.extend(chunk)
        # Decoded whole: what a piece looks like depends on its neighbours (the space that starts a
        # text is not part of it; the bytes of one character stand in several tokens).
        text = tokenizer.decode(ids)
        stable = len(text.rstrip(_REPLACEMENT))
        if byte is not None:
            # The `tokenizers` library shows a run of bytes that is not UTF-8 as U+FFFD throughout,
            # whole characters included: none is safe while the next byte could spoil the run.
            stable = min(stable, _common_prefix(text, tokenizer.decode([*ids, byte])))
        if stable > shown:
            yield text[shown:stable]
            shown = stable
    if len(text) > shown:
        yield text[shown:]


def _lone_byte(tokenizer: Tokenizer) -> int | None:
    """Returns the first token that is a part of a character, or None if there is none."""
    ids = range(tokenizer.vocab_size)
    return next((i for i in ids if tokenizer.decode([i]) == _REPLACEMENT), None)


def _common_prefix(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
