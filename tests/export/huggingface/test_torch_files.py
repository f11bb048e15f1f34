import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from mobilellm_jax.export.huggingface.torch_files import open_torch

STATE = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "b": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "c": torch.tensor(0.5, dtype=torch.float16),
    "empty": torch.zeros(0, 3),
}


def saved(folder: Path, value: Any, **options: Any) -> Path:
    file = folder / "pytorch_model.bin"
    torch.save(value, file, **options)
    return file


def numbers_of(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def assert_same(file: Path, state: dict[str, torch.Tensor]) -> None:
    found = open_torch(file)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].dtype == str(tensor.dtype).removeprefix("torch.")
        array = found[name].read()
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == numbers_of(tensor).tobytes()


def test_a_dict_of_tensors(tmp_path: Path) -> None:
    assert_same(saved(tmp_path, STATE), STATE)


def test_the_state_of_a_module_with_its_parameters(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    state = module.state_dict()
    assert isinstance(state, OrderedDict) and state._metadata
    assert_same(saved(tmp_path, state), state)
    parameters = dict(module.named_parameters())
    assert_same(saved(tmp_path, parameters), parameters)


def test_views_of_one_storage(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"transposed": whole.T, "tied": whole}
    assert_same(saved(tmp_path, state), state)
    part = {"part": whole[1:3, ::2]}
    assert_same(saved(tmp_path, part), part)


def test_many_tensors(tmp_path: Path) -> None:
    # This many entries make the pickle use LONG_BINPUT, LONG_BINGET and BININT2.
    state = {f"layers.{i}.weight": torch.full((1, 300), float(i)) for i in range(400)}
    assert_same(saved(tmp_path, state), state)


class Malicious:
    def __reduce__(self) -> Any:
        return eval, ("open('ran', 'w')",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Malicious(), "calls '__builtin__.eval' with .* which no tensor needs"),
        ({"a": Malicious()}, "calls '__builtin__.eval' with .* which no tensor needs"),
        (torch.nn.Linear(1, 1), "pickle"),
        ([STATE["a"]], "not a dict of tensors"),
        ({"epoch": 3}, "epoch is 3, not a tensor"),
        ({"model": {"a": STATE["a"]}}, "model is {.*, not a tensor"),
        ({1: STATE["a"]}, "a dict in it has the key 1, not a text"),
        ({"q": torch.zeros(2, dtype=torch.int8)}, "q is of a CharStorage; only FloatStorage"),
        ({"wide": torch.zeros(1).expand(1 << 40)}, "more than the file could hold"),
    ],
    ids=range(9),
)
def test_what_is_refused(
    value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = saved(tmp_path, value)
    with pytest.raises(ValueError, match=rf"pytorch_model.bin is not a whole file .*{message}"):
        open_torch(file)
    assert not Path("ran").exists()


def test_other_formats_and_protocols(tmp_path: Path) -> None:
    file = saved(tmp_path, STATE, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"not a zip archive, which torch writes since version 1\.6"
    ):
        open_torch(file)
    file = saved(tmp_path, STATE, pickle_protocol=4)
    with pytest.raises(ValueError, match="has the instruction .*, which no tensor needs"):
        open_torch(file)


def changed(file: Path, entry: str, content: bytes | None, compression: int = 0) -> None:
    """Writes the archive again with another content for one entry. None removes the entry."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in entries if name.endswith(f"/{entry}")]
    before = entries.pop(name)
    with zipfile.ZipFile(file, "w") as archive:
        for other, kept in entries.items():
            archive.writestr(other, kept)
        if content is not None:
            archive.writestr(name, content or before, compression)


@pytest.mark.parametrize(
    ("entry", "content", "message"),
    [
        ("data/0", None, "the numbers of a are missing"),
        ("data/0", bytes(20), "the numbers of a are 20 bytes, not 6 of float32"),
        ("data.pkl", None, "has 0 entries NAME/data.pkl"),
        ("data.pkl", b"\x80\x02}", "its pickle is damaged"),
        ("data.pkl", b"\x80\x02}.", ""),
        ("data.pkl", b"\x80\x02)Na.", "its pickle appends to a value that is not a list"),
        ("data.pkl", b"\x80\x020.", "has the instruction POP"),
        ("data.pkl", b"\x80\x02r\xff\xff\xff\xff.", "takes more from the stack"),
        ("data.pkl", b"\x80\x02j\xff\xff\xff\xff.", "recalls a value that it has not stored"),
        ("data.pkl", bytes((1 << 22) + 1), "bytes, over 4,194,304"),
        ("byteorder", b"big", "its byte order is b'big', not little"),
    ],
)
def test_damage(entry: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    file = saved(tmp_path, STATE)
    changed(file, entry, content)
    if not message:
        assert open_torch(file) == {}
        return
    with pytest.raises(ValueError, match=message):
        open_torch(file)


def test_numbers_that_are_compressed_or_flipped(tmp_path: Path) -> None:
    file = saved(tmp_path, STATE)
    content = bytearray(file.read_bytes())
    content[content.index(np.float32(1 / 7).tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not .*: a: Bad CRC-32"):
        open_torch(file)["a"].read()
    file = saved(tmp_path, {"a": torch.zeros(1 << 20)})
    changed(file, "data/0", b"", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="more than the file could hold"):
        open_torch(file)
    file = saved(tmp_path, {"a": torch.zeros(100)})
    changed(file, "data/0", b"", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed or encrypted"):
        open_torch(file)["a"].read()


def test_an_exponential_pickle_takes_no_time(tmp_path: Path) -> None:
    # Each tuple holds the previous tuple twice, 64 times over. Hashing or printing takes 2^64
    # steps.
    doubled = b"\x80\x02}(" + b")" + b"q\x00h\x00\x86" * 64 + b"K\x01u."
    assert pickle.loads(b"\x80\x02)" + b"q\x00h\x00\x86" * 2 + b".") == (((), ()), ((), ()))
    file = saved(tmp_path, STATE)
    changed(file, "data.pkl", doubled)
    with pytest.raises(ValueError, match="a dict in it has the key"):
        open_torch(file)


def test_a_tensor_that_reaches_beyond_its_numbers(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.zeros(6)})
    with zipfile.ZipFile(file) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        content = archive.read(name)
    size_six, size_seven = b"K\x06\x85", b"K\x07\x85"  # BININT1, TUPLE1
    assert content.count(size_six) == 1
    changed(file, "data.pkl", content.replace(size_six, size_seven))
    with pytest.raises(ValueError, match="a reaches beyond its numbers"):
        open_torch(file)


def test_a_zip_archive_of_several_disks_is_refused(tmp_path):
    """zipfile raises an error, instead of returning False, when it is asked about this file."""
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 2)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, 0, 0, 0)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + locator + end)
    with pytest.raises(ValueError, match="span multiple disks"):
        open_torch(tmp_path / "pytorch_model.bin")
