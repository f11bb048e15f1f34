import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, changes_text
from tests.data.example_tokenizers import TEXTS

KINDS = ["trained", "byte_level"]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_become_one_array(kind: str, dtype: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    texts = ["", *TEXTS, "a \u2581 b\u2581", "", "日本"]
    ids, starts = tokenizer.encode_documents(texts, np.dtype(dtype))
    expected: list[int] = []
    expected_starts = []
    for text in texts:
        expected_starts.append(len(expected))
        expected += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert (ids.dtype, starts.dtype) == (np.dtype(dtype), np.int64)
    assert ids.tolist() == expected
    assert starts.tolist() == expected_starts


@pytest.mark.parametrize("kind", KINDS)
def test_no_documents(kind: str, request: pytest.FixtureRequest) -> None:
    ids, starts = request.getfixturevalue(kind).encode_documents([], np.dtype("<u2"))
    assert (ids.shape, ids.dtype, starts.shape) == ((0,), np.uint16, (0,))


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_document_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match="Character 1 of the text is a lone surrogate"):
        request.getfixturevalue(kind).encode_documents(["good", "b\udc80d"], np.dtype("<u2"))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_the_type_cannot_hold_are_not_cut(
    kind: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(AssertionError, match="uint8 cannot hold ids below"):
        request.getfixturevalue(kind).encode_documents(["a"], np.dtype("u1"))


def test_ours_does_not_normalise(trained: Tokenizer, byte_level: Tokenizer) -> None:
    assert not changes_text(trained)
    assert not changes_text(byte_level)


def test_files_that_are_no_tokenizer(tmp_path: Path, trained: Tokenizer) -> None:
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)

    refused("tokenizer.model", b"\x00garbage", "is not a SentencePiece model")
    refused("tokenizer.model", b"", "is not a SentencePiece model")
    refused("tokenizer.json", b"{", "is not JSON")
    refused("tokenizer.json", b'{"bos_token": "<s>"}', "is not a tokenizer.json")
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


def test_a_library_is_imported_for_its_own_files(trained: Tokenizer, byte_level: Tokenizer) -> None:
    for file, other in ((trained.file, "tokenizers"), (byte_level.file, "sentencepiece")):
        script = (
            "import sys, pathlib;"
            "from mobilellm_jax.data.tokenizers.opening import load_tokenizer;"
            "before = {'jax', 'tokenizers', 'sentencepiece'} & sys.modules.keys();"
            f"load_tokenizer(pathlib.Path({str(file)!r}));"
            f"print(before, {{'jax', {other!r}}} & sys.modules.keys())"
        )
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert result.stdout == "set() set()\n"
