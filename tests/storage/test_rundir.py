"""Tests that a file is whole or absent."""

from pathlib import Path

import pytest

from mobilellm_jax.storage.rundir import WholeFile, write_whole


def test_a_file_replaces_the_earlier_file_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "earlier")
    with WholeFile(path) as file:
        file.write(b"new ")
        file.write(b"content")
        assert path.read_text() == "earlier"
        file.complete()
        assert path.read_text() == "new content"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_error_deletes_the_unfinished_file_and_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "earlier")
    with pytest.raises(KeyError), WholeFile(path) as file:
        file.write(b"new")
        raise KeyError
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "earlier"
