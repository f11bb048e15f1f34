import dataclasses

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the export extra")
pytest.importorskip("onnxruntime", reason="the export extra")

import onnx
import onnxruntime

from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.export.exporting import export
from mobilellm_jax.export.onnx.runtime import OnnxRuntime
from mobilellm_jax.export.runtime import greedy
from mobilellm_jax.model.opened import OpenedModel
from tests.export.conftest import random_params, tiny, tokenizer  # noqa: F401  # a fixture
from tests.export.examples import run_example

ROOM = 24
TOKENS = np.random.default_rng(1).integers(0, 320, ROOM).tolist()
SUMS = 1e-4  # float32 sums in another order, of logits of up to 10


@pytest.fixture(scope="module")
def artifacts(tokenizer, tmp_path_factory):  # noqa: F811
    config = tiny(num_repeats=2, max_seq_len=ROOM)
    source = OpenedModel(config, random_params(config, 6.0), tokenizer, "random")
    made = {}
    for precision in ("float32", "int8"):
        folder = tmp_path_factory.mktemp("onnx") / precision
        export(source, folder, format_name="onnx", precision=precision, verified=False)
        made[precision] = open_artifact(folder)
    return made


@pytest.fixture
def copied(artifacts, tmp_path):
    """Returns a float32 artefact that a test may damage."""
    whole = artifacts["float32"]
    for file in whole.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return dataclasses.replace(whole, folder=tmp_path)


def test_a_sequence_that_fills_the_cache(artifacts):
    runtime = artifacts["float32"].load()
    read_TV = runtime.read(TOKENS)
    rows = [runtime.read(TOKENS[:1])[-1], *(runtime.append(token) for token in TOKENS[1:])]
    np.testing.assert_allclose(np.stack(rows), read_TV, atol=SUMS)
    with pytest.raises(ValueError, match="25 tokens must have at least 1 and at most"):
        runtime.append(1)
    with pytest.raises(ValueError, match="25 tokens"):
        runtime.read([*TOKENS, 1])
    # the cache kept no token of the refused call
    np.testing.assert_array_equal(runtime.read(TOKENS), read_TV)


def test_what_append_returned_stays(artifacts):
    runtime = artifacts["float32"].load()
    runtime.read(TOKENS[:3])
    first_V = runtime.append(TOKENS[3])
    kept_V = first_V.copy()
    runtime.append(TOKENS[4])
    np.testing.assert_array_equal(first_V, kept_V)


def test_the_cache_is_updated_in_place(artifacts):
    runtime = artifacts["float32"].load()
    arrays = {name: value.numpy() for name, value in runtime._cache.items()}
    assert len(arrays) == 2 * 4
    runtime.read(TOKENS[:5])
    runtime.append(7)
    for name, value in runtime._cache.items():
        filled = np.abs(value.numpy()[0, 0]).sum(-1) > 0
        assert filled.tolist() == [True] * 6 + [False] * (ROOM - 6), name


def test_quantized_logits_do_not_depend_on_later_tokens(artifacts):
    """Activations are quantized too. One scale for all tokens would leak later tokens."""
    runtime = artifacts["int8"].load()
    longer_TV = runtime.read(TOKENS)
    np.testing.assert_allclose(runtime.read(TOKENS[:10]), longer_TV[:10], atol=SUMS)


def test_a_prompt_in_parts_as_an_app_may_read_it(artifacts):
    artifact = artifacts["float32"]
    whole_TV = artifact.load().read(TOKENS[:20])
    session = onnxruntime.InferenceSession(artifact.file, providers=["CPUExecutionProvider"])
    cache = {
        value.name: np.zeros(value.shape, np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    for first, last in ((0, 7), (7, 8), (8, 20)):
        feed = {
            "tokens": np.array([TOKENS[first:last]], np.int64),
            "length": np.array([first], np.int32),
            "logits_from": np.array([0], np.int64),
        }
        logits, *present = session.run(None, feed | cache)
        np.testing.assert_allclose(logits[0], whole_TV[first:last], atol=SUMS)
        end = session.run(["logits"], feed | cache | {"logits_from": np.array([-1], np.int64)})
        np.testing.assert_allclose(end[0], logits[:, -1:], atol=SUMS)
        cache = dict(zip(cache, present, strict=True))


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data"])
def test_a_truncated_file_is_refused(file, copied):
    data = (copied.folder / file).read_bytes()
    (copied.folder / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="ONNX Runtime .* cannot load .* export again"):
        OnnxRuntime(copied.file, copied.info)


def test_no_onnx_file_at_all_is_refused(copied):
    copied.file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="ONNX Runtime .* cannot load"):
        OnnxRuntime(copied.file, copied.info)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (b"tokens", b"token\xff"),
        (b"past_key_3", b"past_key_9"),
        (b"Squeeze", b"Squeez\xff"),  # in the constructor, which would print and try again
    ],
)
def test_another_name_is_refused(name, other, copied, capfd):
    data = copied.file.read_bytes()
    assert name in data
    copied.file.write_bytes(data.replace(name, other))
    with pytest.raises(ValueError, match="export again"):
        OnnxRuntime(copied.file, copied.info)
    assert capfd.readouterr() == ("", "")


def test_another_model_is_refused(copied):
    for other in ({"vocab_size": 321}, {"max_seq_len": 25}, {"num_blocks": 3}):
        with pytest.raises(ValueError, match="is not the model of"):
            model = dataclasses.replace(copied.info.model, **other)
            OnnxRuntime(copied.file, dataclasses.replace(copied.info, model=model))
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "other", [value], [out])
    opset = [onnx.helper.make_opsetid("", 20)]
    foreign = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    copied.file.write_bytes(foreign.SerializeToString())
    with pytest.raises(ValueError, match="is not the model of"):
        OnnxRuntime(copied.file, copied.info)


def test_the_documented_program_says_what_the_runtime_says(artifacts):
    artifact = artifacts["float32"]
    tokens = run_example("ONNX Runtime", artifact.folder)
    assert len(set(tokens)) > 5
    assert tokens == list(greedy(artifact.load(), [1, 17, 42], 20))
