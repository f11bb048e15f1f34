"""Reads a text file that the user names."""

from pathlib import Path

from mobilellm_jax.errors import MissingFileError, UserError


def read_text(flag: str, file: Path) -> str:
    """Returns the text of a UTF-8 file with unchanged line ends; raises if it has no text."""
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise MissingFileError(f"{flag}={file} {problem}; name a text file in UTF-8.")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{flag}={file} must be UTF-8, but byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert the file, for example with iconv."
        ) from error
    if not text:
        raise UserError(f"{flag}={file} is empty; name a file with text.")
    return text
