import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from mobilellm_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from mobilellm_jax.data.tokenizer import Tokenizer, changes_text, copy_tokenizer, load_tokenizer
from mobilellm_jax.data.tokenizer_training import train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n    It did so 1234 times.\n",
    "Sphinx of black quartz,\tjudge my vow!  Pack my box with five dozen liquor jugs.\n",
    "def encode(text: str) -> list[int]:\n    return [ord(c) for c in text]\n",
] * 3

HOSTILE = [
    "",
    " ",
    "     ",
    "  leading",
    "trailing  ",
    "double  spaces   and    more",
    "\n",
    "\n\n\r\n\r",
    "\ttabs\t\tand\nnewlines\n",
    "emoji 😀 family 👩‍👩‍👧 flag 🏳️‍🌈",
    "日本語 と عربى و עברית",
    "\x00",
    "a\x00b",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x85\x9f",
    "<s>",
    "</s><unk><s> <0x0A> <pad>",
    "e\u0301 \ufb01 \uff21 \u00a0 \u2028 \u3000 \ufeff \ufffd \U0010ffff",
    "\u2581",
    "sparkline \u2581\u2582\u2583 \u2581\u2581 \u2581",
    "\u2581 and private \ue000\ue001",
    "0123456789" * 50,
    "x" * 20_000,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("trained") / "tokenizer.model")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A GPT-2-like tokenizer.json, with truncation and padding left on by its maker."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    model.enable_truncation(5)
    model.enable_padding(length=50)
    file = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(file))
    return load_tokenizer(file)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", ["trained", "byte_level"])
def test_no_text_is_lost(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
def test_random_unicode_comes_back(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(0)
    points = [c for c in range(0x11_0000) if not 0xD800 <= c <= 0xDFFF]
    alphabet = [*" \n\t\x00<s>/ab", "\u2581", *map(chr, rng.choices(points, k=40))]
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(300)]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
def test_a_lone_surrogate_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match=r"Character 2 of the text is a lone surrogate .U\+DC80"):
        request.getfixturevalue(kind).encode("ab\udc80")


def test_ids_equal_raw_sentencepiece(trained: Tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(trained.file))
    for text in [*TEXTS, *(t for t in HOSTILE if "\u2581" not in t)]:
        assert trained.encode(text) == raw.encode(text)
    assert (trained.vocab_size, trained.bos_id, trained.eos_id) == (400, 1, 2)
    assert [raw.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == [
        *("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")
    ]


def test_the_space_mark_becomes_its_three_bytes(trained: Tokenizer) -> None:
    assert trained.encode("a\u2581")[-3:] == [3 + 0xE2, 3 + 0x96, 3 + 0x81]


def test_training_is_deterministic(trained: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 400, tmp_path / "tokenizer.model")
    assert again.file.read_bytes() == trained.file.read_bytes()
    assert again.sha256 == trained.sha256


def test_long_lines_take_part_in_training(tmp_path: Path) -> None:
    """SentencePiece would skip a line of this length without a word."""
    words = ["aardvark", "zymurgy", "quixotic"]
    line = " ".join(random.Random(0).choices(words, k=20_000))
    tokenizer = train_tokenizer([line], 300, tmp_path / "tokenizer.model")
    assert all(len(tokenizer.encode(word)) == 1 for word in words)


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (5000, r"vocab_size=5000 is too large for this text, which supports at most \d+"),
        (270, r"vocab_size=270 must be at least \d+: 256 bytes"),
        (259, r"vocab_size=259 must exceed 259"),
        (-1, r"vocab_size=-1 must exceed 259"),
    ],
)
def test_a_vocabulary_that_does_not_fit(vocab_size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TEXTS, vocab_size, tmp_path / "tokenizer.model")
    assert list(tmp_path.iterdir()) == []


def test_the_largest_vocabulary_named_in_the_message_works(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most") as caught:
        train_tokenizer(TEXTS, 5000, tmp_path / "tokenizer.model")
    largest = int(str(caught.value).split("at most ")[1].split(";")[0])
    assert train_tokenizer(TEXTS, largest, tmp_path / "tokenizer.model").vocab_size == largest


@pytest.mark.parametrize("texts", [[], ["", "\n\n"]])
def test_no_text_to_train_on(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer(texts, 300, tmp_path / "tokenizer.model")


def test_without_byte_fallback_unknown_characters_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "closed"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=65, minloglevel=2
    )
    tokenizer = load_tokenizer(prefix.with_suffix(".model"))
    assert tokenizer.decode(tokenizer.encode("the lazy dog")) == "the lazy dog"
    with pytest.raises(ValueError, match=r"no token for 'é' \(U\+00E9\) and no byte fallback"):
        tokenizer.encode("caf\u00e9")
    with pytest.raises(ValueError, match=r"U\+2581"):
        tokenizer.encode("a\u2581b")
    assert changes_text(load_tokenizer_that_normalises(tmp_path))


def load_tokenizer_that_normalises(folder: Path) -> Tokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "nfkc"),
        vocab_size=325,
        byte_fallback=True,
        minloglevel=2,
    )
    return load_tokenizer(folder / "nfkc.model")


def test_ours_does_not_normalise(trained: Tokenizer, byte_level: Tokenizer) -> None:
    assert not changes_text(trained)
    assert not changes_text(byte_level)


def test_a_special_token_in_a_text_is_text(byte_level: Tokenizer) -> None:
    raw = tokenizers.Tokenizer.from_file(str(byte_level.file))
    raw.no_truncation()
    raw.no_padding()
    assert raw.encode("a<s>b", add_special_tokens=False).ids.count(0) == 1  # what must not happen
    assert byte_level.encode("a<s>b").count(0) == 0
    assert byte_level.decode([0, 2, 1]) == "<pad>"  # only BOS and EOS are dropped
    assert byte_level.encode("ab, ba!") == raw.encode("ab, ba!", add_special_tokens=False).ids


def renamed(byte_level: Tokenizer, folder: Path, names: dict[str, str]) -> Path:
    content = byte_level.file.read_text(encoding="utf-8")
    for old, new in names.items():
        content = content.replace(json.dumps(old), json.dumps(new))
    file = folder / "tokenizer.json"
    file.write_text(content, encoding="utf-8")
    return file


def test_bos_and_eos_of_a_tokenizer_json(byte_level: Tokenizer, tmp_path: Path) -> None:
    assert (byte_level.bos_id, byte_level.eos_id, byte_level.vocab_size) == (0, 1, 350)
    file = renamed(byte_level, tmp_path, {"<s>": "<start>", "</s>": "<stop>"})
    with pytest.raises(ValueError, match=r"special tokens are <start>, <stop>, <pad>\. Put a"):
        load_tokenizer(file)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<start>"}, "eos_token": "<stop>"}))
    tokenizer = load_tokenizer(file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    copied = tmp_path / "copied"
    copied.mkdir()
    assert load_tokenizer(copy_tokenizer(tokenizer, copied)).eos_id == 1
    config.write_text(json.dumps({"bos_token": None, "eos_token": "<stop>"}))
    assert load_tokenizer(file).bos_id == 1  # no BOS of its own: EOS parts the documents
    config.write_text(json.dumps({"bos_token": "<start>", "eos_token": "<end>"}))
    with pytest.raises(ValueError, match="no token '<end>'"):
        load_tokenizer(file)


def test_a_tokenizer_json_that_loses_the_space_mark_refuses_it(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    special = ["<s>", "</s>"]
    model.train_from_iterator(
        TEXTS, tokenizers.trainers.BpeTrainer(special_tokens=special, show_progress=False)
    )
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("the lazy dog")) == "the lazy dog"
    with pytest.raises(ValueError, match=r"U\+2581, which .* turns into a space"):
        tokenizer.encode("the \u2581 dog")


def test_files_that_are_no_tokenizer(tmp_path: Path, trained: Tokenizer) -> None:
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)

    refused("tokenizer.model", b"\x00garbage", "is not a SentencePiece model")
    refused("tokenizer.model", b"", "is not a SentencePiece model")
    refused("tokenizer.json", b"{", "is not JSON")
    refused("tokenizer.json", b'{"bos_token": "<s>"}', "is no tokenizer.json")
    refused("vocab.txt", b"a", r"must be a SentencePiece \*\.model or")
    with pytest.raises(FileNotFoundError, match="no tokenizer file there"):
        load_tokenizer(tmp_path / "missing.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    assert load_tokenizer(trained.file.parent).sha256 == trained.sha256


def test_protocol_is_what_both_offer(trained: Any, byte_level: Any) -> None:
    for tokenizer in (trained, byte_level):
        assert len(tokenizer.sha256) == 64
        assert tokenizer.file.is_file()
