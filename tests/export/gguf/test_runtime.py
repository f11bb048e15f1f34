"""Tests what the runtime adds to llama.cpp: cache rules, threads, and our error types."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs the extra 'export': gguf")
pytest.importorskip("llama_cpp", reason="needs the extra 'export': llama-cpp-python")

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.export.artifact import Artifact, open_artifact
from mobilellm_jax.export.exporting import export
from mobilellm_jax.export.gguf import header
from mobilellm_jax.export.gguf import runtime as llama_cpp
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.transformer import init_params

CONFIG = ModelConfig(
    vocab_size=300,
    embed_dim=32,
    num_blocks=2,
    num_repeats=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    ffn_dim=64,
    max_seq_len=40,
    init_std=0.2,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> OpenedModel:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer = train_tokenizer(["the quick brown fox"] * 9, 290, file)
    return OpenedModel(CONFIG, init_params(CONFIG, jax.random.key(0)), tokenizer, "a test")


@pytest.fixture(scope="module")
def artifact(source, tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("exported") / "gguf"
    export(source, folder, format_name="gguf", precision="float32", verified=False)
    return open_artifact(folder)


@pytest.fixture
def runtime(artifact, monkeypatch):
    monkeypatch.setattr(llama_cpp, "available_cores", lambda: 1)
    return artifact.load()


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count).tolist()


def close(one, two):
    np.testing.assert_allclose(one, two, atol=1e-4)  # sums in another order


def test_reading_at_once_in_parts_and_by_the_cache_agree(runtime, monkeypatch):
    sequence = tokens(40)
    whole_TV = runtime.read(sequence)
    assert whole_TV.shape == (40, 300) and whole_TV.dtype == np.float32
    first_TV = runtime.read(sequence[:1])
    close(np.stack([first_TV[0], *(runtime.append(token) for token in sequence[1:])]), whole_TV)
    monkeypatch.setattr(runtime, "_chunk", 7)
    close(runtime.read(sequence), whole_TV)


def test_a_new_sequence_forgets_the_old_one(runtime):
    fresh_TV = runtime.read(tokens(9))
    runtime.read(tokens(20, seed=1))
    runtime.append(5)
    close(runtime.read(tokens(9)), fresh_TV)


def test_what_was_returned_stays(runtime):
    runtime.read(tokens(3))
    one_V = runtime.append(7)
    copied = one_V.copy()
    runtime.append(8)
    np.testing.assert_array_equal(one_V, copied)


def test_no_more_than_the_cache_holds(runtime):
    runtime.read(tokens(40))
    with pytest.raises(ValueError, match="41 tokens must have at least 1 and at most .*40"):
        runtime.append(1)
    with pytest.raises(ValueError, match="41 tokens"):
        runtime.read(tokens(41))
    with pytest.raises(ValueError, match="0 tokens"):
        runtime.read([])
    runtime.read(tokens(39))
    runtime.append(1)


def test_nothing_is_printed(artifact, capfd):
    artifact.load().read(tokens(5))
    assert capfd.readouterr() == ("", "")


def test_a_manifest_of_another_model(artifact):
    config = dataclasses.replace(CONFIG, max_seq_len=4096)
    info = dataclasses.replace(artifact.info, model=config)
    with pytest.raises(ValueError, match="is not the model of 300 tokens and sequences of 4,096"):
        llama_cpp.LlamaCppRuntime(artifact.file, info)


def test_what_llama_cpp_says_is_passed_on(source, tmp_path, monkeypatch, capfd):
    def other(tokenizer, vocab_size):
        vocabulary = made(tokenizer, vocab_size)
        return vocabulary._replace(model="gpt2", pre="nobody's", merges=["t h"])

    made = header.vocabulary_of
    monkeypatch.setattr(header, "vocabulary_of", other)
    with pytest.raises(ValueError, match=r"cannot load .*model\.gguf: .*nobody's"):
        export(source, tmp_path / "x", format_name="gguf", precision="float32", verified=False)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("flags", "extra"), [("avx2 amx_tile amx_int8", False), ("avx2", True)])
def test_amx_is_avoided_and_only_that(monkeypatch, artifact, flags, extra):
    """The runtime repacks the weights for the kernels of this machine where that is safe."""
    monkeypatch.setattr(llama_cpp, "cpu_features", lambda: frozenset(flags.split()))
    given = []
    monkeypatch.setattr(
        llama_cpp._c, "llama_model_load_from_file", lambda _, settings: given.append(settings)
    )
    with pytest.raises(ValueError, match="it does not say why"):
        llama_cpp.LlamaCppRuntime(artifact.file, artifact.info)
    assert [settings.use_extra_bufts for settings in given] == [extra]
