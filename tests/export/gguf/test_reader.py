"""Compares imported GGUF files with the models that wrote them, and with transformers' reader."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs the extra 'gguf'")

import gguf
import torch
from transformers import AutoModelForCausalLM

from mobilellm_jax import open_model
from mobilellm_jax.cli import main as cli
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.export.gguf import writer
from mobilellm_jax.export.gguf.container import Container
from mobilellm_jax.export.gguf.reader import read_gguf
from mobilellm_jax.export.huggingface.tokenizer_files import PROBES
from mobilellm_jax.model.opened import OpenedModel

SHAPES = {
    "tied, grouped": {},
    "untied, wide heads": {"tie_embeddings": False, "head_dim": 24, "num_kv_heads": 1},
    "padded vocabulary": {"vocab_size": 333},
    "rope linear": {"rope_scaling": "linear", "rope_factor": 4.0, "rope_theta": 500.0},
    "rope llama3": {
        **{"rope_scaling": "llama3", "rope_factor": 8.0, "rope_theta": 100.0},
        "rope_original_len": 64,
    },
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def no_llama_cpp(monkeypatch):
    """Leaves out the comparison with llama.cpp, which tests of the writer make."""
    monkeypatch.setattr(writer, "_check_in_llama_cpp", lambda file, tokenizer: None)


@pytest.fixture
def export(make_model, tokenizer, tmp_path):
    """Returns a function that writes a GGUF file and returns its model and the file."""

    def run(precision="float32", of=tokenizer, **fields):
        config, params, tokens_BT, logits_BTV = make_model(5.0, **fields)
        writer.write(OpenedModel(config, params, of, "a test"), tmp_path, precision)
        return config, params, tokens_BT, logits_BTV, tmp_path / writer.FILE

    return run


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_an_exported_model_comes_back_with_all_its_bits(fields, export, files, tokenizer):
    config, params, *_, file = export(**fields)
    found = read_gguf(file, files)
    for name, value in vars(found.config).items():
        expected = getattr(config, name)
        if name != "compute_dtype":
            assert value == (pytest.approx(expected) if type(expected) is float else expected), name
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    for text in PROBES:
        assert found.tokenizer.encode(text) == tokenizer.encode(text), text
    assert found.tokenizer.vocab_size == tokenizer.vocab_size
    assert (found.tokenizer.bos_id, found.tokenizer.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("precision", ["q4_1", "q8_0", "float16"])
def test_transformers_reads_the_same_model_from_the_file(precision, export, files, make_model):
    _, _, tokens_BT, _, file = export(precision)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected_BTV = theirs(torch.from_numpy(tokens_BT).long()).logits.numpy()
    found = read_gguf(file, files)
    assert found.dtype == {"float16": "float16"}.get(precision, "float32")
    logits_BTV = make_model.logits(found.config)(found.params, tokens_BT)
    largest = np.abs(expected_BTV).max()
    assert largest > 1
    assert np.abs(logits_BTV - expected_BTV).max() <= 1e-4 * largest


def small_file(file, *, tensors=(), **metadata):
    """Writes a GGUF file with some metadata of each kind; returns the metadata that it has."""
    out = gguf.GGUFWriter(file, "llama")
    values = {"a": 1, "b": -2.5, "c": "text", "d": True, "e": [1, 2], "f": ["x", "y"]} | metadata
    for key, value in values.items():
        kind = gguf.GGUFValueType.get_type(value)
        out.add_key_value(key, value, kind)
    for name, array, kind in tensors:
        out.add_tensor(name, array, raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(out, f"write_{step}_to_file")()
    out.close()
    return values | {"general.architecture": "llama"}


def test_every_type_of_the_package_is_read_as_its_own_reader_does(tmp_path):
    rng = np.random.default_rng(0)
    tensors = []
    for name in ("F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_NL"):
        kind = gguf.GGMLQuantizationType[name]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        stored = rng.integers(0, 60, (3, size * 8), dtype=np.uint8)
        plain = {"F32": np.float32, "F16": np.float16}.get(name)
        tensors.append((name, stored.view(plain) if plain else stored, kind))
    expected = small_file(tmp_path / "types.gguf", tensors=tensors)
    container = Container(tmp_path / "types.gguf")
    assert container.metadata == expected
    theirs = gguf.GGUFReader(tmp_path / "types.gguf").tensors
    assert [tensor.name for tensor in theirs] == list(container.tensors)
    for tensor in theirs:
        assert container.tensors[tensor.name].shape == tuple(tensor.shape[::-1].tolist())
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(container.read(tensor.name), values.astype(np.float32))


def change(file, **values):
    """Writes a copy of the file with other metadata."""
    old = Container(file)
    changed = file.with_name(f"changed_{file.name}")
    out = gguf.GGUFWriter(changed, old.metadata["general.architecture"])
    metadata = old.metadata | {key.replace("__", "."): value for key, value in values.items()}
    for key, value in metadata.items():
        if value != []:
            out.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name in old.tensors:
        out.add_tensor(name, old.read(name))
    for step in ("header", "kv_data", "tensors"):
        getattr(out, f"write_{step}_to_file")()
    out.close()
    return changed


def test_import_keeps_a_byte_level_tokenizer_and_the_chat_template(export, files, tmp_path):
    given = byte_level(files)
    *_, file = export(of=load_tokenizer(files))
    values = {"tokenizer__chat_template": TEMPLATE, "tokenizer__ggml__add_bos_token": False}
    file = change(file, **values)
    assert cli.main(["import", f"--source={file}", f"--output={tmp_path / 'run'}"]) == 0
    opened = open_model.open_model(tmp_path / "run")
    for text in (*PROBES, "I'll say 12 34567 things"):
        assert opened.tokenizer.encode(text) == given.encode(text, add_special_tokens=False).ids
    config = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    assert config["add_bos_token"] is False
    fast = type(given).from_file(str(tmp_path / "run" / "tokenizer.json"))
    assert fast.encode("a").ids == given.encode("a", add_special_tokens=False).ids
    # A file that asks for BOS gets a tokenizer that adds it.
    again = change(file, tokenizer__ggml__add_bos_token=True)
    read_gguf(again, files)
    fast = type(given).from_file(str(files / "tokenizer.json"))
    assert fast.encode("a").ids == [0, *given.encode("a", add_special_tokens=False).ids]


def byte_level(folder):
    """Writes a tokenizer.json like Llama 3's into the folder, and returns the library's object."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(["I'll say things, many things, 12 times"] * 5, trainer)
    fast.save(str(folder / "tokenizer.json"))
    fast.encode_special_tokens = True
    return fast


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general__architecture": "qwen2"}, "general.architecture='qwen2' must be llama"),
        ({"llama__expert_count": 8}, "llama.expert_count=8 must be 0"),
        ({"llama__rope__scaling__type": "yarn"}, "RoPE scaling 'yarn' is not supported"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count=8 must be 16"),
        ({"llama__attention__head_count": [4, 2]}, "head_count=.4, 2. must be a whole number"),
        ({"llama__block_count": 3}, "missing: blk.2.attn_norm.weight"),
        ({"llama__block_count": (1 << 31) - 1}, "tensors for llama.block_count=2147483647"),
        ({"split__count": 2}, "llama-gguf-split --merge"),
        ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model='t5' must be llama or gpt2"),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "odd"}, "pre='odd' divides"),
        ({"tokenizer__ggml__scores": [0.5]}, "scores has 1 values, not 320"),
        ({"tokenizer__ggml__eos_token_id": 999}, "eos_token_id=999 must be less than 320"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(values, message, export, files):
    *_, file = export()
    with pytest.raises(UserError, match=message):
        read_gguf(change(file, **values), files)


def test_a_file_that_is_not_whole_is_refused(export, files, tmp_path):
    *_, file = export()
    content = file.read_bytes()
    for cut in (10, 100, 5000, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(UserError, match="is damaged: .*Fetch the file again"):
            read_gguf(file, files)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"is not a GGUF file; it looks like a Git LFS pointer"):
        read_gguf(file, files)
    with pytest.raises(MissingFileError, match="does not exist"):
        read_gguf(tmp_path / "no.gguf", files)
