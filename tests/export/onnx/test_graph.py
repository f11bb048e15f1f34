"""A reader can map the file of weights into memory, and the graph gives the offsets."""

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the export extra")

import onnx
from onnx import numpy_helper

from mobilellm_jax.export.onnx.graph import WEIGHTS, Graph

SIZES = {"tiny": 3, "large": 1 << 18, "small": 100, "larger": (1 << 18) + 1}  # of float32


def written(folder):
    """Returns the values, and the model as read back from `folder`."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=size).astype(np.float32) for name, size in SIZES.items()}
    with (folder / WEIGHTS).open("wb") as file:
        graph = Graph(file)
        total = graph.input("x", np.float32, ["N"])
        for name, array in values.items():
            total = graph.node("Add", total, graph.node("ReduceSum", graph.constant(name, array)))
        graph.node("Identity", total, outputs=[graph.output("y", ["N"])])
    (folder / "model.onnx").write_bytes(graph.serialized())
    return values, folder / "model.onnx"


def test_every_value_comes_back(tmp_path):
    values, file = written(tmp_path)
    onnx.checker.check_model(str(file), full_check=True)
    loaded = onnx.load(file)
    assert [tensor.name for tensor in loaded.graph.initializer] == list(SIZES)
    for tensor in loaded.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), values[tensor.name])


def test_large_ones_start_on_pages_and_the_smallest_are_in_the_graph(tmp_path):
    _, file = written(tmp_path)
    loaded = onnx.load(file, load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in loaded.graph.initializer
    }
    assert not places.pop("tiny")
    offsets = {name: int(place["offset"]) for name, place in places.items()}
    assert offsets["large"] % 65536 == offsets["larger"] % 65536 == 0 < offsets["larger"]
    assert offsets["small"] % 64 == 0
    assert {place["location"] for place in places.values()} == {WEIGHTS}
    for name, place in places.items():
        assert int(place["length"]) == 4 * SIZES[name]


def test_equal_graphs_are_equal_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name)
    for name in ("model.onnx", WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
