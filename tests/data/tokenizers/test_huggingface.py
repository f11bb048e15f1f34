import json
import re
from pathlib import Path

import pytest
import tokenizers

from mobilellm_jax.data.tokenizers import huggingface as huggingface_tokenizer
from mobilellm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from mobilellm_jax.data.tokenizers.opening import copy_tokenizer, load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, changes_text
from tests.data.example_tokenizers import TEXTS


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


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_unknown_characters_are_refused(kind: str, tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "a", "b", " "]
    if kind == "BPE":
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    else:
        model = tokenizers.Tokenizer(tokenizers.models.Unigram([(p, -1.0) for p in pieces], 0))
    model.add_special_tokens(pieces[:3])
    model.decoder = tokenizers.decoders.Fuse()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab ba") == [3, 4, 5, 4, 3]
    with pytest.raises(ValueError, match="has no token for 'é', so the text would be lost"):
        tokenizer.encode("ab é b")


def test_a_character_that_the_library_would_drop_is_named(tmp_path: Path) -> None:
    pieces = ["<s>", "</s>", *"\t\n\r abé\ufb01\uff21"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model.normalizer = tokenizers.normalizers.NFC()
    model.add_special_tokens(pieces[:2])
    model.decoder = tokenizers.decoders.Fuse()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    # The mark alone has no token, but the normalizer joins it with its letter.
    assert tokenizer.encode("ae\u0301b") == tokenizer.encode("aéb") == [6, 8, 7]
    assert changes_text(tokenizer)
    with pytest.raises(ValueError, match="has no token for '日', so the text would be lost"):
        tokenizer.encode("ab日b本")


def test_a_byte_level_tokenizer_without_some_bytes_names_the_character(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False)
    model.train_from_iterator(["the lazy dog and the café"], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a café")) == "a café"
    for text, lost in (("the 7 dogs", "7"), ("a\n", "\\n"), ("day 日", "日"), ("día", "í")):
        with pytest.raises(ValueError, match=f"has no token for '{re.escape(lost)}'"):
            tokenizer.encode(text)


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


def test_a_file_on_which_the_library_panics_is_refused(
    byte_level: Tokenizer, tmp_path: Path
) -> None:
    parsed = json.loads(byte_level.file.read_text())
    parsed["model"]["continuing_subword_prefix"] = "longer than any token"
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(parsed))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the `tokenizers` library says: range"):
        load_tokenizer(file)


def test_an_interruption_is_no_refusal() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        huggingface_tokenizer._refused(interrupted)
