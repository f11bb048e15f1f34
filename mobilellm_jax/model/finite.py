"""Refuses weights that contain NaN or infinity, in models of every format."""

from collections.abc import Sequence

import numpy as np

from mobilellm_jax.errors import UserError


def non_finite(name: str, array: np.ndarray) -> list[str]:
    """Returns a list with one message if values are NaN or infinite, and otherwise []."""
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    return [f"{name} has {bad:,} of {array.size:,}"] if bad else []


def refuse_non_finite(where: object, found: Sequence[str]) -> None:
    """Raises a `UserError` if `found`, the messages of `non_finite`, is not empty.

    One such value makes every output of a model useless, and no later error would name the array.
    """
    if not found:
        return
    more = f" ({len(found) - 1} more arrays have some too)" if len(found) > 1 else ""
    raise UserError(
        f"{where} contains weights that are NaN or infinite: {found[0]}{more}. Copy the files "
        "again from their origin. If they are the same there, use an earlier step or another model."
    )
