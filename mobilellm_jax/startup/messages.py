"""Shows the package's log messages to the user.

Every module logs its messages for the user with `logging.getLogger(__name__)`. A program that
imports this package decides where they go. The command line and its child processes call
`show_messages`.
"""

import contextlib
import logging
import sys


class _StandardError(logging.Handler):
    """Writes messages without a prefix to the current value of `sys.stderr`.

    The handler hides a progress bar of tqdm while it writes, and then draws the bar again.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.ExitStack() as stack:
            if "tqdm" in sys.modules:
                bars = sys.modules["tqdm"].tqdm
                stack.enter_context(bars.external_write_mode(file=sys.stderr))
            print(self.format(record), file=sys.stderr, flush=True)


def show_messages() -> None:
    """Sends messages of this package with level INFO or higher to standard error."""
    logger = logging.getLogger("mobilellm_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # A root handler would repeat each line.
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        logger.addHandler(_StandardError())
