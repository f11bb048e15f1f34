"""Tests that a manifest finds every change in a sealed folder."""

import json
import os
from pathlib import Path

import pytest
from etils import epath

from mobilellm_jax.storage import sealing
from mobilellm_jax.storage.sealing import DamagedError, UnsealedError


@pytest.fixture
def folder(tmp_path: Path) -> epath.Path:
    """A sealed folder with nested and empty files."""
    folder = epath.Path(tmp_path / "sealed")
    for name, content in {
        "params/d/one": b"\x00" * 3_000_000,
        "params/two": b"two",
        "tokenizer/empty": b"",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    sealing.seal(folder, {"step": 3})
    return folder


def test_the_manifest_has_every_file_and_the_given_entries(folder: epath.Path) -> None:
    content = sealing.verify(folder)
    assert content["step"] == 3
    # These values come from sha256sum.
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    two = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"
    zeros = content["files"].pop("params/d/one")
    assert zeros["bytes"] == 3_000_000
    assert content["files"] == {
        "params/two": {"bytes": 3, "sha256": two},
        "tokenizer/empty": {"bytes": 0, "sha256": empty},
    }


def test_any_flipped_bit_of_any_file_is_found_and_named(folder: epath.Path) -> None:
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) == 3
    for file in files:
        content = file.read_bytes()
        for at in {0, len(content) // 2, len(content) - 1}:
            for bit in range(8):
                changed = bytearray(content)
                changed[at] ^= 1 << bit
                file.write_bytes(changed)
                with pytest.raises(DamagedError) as error:
                    sealing.verify(folder)
                assert f"{folder} is damaged" in str(error.value)
                assert file.name in str(error.value)
        file.write_bytes(content)
    sealing.verify(folder)


@pytest.mark.parametrize("name", ["params/d/one", "tokenizer/empty"])
def test_missing_and_cut_files_are_named(name: str, folder: epath.Path) -> None:
    file = Path(folder / name)
    os.truncate(file, 100)
    for contents in (True, False):
        with pytest.raises(DamagedError, match=rf"{name} has 100 bytes, but its manifest says"):
            sealing.verify(folder, contents=contents)
    file.unlink()
    for contents in (True, False):
        with pytest.raises(DamagedError, match=rf"{name} is missing"):
            sealing.verify(folder, contents=contents)


def test_all_damage_is_listed(folder: epath.Path) -> None:
    (folder / "params" / "two").unlink()
    (folder / "tokenizer" / "empty").write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"two is missing; .*empty has 1 bytes"):
        sealing.verify(folder)
    with pytest.raises(DamagedError, match=r"sealed is damaged: \S*two is missing\.$"):
        sealing.verify(folder, ["params"])


def test_one_part_can_be_verified_alone(folder: epath.Path) -> None:
    (folder / "params" / "two").write_bytes(b"owt")
    sealing.verify(folder, ["tokenizer"])
    with pytest.raises(DamagedError, match="two has SHA-256"):
        sealing.verify(folder, ["tokenizer", "params"])


def test_folder_without_manifest_is_incomplete(folder: epath.Path) -> None:
    (folder / sealing.MANIFEST).unlink()
    with pytest.raises(UnsealedError, match=r"is incomplete: it has no manifest\.json"):
        sealing.verify(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "params/../../outside"])
def test_a_manifest_cannot_name_a_file_outside_the_folder(name: str, folder: epath.Path) -> None:
    """The checksum of this manifest is right."""
    content = sealing.read_manifest(folder)
    content["files"][name] = {"bytes": 1, "sha256": "00"}
    (folder / sealing.MANIFEST).write_text(sealing._text(content))
    with pytest.raises(DamagedError, match="has changed since it was written"):
        sealing.verify(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff\x00", b"[" * 100_000, b'{"files": {}}', b'{"sha256": 3}']
)
def test_other_content_in_the_manifest_is_damage(content: bytes, folder: epath.Path) -> None:
    (folder / sealing.MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match="has changed since it was written"):
        sealing.verify(folder)


def test_manifest_in_another_spelling_is_damage(folder: epath.Path) -> None:
    path = folder / sealing.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(DamagedError, match="has changed since it was written"):
        sealing.verify(folder)


def test_file_that_cannot_be_read_is_damage(
    folder: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sealing, "sha256_of", fail)
    with pytest.raises(DamagedError, match=r"params/two cannot be read: .*Input/output error"):
        sealing.verify(folder)
