"""Errors for mistakes that the user can correct.

The command line prints such an error as one message and ends with exit code 2. Any other exception
is a bug of this package, and the command line prints its traceback.
"""

import importlib.util


class UserError(ValueError):
    """The user has to change an input; the message gives the value, the rule and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """The user named a file or a folder that does not exist."""


def require(package: str, extra: str, purpose: str) -> None:
    """Checks that an optional package is installed, before code imports it.

    Args:
      package: import name, such as "pyarrow".
      extra: the extra of `setup.py` that installs the package.
      purpose: what needs the package, such as "a parquet: source".

    Raises:
      UserError: if the package is absent; the message names the extra.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{purpose} needs the package {package}, which is not installed; "
            f"pip install 'mobilellm-jax[{extra}]'."
        )
