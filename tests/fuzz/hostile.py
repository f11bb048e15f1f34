"""Makes hostile files and checks that a parser accepts or refuses each file.

`damaged_bytes` and `damaged_json` damage a valid input. `fuzz` gives the inputs to a parser. The
parser has to return, or to raise an error that the command line would show as bad input. The test
fails if the parser raises another exception, runs code, starts a process, touches a file outside
the folder, takes a gigabyte more of address space, or computes for 20 seconds on one input.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

import mobilellm_jax
from mobilellm_jax.cli import errors

_MORE_MEMORY_BYTES = 1 << 30
_CPU_SEC = 20
_LONGEST_MESSAGE = 20_000

# These are false sizes, counts and offsets.
_NUMBERS = (0, 1, 2, 7, 255, 256, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 62, (1 << 64) - 1)
_SNIPPETS = (
    b"\0",
    b"\xff" * 8,
    b"\x80",
    b"\n",
    b'"',
    b"{",
    b"]",
    b"../",
    b"\xed\xa0\x80",
    b"\x1b[2J",
)
# JSON as it is written.
_READABLE = (
    *("null", "true", "false", "0", "1", "-1", "1.5", "2147483648", "9223372036854775807"),
    *("1e-300", "-1e308", '""', '"x"', '"../../x"', '"/etc/passwd"', r'"C:\\x"', r'"a\u0000b"'),
    *(r'"\ud800"', r'"\u001b[2J"', f'"{"x" * 3000}"', '"(x+x+)+y"'),
    *("[]", "{}", "[null]", '["x"]', '[["x", 1]]', '{"": {}}', "[" * 60 + "]" * 60),
)
# What only Python reads, or nobody.
_UNREADABLE = (
    *("18446744073709551616", "1e999", "NaN", "-Infinity", "1" * 5000, '{"a": 1, "a": 2}'),
    *("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000),
)
_VALUES = (*_READABLE, *_UNREADABLE)
_RAW = "@raw@{}@"
_REPEATED = "@repeated@"


@st.composite
def damaged_bytes(draw: DrawFn, valid: bytes) -> bytes:
    """Changes, inserts, cuts or doubles up to four bytes, ranges or numbers of `valid`."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        stop = min(len(content), at + draw(st.integers(1, 16)))
        kind = draw(st.sampled_from(["bit", "byte", "number", "insert", "cut", "double", "end"]))
        if kind == "bit" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif kind == "number":
            size = draw(st.sampled_from([2, 4, 8]))
            number = draw(st.sampled_from(_NUMBERS)) % (1 << 8 * size)
            content[at : at + size] = number.to_bytes(size, "little")
        elif kind == "insert":
            content[at:at] = draw(st.sampled_from(_SNIPPETS))
        elif kind == "cut":
            del content[at:stop]
        elif kind == "double":
            content[at:at] = content[at:stop]
        elif kind == "end":
            del content[at:]
    return bytes(content)


def damaged_json(valid: Any) -> SearchStrategy[bytes]:
    """Changes up to three places of the JSON value `valid`, or damages its text as bytes."""
    text = json.dumps(valid).encode()
    changed = [_changed_json(text)] * 6
    return st.one_of(*changed, damaged_bytes(text), st.binary(max_size=20))


@st.composite
def _changed_json(draw: DrawFn, text: bytes) -> bytes:
    root = [json.loads(text)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = list(_places(root))
        holder, key = draw(st.sampled_from(places))
        kinds = ["raw", "raw", "delete", "add", "move", "number"]
        kind = "repeat" if draw(st.integers(0, 19)) == 19 else draw(st.sampled_from(kinds))
        if kind == "delete" and holder is not root:
            del holder[key]
        elif kind == "add" and isinstance(holder[key], dict):
            name = draw(st.sampled_from(["", "x", "../x", "__class__", "\0", "\ud800", "a" * 300]))
            holder[key][name] = _raw(draw)
        elif kind == "repeat" and isinstance(holder, dict) and isinstance(key, str):
            holder[_REPEATED + key] = _raw(draw)
        elif kind == "move":
            other, elsewhere = draw(st.sampled_from(places))
            holder[key] = json.loads(json.dumps(other[elsewhere]))
        elif kind == "number" and type(holder[key]) in (int, float):
            holder[key] += draw(st.sampled_from([-1, 1, 1 << 32, -(1 << 32)]))
        else:
            holder[key] = _raw(draw)
    changed = json.dumps(root[0]).replace(_REPEATED, "")
    for number, value in enumerate(_VALUES):
        changed = changed.replace(f'"{_RAW.format(number)}"', value)
    return changed.encode()


def _raw(draw: DrawFn) -> str:
    # Unreadable values are rare, because they would hide the effect of the other changes.
    last = len(_VALUES if draw(st.integers(0, 9)) == 9 else _READABLE) - 1
    return _RAW.format(draw(st.integers(0, last)))


def _places(container: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key or index) of every value in `container`, at any depth."""
    keys = list(container) if isinstance(container, dict) else range(len(container))
    for key in keys:
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from _places(container[key])


def fuzz(
    parse: Callable[[Any], object],
    inputs: SearchStrategy[Any],
    folder: Path,
    *,
    valid: Any,
    share: float = 1,
    refuses: bool = True,
) -> collections.Counter[str]:
    """Gives the parser the profile's number of inputs, times `share`, and counts the results.

    Args:
      parse: writes an input into `folder`, where the parser finds it, and calls the parser.
      inputs: the inputs of the parser.
      folder: the only folder that the parser may write to.
      valid: an undamaged input, which the parser must take.
      share: less than 1 for a slow parser.
      refuses: whether the parser refuses anything. A few parsers leave damaged parts out instead.

    Returns:
      How many of the inputs were "taken" and how many "refused".
    """
    counts: collections.Counter[str] = collections.Counter()

    @settings(settings(), max_examples=max(20, int(settings().max_examples * share)))
    @given(inputs)
    def hostile(content: Any) -> None:
        with _watched(folder), _cpu_limited():
            try:
                parse(content)
                counts["taken"] += 1
            except (ValueError, OSError) as error:
                if not errors.is_bad_input(error):
                    raise
                text = errors.message(error)
                assert 10 < len(text) < _LONGEST_MESSAGE, f"message of {len(text)} characters"
                assert all(c.isprintable() or c == "\n" for c in text), repr(text)
                counts["refused"] += 1

    with _memory_limited():
        with _watched(folder), _cpu_limited():
            try:
                parse(valid)
            except (ValueError, OSError) as error:
                if errors.is_bad_input(error):
                    raise AssertionError("the parser refuses the undamaged input") from error
                raise
        hostile()
    if refuses:
        assert counts["refused"], "nothing was refused: are these the parser's inputs?"
    TRIED[os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]] = counts
    return counts


TRIED: dict[str, collections.Counter[str]] = {}
"""Maps a test to the numbers of inputs that were taken and refused."""


class Forbidden(BaseException):
    """A parser did something forbidden. The `except` of a library does not stop this error."""


_FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    *("socket.connect", "socket.getaddrinfo", "pickle.find_class", "code.__new__"),
)
_PATHS = (
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod"),
    *("os.truncate", "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(mobilellm_jax.__file__).parent),
    "<frozen",
)
# A library that is imported late makes classes from strings there.
_MAKE_CLASSES = (dataclasses.__file__, collections.__file__)
_allowed: Path | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _allowed is None:
        return
    if event in _FORBIDDEN:
        raise Forbidden(f"{event}: {args!r}")
    if event == "exec" and not args[0].co_filename.startswith(_INSTALLED):
        caller = sys._getframe(1).f_code.co_filename
        if caller not in _MAKE_CLASSES:
            raise Forbidden(f"exec of {args[0]!r} in {caller}")
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int) or not (flags & _WRITING or set(mode or "") & set("wax+")):
            return
        _check_path(event, path)
    elif event in _PATHS:
        # A file may be copied from anywhere, but renamed or linked only inside the folder.
        paths = args[1:2] if event == "shutil.copyfile" else args[:2]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                _check_path(event, path)


def _check_path(event: str, path: Any) -> None:
    assert _allowed is not None
    real = os.path.realpath(os.fsdecode(path))
    if not real.startswith(f"{_allowed}{os.sep}") and real != os.devnull:
        raise Forbidden(f"{event} of {real}, outside of {_allowed}")


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_hook)  # the hook stays, because Python cannot remove an audit hook


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[None]:
    global _allowed
    _install_hook()
    _allowed = folder.resolve()
    try:
        yield
    finally:
        _allowed = None


@contextlib.contextmanager
def _cpu_limited() -> Iterator[None]:
    # This clock counts the computing time of this process, so it stops while others have the cores.
    def hung(*_: object) -> None:
        raise Forbidden(f"more than {_CPU_SEC} s of computing")

    before = signal.signal(signal.SIGVTALRM, hung)
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SEC)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _memory_limited() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MORE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
