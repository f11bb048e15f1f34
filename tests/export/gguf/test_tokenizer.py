"""Compares llama.cpp's ids and texts with SentencePiece's and the tokenizers library's."""

import ctypes
import io
import json
import random
from pathlib import Path

import jax
import pytest

pytest.importorskip("gguf", reason="needs the extra 'export': gguf")
pytest.importorskip("llama_cpp", reason="needs the extra 'export': llama-cpp-python")

import sentencepiece
import tokenizers
from llama_cpp import llama_cpp as _c
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.export.gguf.runtime import LlamaCppVocabulary
from mobilellm_jax.export.gguf.tokenizer import vocabulary_of
from mobilellm_jax.export.gguf.writer import write
from mobilellm_jax.export.huggingface.tokenizer_files import PROBES
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.transformer import init_params

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind; it's 12,345 o'clock.",
    "def f(x):\n    return x + 1  # one more",
    "<p>It was</p> the best of times,\n\n it was <s>the worst</s> of times; straße, naïve, 日本.",
    "aaaa aaa aa a        ====== ------ ababab 2024 1999 <s>x</s> <s>y</s> <unk>",
] * 5
HOSTILE = [
    *(text for text in PROBES if "\u2581" not in text),
    *("   ", "   a", "a     b", "\n\n\n", "\n ", "\x00\x00", "\x1b[0m", "\u00a0", "\ue000"),
    *(
        "<s><s>",
        " <s> ",
        "<s>a</s>",
        "<unk> <unk>",
        "<0x41>",
        "<|x|>",
        "<<s>>",
        "</",
        "s>",
        "[PAD3]",
    ),
    *("I'LL we'Re 'S 'tis", "12345 1 23 456", "a\u3000b", "\u0301a", "\U0001f468\u200d\U0001f469"),
    TEXTS[0] * 40,
]


def sentencepiece_file(folder: Path, texts=TEXTS, **changes) -> Path:
    options = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    } | changes
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **options
    )
    file = folder / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


def byte_level_file(folder: Path, *steps, **changes) -> Path:
    fast = tokenizers.Tokenizer(models.BPE(**changes))
    fast.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS, trainer)
    file = folder / "tokenizer.json"
    fast.save(str(file))
    return file


@pytest.fixture
def in_llama_cpp(tiny_config, tmp_path):
    """Returns a function that writes a tokenizer into a file and opens both."""

    def opened(file: Path):
        tokenizer = load_tokenizer(file)
        config = tiny_config(vocab_size=tokenizer.vocab_size + 3, num_blocks=1)
        params = init_params(config, jax.random.key(0))
        folder = tmp_path / "written"
        folder.mkdir()
        write(OpenedModel(config, params, tokenizer, "a test"), folder, "float32")
        return tokenizer, LlamaCppVocabulary(folder / "model.gguf")

    return opened


def decoded(vocabulary: LlamaCppVocabulary, ids: list[int]) -> str:
    """Returns the text of tokens as an app streams it, without BOS and EOS.

    The text keeps the space that a tokenizer adds at its start. llama.cpp's function for whole
    texts would also drop spaces before commas and full stops of byte-level BPE.
    """
    pieces = []
    for token in ids:
        text = ctypes.create_string_buffer(256)
        count = _c.llama_token_to_piece(vocabulary.pointer, token, text, len(text), 0, False)
        assert count >= 0, "a longer token than these tests make"
        pieces.append(text.raw[:count])
    return b"".join(pieces).decode(errors="replace")


def random_texts(count: int):
    rng = random.Random(5)
    alphabet = [*"ab <>/sunkx=-1290'\n\t.,日ïß\U0001f642\x00", "th", "  ", "</s>", "<s>", "the "]
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece_ids(tmp_path, in_llama_cpp, dummy_prefix):
    file = sentencepiece_file(tmp_path, add_dummy_prefix=dummy_prefix)
    _, vocabulary = in_llama_cpp(file)
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in [*HOSTILE, *random_texts(2000)]:
        ids = model.encode(text)
        assert vocabulary.encode(text) == [model.bos_id(), *ids], text
        assert decoded(vocabulary, ids) == " " * (dummy_prefix and bool(text)) + text


def test_a_text_with_a_control_token_in_it_stays_text(tmp_path, in_llama_cpp):
    # "</" and "s>" are pieces in this vocabulary and would merge to the token EOS.
    texts = ["</b x</i y</p 1</q", "as> bs> xs> 1s>"] * 9
    file = sentencepiece_file(tmp_path, texts, split_by_unicode_script=False)
    tokenizer, vocabulary = in_llama_cpp(file)
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = {model.id_to_piece(i) for i in range(model.get_piece_size())}
    assert any({"</s>"[:cut], "</s>"[cut:]} <= pieces for cut in (1, 2, 3))
    assert vocabulary_of(tokenizer, 500).tokens[model.eos_id()] != "</s>"
    assert model.eos_id() not in vocabulary.encode("a</s>b")


@pytest.mark.parametrize(
    ("pre", "steps", "changes"),
    [
        ("gpt-2", [{"type": "ByteLevel"}], {}),
        ("smollm", [{"type": "Digits"}, {"type": "ByteLevel"}], {}),
        ("llama-bpe", [{"digits": "{1,3}"}, {"type": "Bytes"}], {"ignore_merges": True}),
        ("qwen2", [{"digits": ""}, {"type": "Bytes"}], {}),
    ],
)
def test_byte_level_ids(tmp_path, in_llama_cpp, pre, steps, changes):
    # Meta and Alibaba publish these expressions in their tokenizer.json files.
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made = {
        "ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "Bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "Digits": pre_tokenizers.Digits(individual_digits=True),
    }
    built = [
        made[step["type"]]
        if "type" in step
        else pre_tokenizers.Split(
            tokenizers.Regex(words.replace("DIGITS", step["digits"])), behavior="isolated"
        )
        for step in steps
    ]
    file = byte_level_file(tmp_path, *built, **changes)
    tokenizer, vocabulary = in_llama_cpp(file)
    assert vocabulary_of(tokenizer, 500).pre == pre
    for text in [*HOSTILE, *random_texts(1000)]:
        ids = tokenizer.encode(text)
        assert vocabulary.encode(text) == [tokenizer.bos_id, *ids], text
        assert decoded(vocabulary, ids) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram", "byte_fallback": True}, "model_type=unigram must be bpe"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalisation 'nmt_nfkc' must be identity"),
        ({"byte_fallback": False, "character_coverage": 1.0}, "byte_fallback must be true"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces must be false"),
        ({"user_defined_symbols": ["<x>"]}, "user-defined pieces such as '<x>'"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path, changes, message):
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path, **changes))
    with pytest.raises(ValueError, match=f"cannot be written into a GGUF file.*{message}"):
        vocabulary_of(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("", {"normalizer": {"type": "NFC"}}, "must have no normalizer"),
        ("", {"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer must be byte-level"),
        ("", {"pre_tokenizer": None}, "pre_tokenizer must be byte-level"),
        ("pre_tokenizer", {"add_prefix_space": True}, "add_prefix_space must be false"),
        ("model", {"ignore_merges": True}, "ignore_merges must be false, as gpt-2's is"),
        ("model", {"end_of_word_suffix": "</w>"}, "end_of_word_suffix='</w>' must not be set"),
    ],
)
def test_other_tokenizer_json_files_are_refused(tmp_path, part, changes, message):
    file = byte_level_file(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    content = json.loads(file.read_text())
    content.setdefault("normalizer", normalizers.NFC.__name__)
    (content[part] if part else content).update(changes)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"cannot be written into a GGUF file.*{message}"):
        vocabulary_of(load_tokenizer(file), 500)
