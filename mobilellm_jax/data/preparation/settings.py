"""The choices of `prepare`, and the checks of its settings before any work."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from mobilellm_jax.errors import UserError

BadLinePolicy = Literal["stop", "skip"]
Runner = Literal["local", "beam"]


def check_settings(
    sources: Sequence[str],
    weights: Sequence[float] | None,
    tokenizer: Path | None,
    vocab_size: int | None,
    validation_fraction: float,
    workers: int | None,
) -> None:
    """Raises a `UserError` that names the first setting with a wrong value, and the rule."""
    if not sources:
        raise UserError("source is empty; give at least one, for example --source=python_docs.")
    if (tokenizer is None) == (vocab_size is None):
        raise UserError(
            f"tokenizer={str(tokenizer) if tokenizer else None!r} and vocab_size={vocab_size}: "
            "give exactly one, a tokenizer file to use or the size of one to train."
        )
    if tokenizer is None and (ids := [s for s in sources if s.startswith("tokens:")]):
        raise UserError(
            f"source={ids[0]!r} holds token ids, not text to train a tokenizer on; give the "
            "--tokenizer that made them instead of --vocab_size."
        )
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"validation_fraction={validation_fraction} must be at least 0 and less than 1."
        )
    if weights and len(weights) != len(sources):
        raise UserError(
            f"weight={list(weights)} must be given once for each of the {len(sources)} sources, in "
            "their order, or not at all."
        )
    if weights and not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise UserError(
            f"weight={list(weights)} must be greater than 0; leave out a source that is not wanted."
        )
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1.")


def check_choices(on_bad_line: str, runner: str) -> None:
    """Raises a `UserError` for an unknown choice; a Python program can pass any text."""
    for name, value, choices in (
        ("on_bad_line", on_bad_line, BadLinePolicy),
        ("runner", runner, Runner),
    ):
        if value not in get_args(choices):
            raise UserError(f"{name}={value!r} must be one of {', '.join(get_args(choices))}.")
