"""For both kinds of tokenizer and any text, decode(encode(text)) == text."""

import random
from pathlib import Path

import pytest

from mobilellm_jax.data.sources import python_docs
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from tests.data.example_tokenizers import train_byte_level

KINDS = ["trained", "byte_level"]
PRIVATE_USE = "".join(map(chr, range(0xE000, 0xF900)))
MEGABYTE = 1_000_000

HOSTILE = {
    "empty": "",
    "space": " ",
    "spaces": "     ",
    "leading spaces": "  leading",
    "trailing spaces": "trailing  ",
    "spaces within": "double  spaces   and    more",
    "newline": "\n",
    "line ends": "\n\n\r\n\r",
    "CRLF": "a\r\nb\r\n\r\nc\r\n",
    "lone CR": "a\rb\r",
    "tabs": "\ttabs\t\tand\nnewlines\n",
    "other line ends": "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029 end",
    "all kinds of spaces": " \u00a0\u1680\u2000\u2001\u200a\u202f\u205f\u3000\u200b\u2060\u180e ",
    "BOM": "\ufefftext with a byte order mark\ufeff",
    "emoji": "emoji 😀 family 👩\u200d👩\u200d👧 flag 🏳️\u200d🌈 🇩🇪 👍🏽 1\ufe0f\u20e3",
    "lone joiners": "\u200d\u200da\u200c\ufe0f\ufe0e",
    "scripts": "日本語 と عربى و עברית हिन्दी ไทย 한국어",
    "right to left": "\u202eabc\u202c \u2067שלום\u2069 \u200f(א)\u200e",  # noqa: RUF001  # Hebrew it is
    "combining marks": "e\u0301 \u0301a o\u0308\u0323 \u1100\u1161\u11a8 Z\u0351\u036b\u0343\u036a",
    "compatibility": "\ufb01 \uff21 ² ½ ﷺ Å \u212b",
    "NUL": "\x00",
    "NUL within": "a\x00b\x00\x00",
    "controls": "".join(map(chr, range(0x20))) + "\x7f\x80\x85\x9f",
    "terminal escape": "\x1b[31mred\x1b[0m\x07",
    "special tokens": "<s>",
    "more special tokens": "</s><unk><s> <0x0A> <pad> <|endoftext|> ▁<s>▁ <0xE2><0x96><0x81>",
    "space mark": "\u2581",
    "space marks": "\u2581\u2581",
    "space mark at the start": "\u2581start",
    "space mark at the end": "end\u2581",
    "space marks beside spaces": " \u2581 \u2581\u2581  \u2581 a\u2581 b \u2581c\u2581d ",
    "space marks beside newlines": "\u2581\n\u2581\n\n\u2581a\n",
    "sparkline": "sparkline \u2581\u2582\u2583 \u2581\u2581 \u2581",
    "space mark and stand-in": "\ue000\u2581\ue000\ue000 \u2581\u2581\ue000",
    "space mark and all private use": f"\u2581{PRIVATE_USE}\u2581",
    "supplementary private use": "\u2581\U000f0000\U0010fffd",
    "replacement character": "\ufffd a\ufffd\ufffdb",
    "noncharacters": "\ufdd0\ufdef\ufffe\uffff\U0001fffe\U0010ffff",
    "around the surrogates": "\ud7ff\ue000",
    "every byte as latin-1": bytes(range(256)).decode("latin-1"),
    "UTF-8 read as latin-1": "naïve 😀 ▁".encode().decode("latin-1"),
    "a sample of all planes": "".join(
        chr(c) for c in range(0, 0x11_0000, 61) if not 0xD800 <= c <= 0xDFFF
    ),
    "digits": "0123456789" * 50,
    "one letter": "x" * 20_000,
    "a megabyte without a space": "".join(random.Random(1).choices("abcdefgh", k=MEGABYTE)),
    "a megabyte of space marks": "\u2581" * (MEGABYTE // 3),
    "many spaces": " " * 20_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_lost(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in set(ids))
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_come_back(kind: str, seed: int, request: pytest.FixtureRequest) -> None:
    """Every seed has a small alphabet of its own, so that rare neighbours do meet."""
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(seed)
    points = [c for c in range(0x11_0000) if not 0xD800 <= c <= 0xDFFF]
    common = [*" \n\t\r\x00<s>/ab0", "\u2581", "\ue000", "\u200d", "\u0301", "the ", "  "]
    alphabet = [*common, *map(chr, rng.choices(points, k=20)), *map(chr, rng.choices(range(256)))]
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(300)]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


@pytest.mark.parametrize("at", [0, 2, 70_000])
@pytest.mark.parametrize("surrogate", ["\ud800", "\udc80", "\udfff", "\ude00\ud83d"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_is_refused(
    kind: str, surrogate: str, at: int, request: pytest.FixtureRequest
) -> None:
    text = "😀" * at + surrogate + "after"
    message = rf"Character {at} of the text is a lone surrogate .U\+{ord(surrogate[0]):04X}\)"
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(kind).encode(text)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Returns all of `python_docs`, training and validation."""
    return [text for _, text in python_docs.documents(python_docs.standard_library())]


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_of_python_docs_comes_back(
    kind: str, documents: list[str], tmp_path: Path
) -> None:
    sample = documents[::10]
    if kind == "trained":
        tokenizer: Tokenizer = train_tokenizer(sample, 1_000, tmp_path / "tokenizer.model")
    else:
        tokenizer = train_byte_level(sample, 1_000, tmp_path)
    assert len(documents) > 1_000
    assert [tokenizer.decode(tokenizer.encode(document)) for document in documents] == documents
