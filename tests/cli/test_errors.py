import errno
import json
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.cli import errors
from mobilellm_jax.cli.errors import UsageError, is_bad_input, message
from mobilellm_jax.config import ConfigError

OURS = str(Path(errors.__file__).parent.parent / "somewhere.py")
THEIRS = "/env/lib/python3.11/site-packages/library/somewhere.py"


def caught(file: str, body: str, **names: object) -> ValueError | OSError:
    """The error that `body` raises as if it stood in `file`."""
    try:
        exec(compile(body, file, "exec"), {"np": np, "json": json, "Path": Path, **names})
    except (ValueError, OSError) as error:
        return error
    raise AssertionError("the body raised nothing")


def library(body: str) -> Callable[[], None]:
    """A function that stands in a library and runs `body`."""
    return lambda: exec(compile(body, THEIRS, "exec"))


@pytest.mark.parametrize("error", [ConfigError("a=1 must be 2."), UsageError("unknown flag --x.")])
def test_our_own_classes_are_bad_input(error: ValueError) -> None:
    assert is_bad_input(error)
    assert message(error) == str(error)


def test_value_error_raised_here_is_bad_input() -> None:
    assert is_bad_input(caught(OURS, "raise ValueError('vocab_size=3 must be 4.')"))


def test_value_error_raised_here_below_a_library_is_bad_input() -> None:
    # A rule of ours that is checked inside a function that jax or flax calls.
    def check() -> None:
        exec(compile("raise ValueError('rule')", OURS, "exec"))

    outer = compile("check()", THEIRS, "exec")
    assert is_bad_input(caught(OURS, "call()", call=lambda: exec(outer, {"check": check})))


@pytest.mark.parametrize(
    "body",
    [
        "a, b = [1]",
        "int('three')",
        "np.zeros(3).reshape(2)",
        "np.zeros(3) + np.zeros(2)",
        "json.loads('{')",
    ],
)
def test_value_error_of_an_expression_is_a_bug(body: str) -> None:
    assert not is_bad_input(caught(OURS, body))


def test_value_error_raised_in_a_library_is_a_bug() -> None:
    error = caught(OURS, "call()", call=library("raise ValueError('shapes')"))
    assert not is_bad_input(error)


def test_bug_inside_jax_is_not_blamed_on_the_user() -> None:
    import jax

    error = caught(OURS, "jax.vmap(lambda x, y: x)(np.ones(3), np.ones(4))", jax=jax)
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    assert innermost.filename == OURS  # jax took its own frames out
    assert not is_bad_input(error)


@pytest.mark.parametrize("body", ["open('/none/x')", "Path('/none/x').read_text()"])
def test_missing_file_that_we_ask_for_is_bad_input(body: str) -> None:
    error = caught(OURS, body)
    assert is_bad_input(error)
    assert message(error) == "/none/x: No such file or directory."


def test_a_message_moves_no_cursor() -> None:
    error = ValueError("a\x1b[2Jb\u202e\ud800\x00é\nsecond line")
    assert message(error) == "a\\x1b[2Jb\\u202e\\ud800\\x00é\nsecond line"
    missing = caught(OURS, "open('/none/\x1b[2J')")
    assert message(missing) == "/none/\\x1b[2J: No such file or directory."


def test_missing_file_raised_here_keeps_its_text() -> None:
    error = caught(OURS, "raise FileNotFoundError('data.path=x holds no manifest.json.')")
    assert is_bad_input(error)
    assert message(error) == "data.path=x holds no manifest.json."


def test_missing_file_inside_a_library_is_a_bug() -> None:
    assert not is_bad_input(caught(OURS, "call()", call=library("open('/none/x')")))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, True),
        (errno.EROFS, True),
        (errno.ENOTDIR, True),
        (errno.ENOSPC, False),
        (errno.EIO, False),
    ],
    ids=errno.errorcode.get,
)
def test_what_the_operating_system_refuses(number: int, expected: bool) -> None:
    error = caught(OURS, f"raise OSError({number}, 'reason', 'path')")
    assert is_bad_input(error) is expected
