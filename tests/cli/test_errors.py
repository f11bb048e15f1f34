import errno

import pytest

from mobilellm_jax.cli.errors import UsageError, is_bad_input, message
from mobilellm_jax.config import ConfigError
from mobilellm_jax.errors import MissingFileError, UserError


@pytest.mark.parametrize("kind", [UserError, MissingFileError, ConfigError, UsageError])
def test_an_error_for_the_user_is_bad_input(kind: type[UserError]) -> None:
    assert is_bad_input(kind("a=1 must be 2."))
    assert message(kind("a=1 must be 2.")) == "a=1 must be 2."


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        FileNotFoundError("raised without a file name"),
        RuntimeError("out of memory"),
    ],
)
def test_other_errors_are_bugs(error: Exception) -> None:
    assert not is_bad_input(error)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOENT, True),
        (errno.EEXIST, True),
        (errno.EISDIR, True),
        (errno.ENOTDIR, True),
        (errno.EACCES, True),
        (errno.EROFS, True),
        (errno.EIO, False),
    ],
    ids=errno.errorcode.get,
)
def test_a_refused_path_is_bad_input(number: int, expected: bool) -> None:
    assert is_bad_input(OSError(number, "reason", "path")) is expected
    assert not is_bad_input(OSError(number, "reason"))


def test_a_full_disk_is_no_bug_of_the_program() -> None:
    assert is_bad_input(OSError(errno.ENOSPC, "reason", "path"))
    assert is_bad_input(OSError(errno.ENOSPC, "reason"))


def test_a_refused_path_is_named_with_the_reason() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open("/none/x")
    assert message(caught.value) == "/none/x: No such file or directory."


def test_a_message_does_not_move_the_cursor() -> None:
    error = UserError("a\x1b[2Jb\u202e\ud800\x00é\nsecond line")
    assert message(error) == "a\\x1b[2Jb\\u202e\\ud800\\x00é\nsecond line"
    with pytest.raises(FileNotFoundError) as caught:
        open("/none/\x1b[2J")
    assert message(caught.value) == "/none/\\x1b[2J: No such file or directory."
