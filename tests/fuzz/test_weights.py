"""Tests weights from others: safetensors, their index, and torch's own format."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from safetensors.numpy import save

from mobilellm_jax.export.huggingface.weight_files import open_tensors
from tests.fuzz.hostile import damaged_bytes, damaged_json, fuzz

TENSORS = {"model.norm.weight": np.ones(3, np.float32), "b": np.zeros((2, 2), np.float16)}


def read_all(folder: Path) -> None:
    for tensor in open_tensors(folder).values():
        assert tensor.read().shape == tensor.shape


def test_safetensors(tmp_path: Path) -> None:
    content = save(TENSORS, {"format": "pt"})
    length = int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]

    @st.composite
    def inputs(draw: DrawFn) -> bytes:
        if draw(st.booleans()):
            return draw(damaged_bytes(content))
        changed = draw(damaged_json(header))
        return len(changed).to_bytes(8, "little") + changed + numbers

    def parse(content: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(content)
        read_all(tmp_path)

    fuzz(parse, inputs(), tmp_path, valid=content)


def test_index_of_safetensors(tmp_path: Path) -> None:
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), start=1):
        weight_map[name] = f"model-0000{number}-of-00002.safetensors"
        (tmp_path / weight_map[name]).write_bytes(save({name: tensor}))
    valid = {"metadata": {"total_size": 20}, "weight_map": weight_map}

    def parse(content: bytes) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(content)
        read_all(tmp_path)

    fuzz(parse, damaged_json(valid), tmp_path, valid=json.dumps(valid).encode())


def torch_file(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


STATE = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
    "b": torch.zeros(2, dtype=torch.bfloat16),
}


def test_torch_files(tmp_path: Path) -> None:
    def parse(content: bytes) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        read_all(tmp_path)

    valid = torch_file(STATE)
    fuzz(parse, damaged_bytes(valid), tmp_path, valid=valid)


def test_pickles_in_torch_files(tmp_path: Path) -> None:
    # The checksums are right, so that the interpreter reads all of the damage.
    with zipfile.ZipFile(io.BytesIO(torch_file(STATE))) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    [name] = [name for name in entries if name.endswith("/data.pkl")]
    snippets = [
        b"cos\nsystem\n(X\x01\x00\x00\x00xtR",
        b"cbuiltins\neval\n",
        b"(K\x01K\x02u",
        b"\x8c\x02os\x8c\x06system\x93",
        b"h\x00\x86q\x00",
        b"r\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\x7f",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        pickle.dumps({"a": [1, (2, 3)]}, 2),
    ]

    @st.composite
    def inputs(draw: DrawFn) -> bytes:
        content = draw(damaged_bytes(entries[name])) if draw(st.booleans()) else entries[name]
        at = draw(st.integers(0, len(content)))
        return content[:at] + draw(st.sampled_from([b"", *snippets])) + content[at:]

    def parse(content: bytes) -> None:
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
            for other, kept in entries.items():
                archive.writestr(other, content if other == name else kept)
        read_all(tmp_path)

    fuzz(parse, inputs(), tmp_path, valid=entries[name])
