import ast
import random

import pytest

from mobilellm_jax.data.inspection.escaping import escaped, wrapped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本 🙂", "plain é 日本 🙂"),
        ("tab\tnewline\nreturn\r", r"tab\tnewline\nreturn\r"),
        ("\x1b[31mred\x07\x00\x7f\x9b", r"\x1b[31mred\x07\x00\x7f\x9b"),
        ("\u202eleft\u2066\u200b\ufeff", r"\u202eleft\u2066\u200b\ufeff"),
        ("\u2028\u2029\xa0\u3000", r"\u2028\u2029\xa0\u3000"),
        ("\ue000\U000f0000\U000e0041", r"\ue000\U000f0000\U000e0041"),
        ("a \\n is not a newline", r"a \\n is not a newline"),
    ],
)
def test_what_could_move_the_cursor_is_escaped(text: str, shown: str) -> None:
    assert "".join(escaped(text)) == shown


def test_given_characters_are_escaped_too() -> None:
    assert "".join(escaped("⟨a⟩", "⟨⟩")) == r"\u27e8a\u27e9"


def test_an_escaped_text_can_be_read_back() -> None:
    rng = random.Random(0)
    points = [c for c in range(0x11_0000) if not 0xD800 <= c <= 0xDFFF]
    for _ in range(200):
        text = "".join(map(chr, rng.choices([*range(0x300), *rng.choices(points, k=500)], k=40)))
        shown = "".join(escaped(text, '"'))
        assert shown.isprintable()
        assert ast.literal_eval('"' + shown.replace('"', r"\"") + '"') == text


def test_lines_are_as_wide_as_the_terminal_shows_them() -> None:
    assert list(wrapped("abcdefgh", 3)) == ["abc", "def", "gh"]
    assert list(wrapped("日本語x", 5)) == ["日本", "語x"]
    assert list(wrapped("e\u0301" * 4, 2)) == ["e\u0301e\u0301", "e\u0301e\u0301"]
    assert list(wrapped([], 5)) == []


def test_no_escape_is_cut_and_newlines_end_lines() -> None:
    assert list(wrapped(escaped("abc\x00d\n\nef\n"), 5)) == ["abc", r"\x00d", r"\n", r"\n", r"ef\n"]
    assert list(wrapped(escaped("ab\\n"), 9)) == [r"ab\\n"]  # a backslash and an n
    assert list(wrapped(["longer than a line"], 5)) == ["longer than a line"]
