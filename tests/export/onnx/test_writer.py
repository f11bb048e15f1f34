import numpy as np
import pytest

pytest.importorskip("onnx", reason="the export extra")
pytest.importorskip("onnxruntime", reason="the export extra")

import onnx

from mobilellm_jax.export import exporting
from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.export.formats import EXACT, FORMATS
from mobilellm_jax.export.onnx import writer as onnx_file
from mobilellm_jax.export.verify import verify
from mobilellm_jax.model.opened import OpenedModel
from tests.export.shapes import SCALE, SHAPES


@pytest.fixture
def make_source(tiny_config, tiny_params, tokenizer):
    def make(**fields):
        config = tiny_config(**fields)
        return OpenedModel(config, tiny_params(config, SCALE), tokenizer, "random")

    return make


def export(source, output, precision="float32", verified=False):
    return exporting.export(
        source, output, format_name="onnx", precision=precision, verified=verified
    )


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_computes_what_the_model_computes(fields, make_source, output):
    source = make_source(**fields)
    export(source, output)
    found = verify(open_artifact(output).load(), source)
    assert found.problems(EXACT) == []
    assert found.positions == 256 and found.largest_logit > 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("shape", ["reverse", "untied", "gelu"])
def test_lower_precisions_keep_to_their_bounds(shape, precision, make_source, output):
    source = make_source(**SHAPES[shape])
    exported = export(source, output, precision, verified=True)
    whole = export(source, output.parent / "whole").model_bytes
    assert exported.verification.read_error > 1e-3  # it is another precision
    assert exported.model_bytes < 0.6 * whole


def test_shared_blocks_and_tied_embeddings_are_stored_once(make_source, output):
    shared = export(make_source(num_repeats=2), output / "shared")
    plain = export(make_source(), output / "plain")
    doubled = export(make_source(num_blocks=4), output / "doubled")
    assert (shared.layers, plain.layers, doubled.layers) == (2, 2, 4)
    weights = [(output / d / "model.onnx.data").stat().st_size for d in ("shared", "plain")]
    assert weights[0] == weights[1]  # the applications only add nodes
    block = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert doubled.model_bytes - shared.model_bytes > 1.9 * block
    untied = export(make_source(tie_embeddings=False), output / "untied")
    assert untied.model_bytes - plain.model_bytes > 0.99 * 4 * 320 * 64


def test_the_checker_accepts_it(make_source, output):
    export(make_source(num_repeats=2), output)
    onnx.checker.check_model(str(output / "model.onnx"), full_check=True)


def test_two_exports_have_the_same_bytes(make_source, output):
    for name in ("one", "two"):
        export(make_source(), output / name, "int4")
    for file in ("model.onnx", "model.onnx.data"):
        assert (output / "one" / file).read_bytes() == (output / "two" / file).read_bytes()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_what_the_format_says(bits):
    """Dequantizes as MatMulNBits does: (code - 2^(bits - 1)) scale, in blocks along the inputs."""
    weight_OI = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
    weight_OI[3] = 0
    codes, scales = onnx_file._quantized(weight_OI, bits)
    block = {8: 64, 4: 32}[bits]
    blocks = -(-70 // block)
    assert codes.shape == (5, blocks, block * bits // 8) and scales.shape == (5, blocks)
    wide = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(5, blocks, -1)
    read = (wide.astype(np.float32) - (1 << bits - 1)) * scales[..., None]
    read_OI = read.reshape(5, -1)[:, :70]
    step_OI = np.repeat(np.abs(scales), block, 1)[:, :70]
    # The error is at most half a step, or a whole step at the end that lacks a code.
    assert (np.abs(read_OI - weight_OI) <= 1.001 * step_OI).all()
    assert np.mean(np.abs(read_OI - weight_OI) <= 0.501 * step_OI) > 0.95
    furthest = np.abs(weight_OI[:, :block]).argmax(1)
    rows = np.arange(5)
    np.testing.assert_allclose(read_OI[rows, furthest], weight_OI[rows, furthest], rtol=1e-6)


def test_what_float16_cannot_hold_is_refused(make_source, output):
    source = make_source()
    source.params["blocks"]["feed_forward"]["down"][1, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"block_1.down .*float16; use --dtype=bfloat16"):
        export(source, output, "float16")
    assert not output.exists()


def test_every_precision_is_offered():
    assert set(FORMATS["onnx"].precisions) == {"float32", "float16", "bfloat16", "int8", "int4"}
