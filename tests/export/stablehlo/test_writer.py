import numpy as np
import pytest

pytest.importorskip("flatbuffers", reason="the export extra")

import jax
from jax import export as jax_export
from safetensors.numpy import load_file

from mobilellm_jax.export import exporting
from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.export.formats import EXACT
from mobilellm_jax.export.stablehlo.writer import DECODE, PREFILL, WEIGHTS
from mobilellm_jax.export.verify import verify
from mobilellm_jax.model.opened import OpenedModel
from tests.export.shapes import SCALE, SHAPES


@pytest.fixture
def make_source(tiny_config, tiny_params, tokenizer):
    def make(**fields):
        config = tiny_config(**fields)
        return OpenedModel(config, tiny_params(config, SCALE), tokenizer, "random")

    return make


def export(source, output, precision="float32"):
    return exporting.export(
        source, output, format_name="stablehlo", precision=precision, verified=False
    )


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_computes_what_the_model_computes(fields, make_source, output):
    source = make_source(**fields)
    export(source, output)
    found = verify(open_artifact(output).load(), source)
    assert found.problems(EXACT) == []
    assert found.positions == 256 and found.largest_logit > 1


def test_bfloat16_halves_the_bytes_and_moves_the_logits_little(make_source, output):
    # Random weights times SCALE amplify rounding errors. Trained weights are held to BRAIN.
    source = make_source(num_repeats=2)
    whole = export(source, output / "float32").model_bytes
    half = export(source, output / "bfloat16", "bfloat16").model_bytes
    assert half < 0.7 * whole
    found = verify(open_artifact(output / "bfloat16").load(), source)
    assert 1e-3 < found.read_error < 0.1 * found.scale
    assert 1e-3 < found.append_error < 0.1 * found.scale


def test_shared_blocks_and_tied_embeddings_are_stored_once(make_source, output):
    shared, untied = make_source(num_repeats=3), make_source(tie_embeddings=False)
    assert export(shared, output / "shared").layers == 2
    export(untied, output / "untied")
    tensors = {name: load_file(output / name / WEIGHTS) for name in ("shared", "untied")}
    assert tensors["untied"].keys() - tensors["shared"].keys() == {"head"}
    assert len(tensors["shared"]) == 2 + 2 * 6
    sizes = [array.size for array in jax.tree.leaves(shared.params)]
    assert sum(array.size for array in tensors["shared"].values()) == sum(sizes)


def test_the_functions_are_for_all_platforms_and_hold_no_weights(make_source, output):
    export(make_source(), output)
    for file in (PREFILL, DECODE):
        content = (output / file).read_bytes()
        function = jax_export.deserialize(bytearray(content))
        assert function.platforms == ("cpu", "cuda", "tpu")
        assert len(content) < 100_000
    assert (output / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_two_exports_have_the_same_bytes(make_source, output):
    for name in ("one", "two"):
        export(make_source(), output / name)
    for file in (PREFILL, DECODE, WEIGHTS):
        assert (output / "one" / file).read_bytes() == (output / "two" / file).read_bytes(), file


def test_no_padding_is_read(make_source, output):
    source = make_source()
    export(source, output)
    prefill = jax_export.deserialize(bytearray((output / PREFILL).read_bytes())).call
    weights = load_file(output / WEIGHTS)
    tokens_1T = np.arange(1, 9, dtype=np.int32)[None]
    padded_1T = np.pad(tokens_1T, ((0, 0), (0, 4)), constant_values=7)
    exact_1TV, _ = prefill(weights, tokens_1T, np.int32(8))
    logits_1TV, cache = prefill(weights, padded_1T, np.int32(8))
    np.testing.assert_allclose(logits_1TV[:, :8], exact_1TV, atol=1e-4)  # sums in another order
    assert int(cache["length"]) == 8
