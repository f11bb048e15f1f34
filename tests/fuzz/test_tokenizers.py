"""Opens and uses tokenizer.json, tokenizer_config.json and SentencePiece's *.model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from sentencepiece import sentencepiece_model_pb2

from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.export.huggingface.tokenizer_files import convert_sentencepiece
from tests.fuzz.hostile import damaged_bytes, damaged_json, fuzz

TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "def f(x):\n    return x + 1\n"] * 5
SPECIAL = ["<s>", "</s>", "<unk>"]


def use(tokenizer: Tokenizer) -> None:
    for text in ("", "a fox", " \u2581é日\U0001f600\x00"):
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            if tokenizer.file.name not in str(error):  # whose message says what cannot be encoded
                raise
            continue
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode([*ids, 0, tokenizer.vocab_size - 1]), str)
    assert 0 <= tokenizer.bos_id < tokenizer.vocab_size
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert len(tokenizer.byte_ids) in (0, 256)


def model_of(kind: str) -> Any:
    letters = sorted(set("".join(TEXTS)))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters, "th", "the"])}
    if kind == "BPE":
        merges = [("t", "h"), ("th", "e")]
        return tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=False)
    if kind == "Unigram":
        scores = [(token, -float(i)) for token, i in vocabulary.items()]
        return tokenizers.models.Unigram(scores, unk_id=2, byte_fallback=False)
    if kind == "WordPiece":
        return tokenizers.models.WordPiece(vocabulary, unk_token="<unk>")
    return tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece", "WordLevel"])
def test_tokenizer_json(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(model_of(kind))
    tokenizer.add_special_tokens(SPECIAL)
    if kind == "BPE":
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Replace("x", "y"), tokenizers.normalizers.NFC()]
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(r"\w+|\s+"), "isolated"
        )
        tokenizer.decoder = tokenizers.decoders.Fuse()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    file = tmp_path / "tokenizer.json"

    def parse(content: bytes) -> None:
        file.write_bytes(content)
        use(load_tokenizer(tmp_path))

    valid = tokenizer.to_str()
    fuzz(parse, damaged_json(json.loads(valid)), tmp_path, valid=valid.encode())


def test_tokenizer_config_json(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(model_of("BPE"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    valid = {
        "bos_token": {"content": "<s>", "lstrip": False, "special": True},
        "eos_token": "</s>",
        "unk_token": None,
        "model_max_length": 1000000000000000019884624838656,  # transformers: no limit
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": ["tokenization.Evil", None]},
    }

    def parse(content: bytes) -> None:
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        use(load_tokenizer(tmp_path))

    fuzz(parse, damaged_json(valid), tmp_path, valid=json.dumps(valid).encode())


_TEXTS = [
    "",
    "a",
    "\u2581",
    "\x00",
    "x" * 3000,
    "<0x41>",
    "<0xZZ>",
    "\u2581\u2581",
    "\ue000",
    "</s>",
]
_NUMBERS = [-(1 << 31), -1, 0, 1, 3, 299, 300, (1 << 31) - 1]
_BYTES = [b"", b"\0", b"\xff" * 9, b"\x04\0\0\0" + b"\1" * 8, b"\0\1\0\0" + b"\xff" * 300]


@st.composite
def changed_models(draw: DrawFn, valid: bytes) -> bytes:
    """Returns the model with up to three pieces or settings changed."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(valid)
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(["piece", "piece", "trainer", "normalizer", "drop"]))
        if part == "drop" and len(model.pieces) > 1:
            del model.pieces[draw(st.integers(0, len(model.pieces) - 1))]
            continue
        piece = model.pieces[draw(st.integers(0, len(model.pieces) - 1))]
        message = {"trainer": model.trainer_spec, "normalizer": model.normalizer_spec}.get(
            part, piece
        )
        fields = [f for f in message.DESCRIPTOR.fields if not f.is_repeated]
        field = draw(st.sampled_from(fields))
        if field.type == field.TYPE_BYTES:
            value = draw(st.sampled_from(_BYTES))
        elif field.type == field.TYPE_STRING:
            value = draw(st.sampled_from(_TEXTS))
        elif field.type == field.TYPE_ENUM:
            value = draw(st.sampled_from([v.number for v in field.enum_type.values]))
        elif field.type == field.TYPE_FLOAT:
            value = draw(st.sampled_from([0.0, -1.0, 1e38, math.inf, math.nan]))
        elif field.type == field.TYPE_BOOL:
            value = draw(st.booleans())
        else:
            value = max(0, draw(st.sampled_from(_NUMBERS)))
            value = value if "uint" in str(field.type) else draw(st.sampled_from(_NUMBERS))
        setattr(message, field.name, value)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("how", ["bytes", "fields"])
def test_sentencepiece_model(how: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    train_tokenizer(TEXTS, 300, file)
    valid = file.read_bytes()

    def parse(content: bytes) -> None:
        file.write_bytes(content)
        use(load_tokenizer(file))
        convert_sentencepiece(file)

    inputs = damaged_bytes(valid) if how == "bytes" else changed_models(valid)
    fuzz(parse, inputs, tmp_path, valid=valid, share=0.3)
