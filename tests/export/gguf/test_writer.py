"""Compares GGUF files in llama.cpp with the JAX model, which equals Hugging Face's model."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs the extra 'export': gguf")
pytest.importorskip("llama_cpp", reason="needs the extra 'export': llama-cpp-python")

import gguf

from mobilellm_jax.export import exporting
from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.export.formats import FORMATS
from mobilellm_jax.export.gguf import runtime as llama_cpp
from mobilellm_jax.export.gguf.writer import write
from mobilellm_jax.export.verify import verify
from mobilellm_jax.model.opened import OpenedModel

SHAPES = {
    "immediate": {"num_repeats": 2},
    "repeat_all": {"num_repeats": 2, "sharing": "repeat_all"},
    "reverse": {"num_repeats": 3, "sharing": "reverse"},
    "untied": {"tie_embeddings": False},
    "head_dim": {"head_dim": 24},  # 4 x 24 is not embed_dim
    "one key-value head": {"num_kv_heads": 1, "rope_theta": 500.0, "norm_eps": 1e-3},
    "rope linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "rope llama3": {
        **{"rope_scaling": "llama3", "rope_factor": 8.0, "rope_theta": 100.0},
        "rope_original_len": 64,
    },
    "padded vocabulary": {"vocab_size": 333, "embed_dim": 60},
}
QUANTIZED = [name for name, precision in FORMATS["gguf"].precisions.items() if name != "float32"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Limits llama.cpp's threads, which wait by spinning and would slow other tests."""
    monkeypatch.setattr(llama_cpp, "available_cores", lambda: 1)


@pytest.fixture
def make_source(make_model, tokenizer):
    """Returns a function that makes a model to export; its matrices are large enough to matter."""

    def make(scale: float = 8.0, **fields) -> OpenedModel:
        config, params, _, _ = make_model(scale, **({"max_seq_len": 96} | fields))
        return OpenedModel(config, params, tokenizer, "a test")

    return make


@pytest.fixture
def export(make_source, tmp_path):
    """Returns a function that exports a model and opens it again."""

    def run(precision: str = "float32", **fields):
        source = make_source(**fields)
        folder = tmp_path / precision
        exporting.export(source, folder, format_name="gguf", precision=precision, verified=False)
        return source, open_artifact(folder)

    return run


def tensors(artifact) -> dict:
    return {t.name: t for t in gguf.GGUFReader(artifact.file).tensors}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_float32_is_exact(export, fields):
    source, artifact = export(**fields)
    found = verify(artifact.load(), source)
    assert found.problems(FORMATS["gguf"].precisions["float32"]) == []
    assert (found.positions, found.greedy_tokens) == (96, 64)
    assert found.largest_logit > 1  # otherwise the bound would be 1 and not the largest logit


def test_layers_are_stored_once_per_application(export):
    source, artifact = export(num_repeats=2)
    stored = tensors(artifact)
    assert source.config.num_blocks == 2
    for kind in ("ffn_down", "attn_q"):
        first, second, third = (stored[f"blk.{i}.{kind}.weight"].data for i in (0, 1, 2))
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, third)
    down = source.params["blocks"]["feed_forward"]["down"]
    np.testing.assert_array_equal(stored["blk.3.ffn_down.weight"].data, down[1].T)
    assert "blk.4.ffn_down.weight" not in stored


def test_queries_and_keys_stand_in_the_order_of_llama_cpp(export):
    source, artifact = export()
    stored = tensors(artifact)
    for name, ours, heads in (("attn_q", "query", 4), ("attn_k", "key", 2)):
        array_DNH = np.asarray(source.params["blocks"]["attention"][ours][0])
        rows = stored[f"blk.0.{name}.weight"].data.reshape(heads, 16, 64)
        for channel in range(8):  # RoPE rotates this channel together with channel + 8
            np.testing.assert_array_equal(rows[1, 2 * channel], array_DNH[:, 1, channel])
            np.testing.assert_array_equal(rows[1, 2 * channel + 1], array_DNH[:, 1, channel + 8])


def test_tied_embeddings_are_stored_once(export):
    _, tied = export()
    assert "output.weight" not in tensors(tied)


def test_untied_embeddings_are_stored_twice(export):
    source, untied = export(tie_embeddings=False)
    head = np.asarray(source.params["head"]["kernel"])
    np.testing.assert_array_equal(tensors(untied)["output.weight"].data, head.T)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_precisions(export, precision):
    source, artifact = export(precision, num_repeats=2)
    allowed = FORMATS["gguf"].precisions[precision]
    stored = tensors(artifact)
    assert all(t.tensor_type.name == "F32" for name, t in stored.items() if "norm" in name)
    matrices = [t for name, t in stored.items() if "norm" not in name]
    assert sum(t.n_bytes for t in matrices) * 8 == allowed.bits * sum(
        t.n_elements for t in matrices
    )
    # A weight is off by at most half a step. The largest weight of its block of 32 sets the step.
    steps = {"q8_0": 127, "q5_1": 16, "q5_0": 16, "q4_1": 8, "q4_0": 8}
    share = (
        1.01 / steps[precision] if precision in steps else {"float16": 2**-10}.get(precision, 2**-7)
    )
    up = stored["blk.2.ffn_up.weight"]
    found = gguf.dequantize(up.data, up.tensor_type).reshape(-1, 32)
    exact = np.asarray(source.params["blocks"]["feed_forward"]["up"][1]).T.reshape(-1, 32)
    assert not np.array_equal(found, exact)
    assert np.all(np.abs(found - exact) <= share * np.abs(exact).max(axis=1, keepdims=True))
    assert verify(artifact.load(), source).problems(dataclasses.replace(allowed, loss=0.5)) == []


def test_the_same_model_gives_the_same_bytes(make_source, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(make_source(), tmp_path / name, "q8_0")
    one, two = ((tmp_path / name / "model.gguf").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("precision", "fields", "message"),
    [
        ("float32", {"activation": "relu"}, "model.activation=relu has two matrices"),
        ("q4_0", {"embed_dim": 72}, "model.embed_dim=72 must be a multiple of 32.*q4_0"),
        ("q8_0", {"head_dim": 18}, "model.num_heads . model.head_dim=72 must be a multiple"),
        ("q8_0", {"ffn_dim": 100}, "model.ffn_dim=100 must be a multiple"),
        ("float16", {"scale": 1e7}, "holds values that are not finite in float16; .*bfloat16"),
        ("q4_0", {"scale": 1e7}, "holds values that are not finite in q4_0; .*bfloat16"),
        ("float32", {"scale": np.inf}, r"holds values that are not finite in float32\."),
    ],
)
def test_what_cannot_be_expressed_is_refused(make_source, tmp_path, precision, fields, message):
    source = make_source(**fields)
    output = tmp_path / "export"
    with pytest.raises(ValueError, match=message):
        exporting.export(source, output, format_name="gguf", precision=precision, verified=False)
    assert not output.exists()


def test_a_damaged_export_is_refused(export):
    _, artifact = export()
    content = artifact.file.read_bytes()
    artifact.file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.gguf"):
        open_artifact(artifact.folder)
