"""Tests of GGUF files from unknown authors."""

import dataclasses

import jax
import pytest

pytest.importorskip("gguf", reason="needs the extra 'export': gguf")

import gguf

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.opening import copy_tokenizer, load_tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.export.gguf.header import check_header
from mobilellm_jax.export.gguf.writer import write
from mobilellm_jax.export.runtime import ArtifactInfo
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.transformer import init_params
from tests.data.example_tokenizers import write_folder

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
INFO = ArtifactInfo(
    format="gguf", file="model.gguf", precision="q8_0", model=CONFIG, loss=None, origin="a test"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer(["the quick brown fox"] * 9, 290, folder / "tokenizer.model")
    params = init_params(CONFIG, jax.random.key(0))
    write(OpenedModel(CONFIG, params, tokenizer, "a test"), folder, "q8_0")
    return folder


@pytest.fixture(scope="module")
def written(folder) -> bytes:
    return (folder / "model.gguf").read_bytes()


@pytest.fixture
def check(folder):
    """Returns a function that checks a file with the given bytes next to the tokenizer."""

    def run(content: bytes, info: ArtifactInfo = INFO):
        file = folder / "changed.gguf"
        file.write_bytes(content)
        check_header(file, info)

    return run


@pytest.mark.parametrize(
    ("around", "named", "bos", "adds"),
    [
        ("$A", {"bos_token": None}, None, False),
        ("$A", {"bos_token": "<s>"}, 0, False),
        ("<s> $A", {"bos_token": "<s>"}, 0, True),
    ],
)
def test_the_header_says_what_the_tokenizer_puts_before_a_text(around, named, bos, adds, tmp_path):
    source = write_folder(tmp_path / "theirs", named | {"eos_token": "</s>"}, around)
    (tmp_path / "run").mkdir()
    copy_tokenizer(load_tokenizer(source), tmp_path / "run")
    params = init_params(CONFIG, jax.random.key(0))
    source = OpenedModel(CONFIG, params, load_tokenizer(tmp_path / "run"), "a test")
    write(source, tmp_path, "float32")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields

    def value(name: str):
        field = fields.get(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    assert (value("bos_token_id"), value("add_bos_token")) == (bos, adds)
    assert (value("eos_token_id"), value("add_eos_token")) == (1, False)


def number(value: int, length: int = 4) -> bytes:
    return value.to_bytes(length, "little")


def text(value: str) -> bytes:
    return number(len(value), 8) + value.encode()


def test_an_export_is_accepted_whatever_its_weights_are(written, check):
    check(written)
    check(written[:-40] + bytes(40))


@pytest.mark.parametrize(
    ("found", "replaced"),
    [
        (b"GGUF", b"GGML"),
        (b"GGUF" + number(3), b"GGUF" + number(2)),
        (text("llama"), text("gpt-x")),
        (b"general.name", b"general.nam3"),
        (b"feed_forward_length" + number(4) + number(64),
         b"feed_forward_length" + number(5) + number(64)),
        (b"length" + number(4) + number(64), b"length" + number(4) + number(0)),
        (b"block_count" + number(4) + number(2), b"block_count" + number(4) + number(99)),
        (text("</s>"), text("</s\0")),
        (text("</s>"), number(4, 8) + b"\xff/s>"),
        (text("</s>"), text("<0x41>")),
        (text("</s>"), number(1 << 40, 8) + b"</s>"),
        (b"eos_token_id" + number(4) + number(2), b"eos_token_id" + number(4) + number(300)),
        (text("blk.1.ffn_norm.weight"), text("blk.0.ffn_norm.weight")),
        (number(300, 8) + number(8), number(300, 8) + number(99)),
        (number(300, 8) + number(8) + number(0, 8), number(300, 8) + number(8) + number(32, 8)),
    ],
)  # fmt: skip
def test_another_header_is_refused(written, check, found, replaced):
    assert found in written
    with pytest.raises(ValueError, match="is not the model of 300 tokens .* other bytes"):
        check(written.replace(found, replaced, 1))


def test_every_changed_byte_in_front_of_the_weights_is_found(written, check):
    end = written.index(b"blk.1.ffn_down.weight") + 60
    for place in range(0, end, 17):
        content = bytearray(written)
        content[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match="other bytes"):
            check(bytes(content))


def test_a_file_that_is_cut_off_or_goes_on(written, check):
    header = written.index(b"blk.1.ffn_down.weight")
    for length in (0, 3, *range(4, header, 997)):
        with pytest.raises(ValueError, match="other bytes"):
            check(written[:length])
    for content in (written[:-1], written + b"\0"):
        size, whole = f"{len(content):,}", f"{len(written):,}"
        with pytest.raises(ValueError, match=f"has {size} bytes instead of {whole}"):
            check(content)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_seq_len": 4096}, "300 tokens and sequences of 4,096 .* other bytes"),
        ({"num_blocks": 1}, "other bytes"),
        ({"activation": "relu"}, "has two matrices in the feed-forward"),
    ],
)
def test_a_manifest_of_another_model_is_refused(written, check, fields, message):
    model = dataclasses.replace(CONFIG, **fields)
    with pytest.raises(ValueError, match=message):
        check(written, dataclasses.replace(INFO, model=model))


def test_a_manifest_of_another_precision_is_refused(written, check):
    with pytest.raises(ValueError, match="other bytes"):
        check(written, dataclasses.replace(INFO, precision="float16"))
