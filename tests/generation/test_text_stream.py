"""Streamed pieces end at characters and together are the text of all tokens."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from mobilellm_jax.generation.generate import Request, generate, stream
from mobilellm_jax.generation.sampling import Sampling
from mobilellm_jax.generation.text_stream import decode_stream
from mobilellm_jax.model.transformer import Params
from tests import tiny

TINY = dataclasses.replace(tiny.MODEL, max_seq_len=128)


@pytest.fixture(scope="module")
def params() -> Params:
    return jax.device_put(tiny.random_params(TINY))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer_of_few_words(tmp_path_factory.mktemp("sp"), 300)


def byte_fallback_json(folder: Path) -> Path:
    """Writes a tokenizer.json like Llama's, with byte tokens that are decoded in runs."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["\u2581", "a", "b", "\u2581a", "é", "\ufffd"]
    model = tokenizers.models.BPE(
        {p: i for i, p in enumerate(pieces)},
        [("\u2581", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    built = tokenizers.Tokenizer(model)
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    built.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    built.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    built.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def byte_level_json(folder: Path) -> Path:
    """Writes a tokenizer.json like GPT-2's, in which every byte is a character of a piece."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", *alphabet, "ðŁ", "Ġa"]
    merges = [("ð", "Ł"), ("Ġ", "a")]
    built = tokenizers.Tokenizer(
        tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges)
    )
    built.add_special_tokens(["<s>", "</s>"])
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(params=["sentencepiece", "byte_fallback", "byte_level"])
def any_tokenizer(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer
) -> Tokenizer:
    if request.param == "sentencepiece":
        return tokenizer
    build = byte_fallback_json if request.param == "byte_fallback" else byte_level_json
    return load_tokenizer(build(tmp_path))


def cut(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


HOSTILE = [
    "plain words",
    "  two spaces, then\n\n\ttabs ",
    "é ü ß 日本語 العربية",
    "😀👩\u200d👩\u200d👧 flags 🇩🇪",
    "a\u0301 combining, \x00 \x1b control",
    "\U0010ffff\ud7ff end of the range",
    "",
]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("text", HOSTILE)
def test_streamed_text_is_whole_characters_and_the_whole_text(
    text: str, size: int, any_tokenizer: Tokenizer
) -> None:
    for prompt in ("", "a b", "日"):
        before = prompt_ids(any_tokenizer, prompt)
        new = any_tokenizer.encode(prompt + text)[len(before) - 1 :]
        pieces = list(decode_stream(any_tokenizer, before, cut(new, size)))
        assert prompt + "".join(pieces) == any_tokenizer.decode([*before, *new])
        assert prompt + "".join(pieces) == prompt + text
        assert all(pieces)
        assert "\ufffd" not in "".join(pieces)


def test_streaming_shows_a_character_with_its_last_byte(tokenizer: Tokenizer) -> None:
    new = tokenizer.encode("x😀y")[-6:]  # the token before the bytes may be x or a longer piece
    assert tokenizer.decode(new[-5:-1]) == "😀"
    shown = []
    chunks = iter([[i] for i in new[-5:]])
    for piece in decode_stream(tokenizer, [tokenizer.bos_id], chunks):
        shown.append((piece, len(list(chunks)) if piece == "😀" else 0))
    assert shown == [("😀", 1)]  # one token was left when the character came


@pytest.mark.parametrize("seed", range(20))
def test_streamed_text_of_random_tokens_adds_up(seed: int, any_tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(seed)
    bytes_first = min(262, any_tokenizer.vocab_size)
    new = rng.integers(3, bytes_first if seed % 2 else any_tokenizer.vocab_size, 60).tolist()
    before = prompt_ids(any_tokenizer, "a")
    pieces = list(decode_stream(any_tokenizer, before, cut(new, 1 + seed % 4)))
    assert "a" + "".join(pieces) == any_tokenizer.decode([*before, *new])


def test_streaming_keeps_real_replacement_characters(any_tokenizer: Tokenizer) -> None:
    new = any_tokenizer.encode("a\ufffdb\ufffd")
    assert "".join(decode_stream(any_tokenizer, [any_tokenizer.bos_id], cut(new, 1))) == (
        "a\ufffdb\ufffd"
    )


def test_a_prompt_starts_with_bos(tokenizer: Tokenizer) -> None:
    assert prompt_ids(tokenizer, "the cat") == [tokenizer.bos_id, *tokenizer.encode("the cat")]
    assert prompt_ids(tokenizer, "") == [tokenizer.bos_id]


def test_streamed_text_of_a_model_is_the_text_of_generate(
    params: Params, tokenizer: Tokenizer
) -> None:
    for prompt in ("the cat", ""):
        ids = prompt_ids(tokenizer, prompt)
        sampling = Sampling(seed=1, temperature=1.0)
        request = Request([ids], max_new_tokens=70, sampling=sampling, end_ids=[tokenizer.eos_id])
        [new] = generate(TINY, params, request)
        chunks = (part for [part] in stream(TINY, params, request))
        pieces = decode_stream(tokenizer, ids, chunks)
        assert prompt + "".join(pieces) == tokenizer.decode([*ids, *new])
