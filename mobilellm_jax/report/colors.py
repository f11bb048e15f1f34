"""Colours of the report in a light and a dark theme; a test checks the contrast (WCAG 2.1)."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of the page and of its pictures."""

    background: str
    surface: str  # Background of the header row and first column of a table.
    text: str
    muted: str  # Colour of captions.
    link: str
    line: str  # Colour of borders, but not of text.
    good: str  # Text of a difference in the paper's direction.
    bad: str  # Text of a difference in the opposite direction.
    series: tuple[str, ...]  # Colours of curves and points on `background`.


LIGHT = Theme(
    background="#ffffff",
    surface="#f3f4f6",
    text="#1b1f24",
    muted="#59636e",
    link="#0b57d0",
    line="#d1d9e0",
    good="#116329",
    bad="#a40e26",
    series=(
        *("#0b57d0", "#b35900", "#1a7f37", "#a40e26", "#7a3fc4", "#8a5a44"),
        *("#b0307f", "#59636e", "#6b6b00", "#007a8a"),
    ),
)
DARK = Theme(
    background="#14171c",
    surface="#20252c",
    text="#e8eaed",
    muted="#a3adb8",
    link="#8ab4f8",
    line="#3a424c",
    good="#6fdd8b",
    bad="#ff9492",
    series=(
        *("#8ab4f8", "#f2a65a", "#6fdd8b", "#ff9492", "#c8a6f5", "#d3a68f"),
        *("#f28cc8", "#a3adb8", "#d6d15a", "#63d4e0"),
    ),
)
