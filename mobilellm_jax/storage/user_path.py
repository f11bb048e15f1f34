"""Turns a path that a user wrote as text into a `Path`."""

import os
from pathlib import Path

from mobilellm_jax.errors import UserError


def user_path(name: str, text: str | Path) -> Path:
    """Returns the path that the flag or field `name` contains; a leading `~` is the home folder.

    A shell replaces `~` only at the beginning of a word, so `--output=~/x` arrives with the `~`. A
    `Path` is returned unchanged.

    Raises:
      UserError: if the text is empty or a URL, or the system does not know the home folder.
    """
    if isinstance(text, Path):
        return text
    if not text:
        # A shell also passes an empty text for a variable that is not set.
        raise UserError(f"{name}= is empty; name a file or folder, or leave this setting out.")
    if "://" in text:
        raise UserError(
            f"{name}={text!r} is a URL, and a path on this machine is needed: without file://, or "
            "in a folder where the bucket is mounted."
        )
    return Path(expand_home(name, text))


def expand_home(name: str, text: str) -> str:
    """Returns the text with the home folder in place of a leading `~` or `~USER`.

    Raises:
      UserError: if the system does not know the home folder.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        first = Path(text).parts[0]
        raise UserError(
            f"{name}={text!r} begins with {first}, and the system knows no home folder of this "
            f"user; write the whole path, or ./{text} for a folder with this name."
        )
    return expanded
