"""Draws PNG pictures with matplotlib; no setting of the user's matplotlib changes them.

Notebooks set MPLBACKEND to a backend of their own, and a command that a notebook starts inherits
the variable. matplotlib then fails at its import, although `Figure` needs no such backend. The
user's matplotlibrc may ask for LaTeX or for other sizes. Text in a picture, such as the name of a
run, may contain a dollar sign, which does not begin a formula.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BACKEND = "MPLBACKEND"
_LOOK = {"text.parse_math": False}


def png(
    draw: Callable[["Figure"], object],
    size_in: tuple[float, float],
    dpi: int,
    look: Mapping[str, Any] | None = None,
) -> bytes:
    """Returns a PNG file with the figure that `draw` fills; `look` are settings of matplotlib."""
    with _without_pyplots_backend():
        import matplotlib.style
        from matplotlib.figure import Figure
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", {**_LOOK, **(look or {})}]):
        figure = Figure(figsize=size_in, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def show_at_least(axes: "Axes", axis: Literal["x", "y"], span: float) -> None:
    """Widens an axis to `span`, so that noise that is smaller does not fill the picture."""
    low, high = getattr(axes, f"get_{axis}lim")()
    if (missing := span - (high - low)) > 0:
        getattr(axes, f"set_{axis}lim")(low - missing / 2, high + missing / 2)


def shorten(text: str, length: int) -> str:
    """Returns the text; a text of more than `length` characters loses its middle."""
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


@contextlib.contextmanager
def _without_pyplots_backend() -> Iterator[None]:
    backend = os.environ.pop(_BACKEND, None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ[_BACKEND] = backend
