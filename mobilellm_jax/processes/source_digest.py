"""Computes a digest of the source of this package."""

import hashlib
from collections.abc import Sequence
from pathlib import Path


def source_digest(rooms: Sequence[str] = (".",)) -> str:
    """Returns the SHA-256 of the Python files in `rooms` (files or folders of the package)."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for room in rooms:
        place = package / room
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if file.is_relative_to(package / "configs"):
                continue  # A wheel contains these recipes, and in a checkout they are elsewhere.
            digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
