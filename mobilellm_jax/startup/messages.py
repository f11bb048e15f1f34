"""Shows the package's log messages to the user.

Every module logs its messages for the user with `logging.getLogger(__name__)`. A program that
imports this package chooses where the messages go. The command line and its child processes call
`show_messages`.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_STREAMS = {0: ("stdin", "r"), 1: ("stdout", "w"), 2: ("stderr", "w")}


class _StandardError(logging.Handler):
    """Writes messages without a prefix to the current value of `sys.stderr`.

    The handler hides a progress bar of tqdm while it writes, and then draws the bar again. If
    standard error cannot be written, for example because its terminal was closed or the program
    that read it has ended, the command goes on. The messages then go into the file of
    `keep_messages`, if there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.instead: Callable[[], Path] | None = None
        self.has_told = False  # Whether the file says why it has messages.

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        try:
            with contextlib.ExitStack() as stack:
                if "tqdm" in sys.modules:
                    bars = sys.modules["tqdm"].tqdm
                    stack.enter_context(bars.external_write_mode(file=sys.stderr))
                print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError) as error:  # A closed stream raises a ValueError.
            if self.instead is not None:
                self._append(self.instead(), text, error)

    def _append(self, file: Path, text: str, error: Exception) -> None:
        # If this file cannot be written either, the message is lost.
        with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as opened:
            if not self.has_told:
                opened.write(f"Standard error cannot be written ({error}); its messages follow.\n")
                self.has_told = True
            opened.write(f"{text}\n")


def show_messages() -> None:
    """Sends messages of this package with level INFO or higher to standard error."""
    logger = logging.getLogger("mobilellm_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # A root handler would repeat each line.
    if not _handlers():
        logger.addHandler(_StandardError())


@contextlib.contextmanager
def keep_messages(file: Callable[[], Path]) -> Iterator[None]:
    """During the block, appends messages that cannot be written to standard error to this file.

    The function is called for every such message, because the file's folder may be renamed.
    """
    for handler in _handlers():
        handler.instead, handler.has_told = file, False
    try:
        yield
    finally:
        for handler in _handlers():
            handler.instead = None


def counted(number: int, thing: str) -> str:
    """Returns the number and the thing in the singular or in the plural, such as "1 run"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def can_show_a_bar() -> bool:
    """Returns whether standard error is a terminal with a width, on which a bar can be drawn.

    The terminal of a container (`docker run -t`) or of `script` may have a width of 0.
    """
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # A notebook's stream has no descriptor.
        return True


def open_closed_streams() -> None:
    """Opens /dev/null for each standard stream that this process began without (`2>&-`).

    Otherwise the system would give the number of the stream to the next file that is opened, and
    the messages of C libraries would go into this file.
    """
    for number, (name, mode) in _STREAMS.items():
        try:
            os.fstat(number)
        except OSError:
            discard(number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def discard(stream: int) -> None:
    """Redirects a standard stream to /dev/null, so that later output is dropped."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != stream:
        os.dup2(nowhere, stream)
        os.close(nowhere)
    else:
        os.set_inheritable(stream, True)


def _handlers() -> list[_StandardError]:
    handlers = logging.getLogger("mobilellm_jax").handlers
    return [handler for handler in handlers if isinstance(handler, _StandardError)]
