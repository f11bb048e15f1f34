import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mobilellm_jax.export.huggingface.weight_files import open_tensors, spare_pickle, write_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "b": np.array([1.5, -2.25], ml_dtypes.bfloat16),
    "c": np.array([[0.5]], np.float16),
}


def read_all(folder):
    return {name: tensor.read() for name, tensor in open_tensors(folder).items()}


def assert_same(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()


def test_one_file_that_torch_reads(tmp_path):
    write_tensors(TENSORS.items(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    theirs = load_file(tmp_path / "model.safetensors")
    assert theirs["b"].dtype == torch.bfloat16 and theirs["b"].tolist() == [1.5, -2.25]
    np.testing.assert_array_equal(theirs["a"].numpy(), TENSORS["a"])
    assert_same(read_all(tmp_path))
    assert {n: (t.shape, t.dtype) for n, t in open_tensors(tmp_path).items()} == {
        "a": ((2, 3), "float32"),
        "b": ((2,), "bfloat16"),
        "c": ((1, 1), "float16"),
    }


def test_transposed_tensor_is_written_in_its_own_order(tmp_path):
    write_tensors([("t", TENSORS["a"].T)], tmp_path)
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["t"], TENSORS["a"].T)


@pytest.mark.parametrize(("limit", "files"), [(1, 3), (28, 2), (30, 1)])
def test_shards_hold_no_more_than_asked(limit, files, tmp_path):
    write_tensors(TENSORS.items(), tmp_path, shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files
    if files > 1:
        assert shards[0].name == f"model-00001-of-0000{files}.safetensors"
        assert (tmp_path / "model.safetensors.index.json").is_file()
    assert sorted(n for shard in shards for n in load_file(shard)) == ["a", "b", "c"]
    assert_same(read_all(tmp_path))


def test_torch_file_is_read_in_its_own_dtypes(tmp_path):
    state = {
        "a": torch.from_numpy(TENSORS["a"]),
        "b": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "c": torch.tensor([[0.5]], dtype=torch.float16),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(read_all(tmp_path))


def test_safetensors_go_before_torch_files(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert spare_pickle(tmp_path) == ""
    assert open_tensors(tmp_path).keys() == {"x"}
    write_tensors(TENSORS.items(), tmp_path)
    assert open_tensors(tmp_path).keys() == TENSORS.keys()
    assert spare_pickle(tmp_path) == "pytorch_model.bin"


@pytest.mark.parametrize(
    "name", ["../model-00002-of-00003.safetensors", "/etc/passwd", ".", "a\0b", "C:\\x", "a/b", ""]
)
def test_an_index_does_not_leave_its_folder(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tensors(TENSORS.items(), folder, shard_bytes=1)
    file = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00003.safetensors").rename(
        tmp_path / "model-00002-of-00003.safetensors"
    )
    index = json.loads(file.read_text())
    index["weight_map"]["b"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: weight_map names .* not a file name"):
        open_tensors(folder)


def test_an_index_that_misleads(tmp_path):
    write_tensors(TENSORS.items(), tmp_path, shard_bytes=1)
    file = tmp_path / "model.safetensors.index.json"
    whole = json.loads(file.read_text())["weight_map"]
    first = whole["a"]
    for weight_map, message in (
        ({"a": first, "b": first}, "says that b is in model-00001.*, but it is not"),
        ({"a": first, "x": whole["b"]}, "says that x is in model-00002.*, but it is not"),
        ({str(i): f"{i}.safetensors" for i in range(257)}, "names 257 shards; at most 256"),
        ([], r"weight_map=\[\] must be an object"),
    ):
        file.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            open_tensors(tmp_path)
    file.write_text(json.dumps({"weight_map": whole}))
    (tmp_path / whole["b"]).write_bytes((tmp_path / first).read_bytes())
    with pytest.raises(ValueError, match="a is in model-00002.* and in another shard too"):
        open_tensors(tmp_path)


def test_missing_weights_and_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights; expected model.safetensors"):
        open_tensors(tmp_path)
    write_tensors(TENSORS.items(), tmp_path, shard_bytes=1)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names the shard model-00002-of-00003"):
        open_tensors(tmp_path)


def test_broken_files_and_quantised_weights_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    write_tensors(TENSORS.items(), tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_tensors(tmp_path)
    save_file({"q": torch.zeros(2, dtype=torch.int8)}, file)
    with pytest.raises(ValueError, match="q has dtype I8; only float32, bfloat16, float16"):
        open_tensors(tmp_path)
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"no torch file")
    with pytest.raises(ValueError, match="is not a zip archive"):
        open_tensors(tmp_path)
