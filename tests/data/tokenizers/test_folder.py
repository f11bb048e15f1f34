"""Folders as transformers and its users write them; transformers says what is right."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.shards import open_tokens
from mobilellm_jax.data.tokenizers.opening import copy_tokenizer, load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, prompt_ids, text_ids
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from tests.data.example_tokenizers import TEXTS, write_folder

PROBES = ["heron 12", " two  spaces\n", "日本 🙂", "don't"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def copied(folder: Path, to: Path) -> Tokenizer:
    """Opens a folder and copies it as a run does; returns the tokenizer of the copy."""
    to.mkdir()
    copy_tokenizer(load_tokenizer(folder), to)
    return load_tokenizer(to)


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
def test_the_ids_of_a_folder_are_those_of_transformers(
    around: str, add_bos_token: bool | None, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "theirs", NAMED | {"add_bos_token": add_bos_token}, around)
    theirs = AutoTokenizer.from_pretrained(folder)
    for ours in (load_tokenizer(folder), copied(folder, tmp_path / "copy")):
        after = list(ours.convention.after)
        for text in PROBES:
            assert text_ids(ours, text) + after == theirs(text).input_ids
            assert ours.decode(ours.encode(text)) == text


def test_a_bare_tokenizer_json_is_of_a_model_made_here(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path / "bare"))
    assert text_ids(tokenizer, "a") == [0, *tokenizer.encode("a")]
    assert prompt_ids(tokenizer, "") == [0]


def test_folders_of_older_versions_keep_bos(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "old", NAMED)
    assert text_ids(load_tokenizer(folder), "a") == load_tokenizer(folder).encode("a")
    assert text_ids(load_tokenizer(folder, ours=True), "a")[0] == 0
    (folder / "config.json").write_text(json.dumps({"model": {}, "train": {}}))  # a run folder
    assert load_tokenizer(folder).convention.before == (0,)
    assert copied(folder, tmp_path / "copy").convention.before == (0,)


def test_prepare_stores_documents_as_the_tokenizer_frames_texts(tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    for around, framed in (("$A", [1]), ("<s> $A", [1, 0])):
        folder = write_folder(tmp_path / f"theirs{len(framed)}", NAMED, around)
        output = tmp_path / f"tokens{len(framed)}"
        prepare([f"jsonl:{tmp_path}/docs.jsonl"], output, tokenizer=folder, workers=1)
        dataset = open_tokens(output)
        stream = dataset.splits["train"]
        tokens = stream.read(0, stream.tokens).tolist()
        assert tokens.count(1) == stream.documents
        assert tokens.count(0) == stream.documents * (len(framed) - 1)
        assert load_tokenizer(dataset.tokenizer).convention.before == tuple(framed[1:])


def test_one_separator_if_bos_is_eos(tmp_path: Path) -> None:
    named = {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    for around in ("$A", "<|end|> $A"):
        folder = write_folder(tmp_path / around, named, around, ("<|end|>",))
        tokenizer = load_tokenizer(folder)
        ids, starts = tokenizer.encode_documents(["one", "two"], np.dtype("<u2"))
        assert ids.tolist() == [*tokenizer.encode("one"), 0, *tokenizer.encode("two"), 0]
        assert starts.tolist() == [0, len(tokenizer.encode("one")) + 1]
        assert prompt_ids(tokenizer, "") == [0]


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "qwen", {"bos_token": None, "eos_token": "</s>"})
    tokenizer = copied(folder, tmp_path / "copy")
    assert (tokenizer.has_bos, tokenizer.convention.before) == (False, ())
    assert prompt_ids(tokenizer, "") == [1]


def test_tokenizer_json_is_preferred_and_ids_past_its_end_are_no_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "both", NAMED, special=("<s>", "</s>", "<|im_end|>"))
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format
    tokenizer = load_tokenizer(folder)
    assert tokenizer.file.name == "tokenizer.json"
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size, 5000]) == "ab"


def test_ids_past_the_end_of_a_sentencepiece_model_are_no_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 320, tmp_path / "tokenizer.model")
    assert tokenizer.decode([*tokenizer.encode("ab"), 320, 5000]) == "ab"


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_add_bos_token_decides_for_a_sentencepiece_model(
    add_bos_token: bool, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    train_tokenizer(TEXTS, 320, theirs / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos_token, "bos_token": ""}
    (theirs / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = copied(theirs, tmp_path / "copy")
    assert tokenizer.convention.before == (tokenizer.bos_id,) * add_bos_token
    ids, _ = tokenizer.encode_documents(["a"], np.dtype("<u2"))
    assert ids.tolist() == [*text_ids(tokenizer, "a"), tokenizer.eos_id]


def test_every_eos_of_the_model_ends_a_text(tmp_path: Path) -> None:
    special = ("<s>", "</s>", "<|turn|>")
    folder = write_folder(
        tmp_path / "theirs", NAMED, special=special, generation_config={"eos_token_id": [1, 2]}
    )
    assert copied(folder, tmp_path / "copy").convention.end_ids == (1, 2)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    # The config.json of the model is not copied, so the copy records its EOS.
    assert copied(folder, tmp_path / "second").convention.end_ids == (2,)


def test_tokens_that_only_a_companion_adds(tmp_path: Path) -> None:
    decoder = {"300": {"content": "<|im_end|>", "special": True}}
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    folder = write_folder(tmp_path / "theirs", config)
    tokenizer = copied(folder, tmp_path / "copy")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (theirs.eos_token_id, len(theirs))
    decoder["400"] = {"content": "<|far|>", "special": True}
    write_folder(tmp_path / "theirs", config)
    with pytest.raises(ValueError, match=r"'<\|far\|>' has the id 400, but it would get 301"):
        load_tokenizer(folder)


def test_what_the_folder_says_is_part_of_the_identity(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "theirs", NAMED)
    seen = {load_tokenizer(folder).sha256}
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(load_tokenizer(folder).sha256)
    copy = copied(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert copy.sha256 == load_tokenizer(folder).sha256
    write_folder(folder, {"bos_token": "<s>", "eos_token": "<s>"})
    seen.add(load_tokenizer(folder).sha256)
    assert len(seen) == 3
