"""Compares transformers' ids and texts with SentencePiece's."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from mobilellm_jax.data.tokenizers.opening import copy_tokenizer, load_tokenizer
from mobilellm_jax.export.huggingface.tokenizer_files import (
    convert_sentencepiece,
    write_tokenizer_files,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def f(x):\n    return x + 1  # one more",
    "It was the best of times, it was the worst of times; straße, naïve, 日本.",
    "aaaa aaa aa a        ====== ------ ababab",
] * 5
HOSTILE = [
    *("", " ", "  ", "   ", "a", " a", "  a", "   a", "a ", "a  ", " a ", "a b", "a  b", "a     b"),
    *("\n", "\n\n\n", " \n", "\n ", "a\nb", "a\r\nb", "\t", "\t\t", "a\tb", "    return x\n\n"),
    *("\x00", "a\x00b", "\x00\x00", "\x01", "\x1b[0m", "\x7f", "\ufeffa", "\u00a0", "\u200b"),
    *("<s>", "</s>", "<unk>", "a<s>b", "<s>a</s>", " <s> ", "<s><s>", "<0x0A>", "<0x41>", "<|x|>"),
    *(
        "🙂",
        "🙂🙂",
        " 🙂 ",
        "👩\u200d👧",
        "日本語",
        "straße",
        "e\u0301",
        "\uff21\ufb01",
        "مرحبا بك",
    ),
    *("\u2028", "\U0010ffff", "\ue000", "\u2581", "a\u2581b", "\u2581\u2581a", "\u2581 \u2581 a"),
    *(
        "aaaaaaaaaaaaaaaaaaaaa",
        "ababababa",
        "=========",
        "a=b==c===d",
        "123 456",
        "1.5e-3",
        "don't",
    ),
    *("THE The the", "https://a.b/c?d=e&f#g", TEXTS[0] * 40),
]


def train(folder, texts=TEXTS, **changes):
    options = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **(options | changes)
    )
    file = folder / "source.model"
    file.write_bytes(model.getvalue())
    return file


def assert_equal_to_sentencepiece(file, fast, texts):
    """`fast` maps a list of texts to ids, or decodes one row of ids."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text, ids in zip(texts, fast(texts)["input_ids"], strict=True):
        assert ids == [model.bos_id(), *model.encode(text)], repr(text)
        assert fast.decode(ids, skip_special_tokens=True) == model.decode(ids), repr(text)


def test_ids_and_texts_are_sentencepieces(tmp_path):
    assert len(HOSTILE) == len(set(HOSTILE)) >= 50
    file = train(tmp_path)
    (tmp_path / "out").mkdir()
    write_tokenizer_files(load_tokenizer(file), tmp_path / "out", 512)
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    rng = random.Random(0)
    parts = [
        "a",
        "b",
        " ",
        "  ",
        "\n",
        "=",
        "-",
        "the",
        "<s>",
        "é",
        "🙂",
        "\x00",
        "ab",
        "1",
        "\u2581",
    ]
    fuzz = ["".join(rng.choices(parts, k=rng.randint(1, 40))) for _ in range(2000)]
    assert_equal_to_sentencepiece(file, fast, HOSTILE + fuzz)
    one_by_one = [fast(text)["input_ids"] for text in HOSTILE]
    assert one_by_one == fast(HOSTILE)["input_ids"]
    assert (fast.bos_token_id, fast.eos_token_id, fast.unk_token_id) == (1, 2, 0)
    assert fast.model_max_length == 512
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == file.read_bytes()


def test_ids_are_the_same_after_transformers_saved_it(tmp_path):
    file = train(tmp_path)
    for name in ("out", "again"):
        (tmp_path / name).mkdir()
    write_tokenizer_files(load_tokenizer(file), tmp_path / "out", 512)
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert_equal_to_sentencepiece(file, AutoTokenizer.from_pretrained(tmp_path / "again"), HOSTILE)


def test_pair_has_a_bos_each(tmp_path):
    (tmp_path / "out").mkdir()
    write_tokenizer_files(load_tokenizer(train(tmp_path)), tmp_path / "out", 512)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    first, second = fast.encode("The dog").ids, fast.encode("and").ids
    assert fast.encode("The dog", "and").ids == first + second
    assert first[0] == second[0] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False, "vocab_size": 120},
        {"split_by_whitespace": False},
        {"bos_id": 5, "eos_id": 6, "bos_piece": "<bos>", "eos_piece": "<eos>", "pad_id": 7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_of_sentencepiece(changes, tmp_path):
    file = train(tmp_path, **changes)
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    fast = convert_sentencepiece(file)
    fast.encode_special_tokens = True
    for text in HOSTILE:
        ids = fast.encode(text).ids
        assert ids == model.encode(text), repr(text)
        if model.unk_id() not in ids:  # SentencePiece writes " ?? " for an unknown token
            assert fast.decode(ids) == model.decode(ids), repr(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "model_type=unigram must be bpe"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalisation 'nmt_nfkc' must be identity"),
        ({"user_defined_symbols": "<call>"}, "1 user-defined pieces such as '<call>'"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix must be false"),
    ],
)
def test_what_tokenizer_json_cannot_express_is_refused(changes, message, tmp_path):
    file = train(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"source.model cannot be written.*{message}.*prepare"):
        convert_sentencepiece(file)


def test_a_difference_found_by_the_probes_is_refused(tmp_path, monkeypatch):
    file = train(tmp_path)
    monkeypatch.setattr(
        "mobilellm_jax.export.huggingface.tokenizer_files._merges", lambda proto: []
    )
    with pytest.raises(ValueError, match=r"'.+' is \[.*\] in SentencePiece, but would be \["):
        convert_sentencepiece(file)


@pytest.fixture
def byte_level_file(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder = tmp_path / "source"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_tokenizer_json_is_copied_and_gets_a_config(byte_level_file, tmp_path):
    (tmp_path / "out").mkdir()
    ours = load_tokenizer(byte_level_file)
    write_tokenizer_files(ours, tmp_path / "out", 512)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in HOSTILE:
        ids = theirs(text)["input_ids"]
        assert ids == [ours.bos_id, *ours.encode(text)], repr(text)  # as the model was trained
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_config_of_a_tokenizer_json_goes_along_unchanged(byte_level_file, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>", "eos_token": "<s>"}
    given = byte_level_file.with_name("tokenizer_config.json")
    given.write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    write_tokenizer_files(load_tokenizer(byte_level_file), tmp_path / "out", 512)
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == given.read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "</s>"


def test_the_files_of_a_tokenizer_that_frames_texts_go_along_unchanged(byte_level_file, tmp_path):
    source = byte_level_file.parent
    model = tokenizers.Tokenizer.from_file(str(byte_level_file))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    model.save(str(byte_level_file))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    (source / "chat_template.jinja").write_text("{{ messages }}!")
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
    copy_tokenizer(load_tokenizer(source), tmp_path / "run")
    write_tokenizer_files(load_tokenizer(tmp_path / "run"), tmp_path / "out", 512)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_chat_template_goes_along_with_a_sentencepiece_model(tmp_path):
    file = train(tmp_path)
    config = {"add_bos_token": False, "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    write_tokenizer_files(load_tokenizer(file), tmp_path / "out", 512)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == "{{ messages }}"
    assert theirs("The dog")["input_ids"] == load_tokenizer(file).encode("The dog")
