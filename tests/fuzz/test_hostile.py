"""Tests that the harness notices every forbidden action of a parser."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from mobilellm_jax.storage import strict_json
from tests.fuzz import hostile
from tests.fuzz.hostile import Forbidden, fuzz

INPUTS = st.binary(min_size=1, max_size=4)


def refuse(content: bytes) -> None:
    if content:
        strict_json.parse(b"{")


def unpickle(_: bytes) -> None:
    import pickle

    pickle.loads(b"cos\ngetcwd\n)R.")


@pytest.mark.parametrize(
    ("parse", "noticed"),
    [
        (lambda _: exec("1 + 1"), "exec of <code object"),
        (lambda _: eval("1 + 1"), "exec of <code object"),
        (lambda _: subprocess.run([sys.executable, "-c", ""]), "subprocess.Popen"),
        (unpickle, "pickle.find_class"),
        (lambda _: Path("../outside").write_text(""), "open of .*outside"),
        (lambda _: Path("/tmp/outside").mkdir(), "os.mkdir of .*outside"),
        (lambda _: Path(__file__).rename("elsewhere"), "os.rename of"),
    ],
)
def test_what_no_parser_may_do(parse: Callable[[Any], Any], noticed: str, tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match=noticed):
        fuzz(parse, INPUTS, tmp_path, valid=b"")


def test_what_every_parser_may_do(tmp_path: Path) -> None:
    def parse(content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        (tmp_path / "file").rename(tmp_path / "renamed")
        Path(__file__).read_bytes()
        refuse(content)

    assert set(fuzz(parse, INPUTS, tmp_path, valid=b"")) == {"refused"}
    assert [file.name for file in tmp_path.iterdir()] == ["renamed"]


@pytest.mark.parametrize("error", [KeyError, TypeError, RecursionError, MemoryError])
def test_other_errors_are_found(error: type[Exception], tmp_path: Path) -> None:
    def parse(_: bytes) -> None:
        raise error("x")

    with pytest.raises(error):
        fuzz(parse, INPUTS, tmp_path, valid=b"")


def test_an_error_of_an_expression_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        fuzz(lambda _: int("x"), INPUTS, tmp_path, valid=b"")


def test_gigabytes_are_found(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        fuzz(lambda _: np.empty(1 << 31, np.uint8), INPUTS, tmp_path, valid=b"")


def test_a_hang_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(_: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr(hostile, "_CPU_SEC", 0.1)
    with pytest.raises(Forbidden, match="of computing"):
        fuzz(parse, INPUTS, tmp_path, valid=b"")


def test_a_parser_that_refuses_nothing_is_not_tested(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing was refused"):
        fuzz(lambda _: None, INPUTS, tmp_path, valid=b"")


def test_a_parser_that_refuses_everything_is_not_tested(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="refuses the undamaged input"):
        fuzz(lambda _: strict_json.parse(b"{"), INPUTS, tmp_path, valid=b"")
