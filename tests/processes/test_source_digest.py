from pathlib import Path

import pytest

from mobilellm_jax.processes import source_digest as module
from mobilellm_jax.processes.source_digest import source_digest


def test_it_changes_with_content_and_names_of_these_rooms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "processes" / "source_digest.py"))
    (tmp_path / "part").mkdir()
    (tmp_path / "alone.py").write_text("b = 1")
    file = tmp_path / "part" / "file.py"
    whole, part = [], []
    for text in ("a = 1", "a = 1", "a = 2"):
        file.write_text(text)
        whole.append(source_digest())
        part.append(source_digest(["part"]))
    file.rename(file.with_name("other.py"))
    whole.append(source_digest())
    part.append(source_digest(["part"]))
    for found in (whole, part):
        assert found[0] == found[1] and len(set(found)) == 3
    (tmp_path / "alone.py").write_text("b = 2")
    assert source_digest() != whole[-1]
    assert source_digest(["part"]) == part[-1]
    assert source_digest(["part", "alone.py"]) != part[-1]
