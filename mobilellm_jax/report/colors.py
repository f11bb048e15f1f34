"""The report's colours, light and dark; a test holds their contrast to WCAG 2.1."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """Of the page and of its pictures."""

    background: str
    surface: str  # of tables' heads, notes and code
    text: str
    muted: str  # captions
    link: str
    line: str  # borders; no text
    good: str  # text: the paper's direction
    bad: str  # text: the opposite
    series: tuple[str, ...]  # of curves and points, on `background`


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


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio of two colours "#rrggbb" (WCAG 2.1, 1 to 21)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
