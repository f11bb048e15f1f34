"""Shows the package's log messages to the user.

Every room writes lines for the user with `logging.getLogger(__name__)`. A program that imports this
package decides where they go; a command line and its child processes call `show_messages`.
"""

import contextlib
import logging
import sys


class _StandardError(logging.Handler):
    """Writes messages, without a prefix, to the `sys.stderr` of the moment.

    The handler removes a progress bar of tqdm before it writes, and draws the bar again below.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.ExitStack() as stack:
            if "tqdm" in sys.modules:
                bars = sys.modules["tqdm"].tqdm
                stack.enter_context(bars.external_write_mode(file=sys.stderr))
            print(self.format(record), file=sys.stderr, flush=True)


def show_messages() -> None:
    """Sends the messages of this package, from INFO on, to standard error."""
    logger = logging.getLogger("mobilellm_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may add a handler to the root logger, and repeat each line
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        logger.addHandler(_StandardError())
