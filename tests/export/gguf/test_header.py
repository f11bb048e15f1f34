"""Tests of GGUF files from unknown authors."""

import random
import re
from pathlib import Path

import jax
import pytest

pytest.importorskip("gguf", reason="needs the extra 'export': gguf")

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.export.gguf.header import check_header
from mobilellm_jax.export.gguf.writer import write
from mobilellm_jax.export.source import Source
from mobilellm_jax.model.transformer import init_params

CONFIG = ModelConfig(
    vocab_size=300,
    embed_dim=32,
    num_blocks=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    ffn_dim=64,
    max_seq_len=40,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer(["the quick brown fox"] * 9, 290, folder / "tokenizer.model")
    params = init_params(CONFIG, jax.random.key(0))
    write(Source(CONFIG, params, tokenizer, "a test"), folder, "q8_0")
    return (folder / "model.gguf").read_bytes()


@pytest.fixture
def check(tmp_path):
    """Returns a function that checks a file with the given bytes."""

    def run(content: bytes):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        return check_header(file)

    return run


def number(value: int, length: int = 4) -> bytes:
    return value.to_bytes(length, "little")


def text(value: str) -> bytes:
    return number(len(value), 8) + value.encode()


def test_what_an_export_says(written, check):
    assert check(written) == (300, 40)


@pytest.mark.parametrize(
    ("found", "replaced", "message"),
    [
        (b"GGUF", b"GGML", "is no GGUF file: it does not begin with GGUF"),
        (b"GGUF" + number(3), b"GGUF" + number(2), "version 2, and must have 3"),
        (text("llama"), text("gpt-x"), "architecture=gpt-x must be llama"),
        (b"general.name", b"general.nam3", "'general.nam3' is not one of an export"),
        (b"general.name", b"general.type", "'general.type' is not .*, or there twice"),
        (
            b"feed_forward_length" + number(4) + number(64),
            b"feed_forward_length" + number(5) + number(64),
            "feed_forward_length has another type",
        ),
        (b"length" + number(4) + number(64), b"length" + number(4) + number(0), "=0 must be"),
        (b"length" + number(4) + number(64), b"length" + number(4) + number(96), "ffn_gate.weight"),
        (b"block_count" + number(4) + number(2), b"block_count" + number(4) + number(99), "99"),
        (b"block_count" + number(4) + number(2), b"block_count" + number(4) + number(1), "blk.1"),
        (b"head_count" + number(4) + number(2), b"head_count" + number(4) + number(3), "attn_q"),
        (b"dimension_count" + number(4) + number(16), b"dimension_count" + number(4) + number(15),
         "=15 must be even"),
        (b"dimension_count" + number(4) + number(16), b"dimension_count" + number(4) + number(14),
         "key_length=16 must be 14"),
        (text("</s>"), text("</s\0"), "has a zero in it"),
        (text("</s>"), number(4, 8) + b"\xff/s>", "is not UTF-8"),
        (text("</s>"), text("<0x41>"), "there twice"),
        (text("</s>"), number(1 << 40, 8) + b"</s>", "would have 1,099,511,627,776 bytes"),
        (b"eos_token_id" + number(4) + number(2), b"eos_token_id" + number(4) + number(300),
         "eos_token_id=300 must be less than 300"),
        (text("blk.1.ffn_norm.weight"), text("blk.0.ffn_norm.weight"), "is not one of its model"),
        (number(32, 8) + number(0), number(32, 8) + number(8), "cannot have the type 8"),
        (number(300, 8) + number(8), number(300, 8) + number(99), "has the type 99"),
        (number(300, 8) + number(8) + number(0, 8), number(300, 8) + number(8) + number(32, 8),
         "is at 32, and must be at 0"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(written, check, found, replaced, message):
    assert found in written
    with pytest.raises(ValueError, match=message):
        check(written.replace(found, replaced, 1))


def test_a_file_that_is_cut_off_or_goes_on(written, check):
    header = written.index(b"blk.1.ffn_down.weight")
    for length in (0, 3):
        with pytest.raises(ValueError, match="is no GGUF file"):
            check(written[:length])
    for length in range(4, header, 97):
        with pytest.raises(ValueError, match=f"ends at byte {length:,}, within its header"):
            check(written[:length])
    for content in (written[:-1], written + b"\0"):
        size, whole = f"{len(content):,}", f"{len(written):,}"
        with pytest.raises(ValueError, match=f"has {size} bytes, and must have {whole}"):
            check(content)


def test_whatever_is_changed_it_is_read_or_refused(written, check):
    rng = random.Random(1)
    end = written.index(b"blk.1.ffn_down.weight") + 60
    refused = 0
    for _ in range(400):
        content = bytearray(written)
        for _ in range(rng.choice((1, 1, 4))):
            place = rng.randrange(end)
            new = rng.choice((b"\xff" * 8, b"\0" * 4, rng.randbytes(1), number(1 << 31)))
            content[place : place + len(new)] = new
        try:
            check(bytes(content))
        except ValueError as error:
            refused += 1
            assert re.search(r"model\.gguf is (no GGUF file|damaged)", str(error))
    assert refused > 100


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        check_header(Path(tmp_path / "nothing.gguf"))
