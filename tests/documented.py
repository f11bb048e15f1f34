"""Finds the commands in README, in docs/, in configs/ and in the help of every command."""

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mobilellm_jax.cli.main import COMMANDS, import_command

ROOT = Path(__file__).parent.parent
_COMMAND = re.compile(r"(?:cat \S+ \| )?(?:\.venv/bin/)?mobilellm (?P<args>\w+ --.*)")


def documented_commands() -> Iterator[tuple[str, list[str]]]:
    """Yields (place, arguments) for each command that a user can copy as it stands."""
    texts = {name: inspect.getdoc(import_command(name)) or "" for name in COMMANDS}
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.py")]
    texts |= {file.name: file.read_text() for file in sorted(files)}
    for place, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            match = _COMMAND.match(line.strip().removeprefix("Run:").strip())
            if match and " ... " not in match["args"]:
                yield place, shlex.split(match["args"], comments=True)
