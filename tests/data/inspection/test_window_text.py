import ast
import random
from collections.abc import Sequence
from typing import Literal

import pytest

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data.inspection.window_text import escaped, window_lines, wrapped
from mobilellm_jax.data.mixture import mixture_of
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from tests.data.conftest import WriteTokens

TEXTS = ["The quick fox.\n", "", " a\u2581 ⟨b⟩\x1b[0m", "jumps over the lazy dog"]
KINDS = ["trained", "byte_level"]


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def without_rulers(lines: Sequence[str]) -> list[str]:
    return [line.rstrip("- ") if line.startswith("--") else line for line in lines]


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_of_everything(
    kind: str,
    boundaries: Literal["concat", "document_mask"],
    write_tokens: WriteTokens,
    request: pytest.FixtureRequest,
) -> None:
    tokenizer = request.getfixturevalue(kind)
    documents = encoded(tokenizer, TEXTS)
    lengths = [len(document) for document in documents]
    total = sum(lengths)
    data = DataConfig(seq_len=total + 5, boundaries=boundaries)
    mixture = mixture_of(write_tokens(train=documents))
    lines = list(window_lines(mixture, tokenizer, data, 1, 80))
    assert all(len(line) == 80 for line in lines if line.startswith("--"))
    starts = [sum(lengths[:i]) if boundaries == "concat" else 0 for i in range(4)]
    rulers = [
        f"-- positions {start} to {start + length - 1}"
        for start, length in zip(starts, lengths, strict=True)
    ]
    # Where documents do not see each other, the first token of a document is never a target. The
    # first token of a window is never a target.
    bos = "⟨BOS⟩" if boundaries == "concat" else "⟦⟨BOS⟩⟧"
    targets = total - 1 if boundaries == "concat" else total - 4
    assert without_rulers(lines) == [
        f"Window 1 of 1, tokens: {total} tokens, {targets} targets",
        rulers[0],
        "  ⟨BOS⟩The quick fox.\\n",
        "  ⟨EOS⟩",
        rulers[1],
        f"  {bos}⟨EOS⟩",
        rulers[2],
        rf"  {bos} a▁ \u27e8b\u27e9\x1b[0m⟨EOS⟩",
        rulers[3],
        f"  {bos}jumps over the lazy dog⟨EOS⟩",
        "-- padding: 5 positions",
        "",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_one_epoch_add_up_to_the_text(
    kind: str, write_tokens: WriteTokens, request: pytest.FixtureRequest
) -> None:
    """The space before the first word of a window is shown too."""
    tokenizer = request.getfixturevalue(kind)
    text = "The quick brown fox jumps over the lazy dog. It did so many times. " * 4
    documents = encoded(tokenizer, [text])
    stream = mixture_of(write_tokens(train=documents))
    windows = -(-(len(documents[0]) - 1) // 7)
    lines = window_lines(stream, tokenizer, DataConfig(seq_len=7), windows, 200)
    shown = [line.removeprefix("  ") for line in lines if line.startswith("  ")]
    assert len(shown) == windows
    expected = []
    for window in range(windows):
        upto = [tokenizer.decode(documents[0][:end]) for end in (7 * window, 7 * window + 7)]
        part = upto[1].removeprefix(upto[0])
        last = 7 * window + 7 >= len(documents[0])
        expected.append("⟨BOS⟩" * (window == 0) + part + "⟨EOS⟩" * last)
    assert sorted(shown) == sorted(expected)
    assert shown != expected  # in the order of training
    assert any(line.startswith(" ") for line in shown)


def test_borders_that_a_window_does_not_hold(write_tokens: WriteTokens, trained: Tokenizer) -> None:
    documents = encoded(trained, ["The quick brown fox", "jumps over the lazy dog"])
    first, second = map(len, documents)
    assert 5 < first < 9 and second > 10 - first
    data = DataConfig(seq_len=5)
    lines = list(window_lines(mixture_of(write_tokens(train=documents)), trained, data, 4, 80))
    windows = "\n".join(without_rulers(lines)).split("\n\n")
    [at_start] = [window for window in windows if "⟨BOS⟩T" in window]
    [across] = [window for window in windows if "⟨BOS⟩j" in window]
    assert at_start.splitlines()[1] == "-- positions 0 to 4, to be continued"
    rulers = [line for line in across.splitlines() if line.startswith("--")]
    assert rulers == [
        f"-- positions 0 to {first - 6}, begun before",
        f"-- positions {first - 5} to 4, to be continued",
    ]


def test_what_is_no_target_is_in_brackets(write_tokens: WriteTokens, trained: Tokenizer) -> None:
    question, answer = trained.encode("The quick "), trained.encode("fox\n")
    document = [1, *question, *answer, 2]
    mask = [0] * (1 + len(question)) + [1] * (len(answer) + 1)
    dataset = write_tokens(train=[document, document], loss_masks={"train": [mask, mask]})
    data = DataConfig(seq_len=2 * len(document))
    lines = list(window_lines(mixture_of(dataset), trained, data, 1, 80))
    text = [line for line in lines if line.startswith("  ")]
    assert text == [
        "  ⟨BOS⟩⟦The quick ⟧ fox\\n",
        "  ⟨EOS⟩",
        "  ⟦⟨BOS⟩The quick ⟧ fox\\n",
        "  ⟨EOS⟩",
    ]
    assert lines[0].endswith(f"{len(document) * 2} tokens, {2 * (len(answer) + 1)} targets")


def test_a_character_cut_by_a_mask_is_shown_when_it_is_whole(
    write_tokens: WriteTokens, trained: Tokenizer
) -> None:
    document = [1, *trained.encode("a😀b"), 2]
    mask = [1] * len(document)
    mask[4] = 0  # one of the four bytes
    dataset = write_tokens(train=[document], loss_masks={"train": [mask]})
    data = DataConfig(seq_len=len(document))
    shown = list(window_lines(mixture_of(dataset), trained, data, 1, 80))[2]
    assert shown.startswith("  ⟨BOS⟩a\ufffd⟦") and shown.endswith("⟧😀b⟨EOS⟩")


def test_every_window_names_its_source(write_tokens: WriteTokens, trained: Tokenizer) -> None:
    documents = encoded(trained, ["The quick brown fox"] * 2 + ["dog"] * 6)
    dataset = write_tokens(
        train=documents, sources=[("foxes", 0.75, {"train": 2}), ("dogs\x1b", 0.25, {"train": 6})]
    )
    lines = window_lines(mixture_of(dataset), trained, DataConfig(seq_len=5), 8, 80)
    windows = "\n".join(lines).strip().split("\n\n")
    heads = [window.splitlines()[0] for window in windows]
    assert sum("foxes" in head for head in heads) == 6
    assert sum(r"dogs\x1b" in head for head in heads) == 2
    for head, window in zip(heads, windows, strict=True):
        assert ("dogs" in head) == ("dog" in window.replace(head, ""))


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
