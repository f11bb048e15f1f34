"""Tests which JSON is refused, and how its values become dataclasses."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.strict_json import JsonError, as_type, get, parse, plain, read, shown


@pytest.mark.parametrize("value", [None, True, -1.5, (1 << 63) - 1, "é\U0001f600", [], {"a": [{}]}])
def test_values_equal_those_of_pythons_reader(value: Any) -> None:
    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not JSON \(Expecting value in line 1, column 1\)"),
        (b'{"a": 1', r"is not JSON \(Expecting ',' delimiter in line 1, column 8\)"),
        (b"\xff", r"is not UTF-8 \(invalid start byte at byte 0\)"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", r"is not JSON \(Unexpected UTF-8 BOM"),
        (b'{"a": 1, "b": 2, "a": 1}', "has the key 'a' twice in one object"),
        (b"NaN", "holds NaN, which is not a number in JSON"),
        (b"[-Infinity]", "holds -Infinity, which is not a number in JSON"),
        (b"1e999", "holds the number 1e999, which is beyond the range of floats"),
        (b"1" * 10_000, "holds the whole number 1{24}..., which has 10,000 digits"),
        (b"[" * 65 + b"]" * 65, "is nested more than 64 deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "is nested more than 64 deep"),
        (b"[" * 100_000, "is nested more than 64 deep"),
    ],
)
def test_refused_texts(content: bytes, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse(content)


def test_the_limits_of_depth_and_size_are_allowed() -> None:
    assert parse("[" * 64 + "]" * 64)
    assert as_type(parse("18446744073709551615"), int) == (1 << 64) - 1
    assert as_type(parse("-9223372036854775808"), int) == -(1 << 63)


@pytest.mark.parametrize("number", [1 << 64, -(1 << 63) - 1, 10**299])
def test_a_whole_number_of_more_than_64_bits_is_refused_only_where_one_is_read(number: int) -> None:
    content = parse(json.dumps({"unread": number}))
    assert content == {"unread": number}
    assert get(content, "unread", float) == pytest.approx(float(number))
    with pytest.raises(JsonError, match="unread=.* must be a whole number of at most 64 bits"):
        get(content, "unread", int)


def test_numbers_that_are_not_finite_are_allowed_on_request() -> None:
    assert math.isnan(parse("NaN", non_finite=True))
    assert parse("-Infinity", non_finite=True) == -math.inf


def test_files_are_named(tmp_path, monkeypatch) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match="x.json does not exist"):
        read(file)
    file.write_text("[1]")
    assert read(file) == [1]
    file.write_text("[1")
    with pytest.raises(JsonError, match="x.json: is not JSON"):
        read(file)
    monkeypatch.setattr(strict_json, "MAX_BYTES", 1)
    with pytest.raises(JsonError, match="x.json: has more than 1 bytes"):
        read(file)


@dataclasses.dataclass(frozen=True)
class Inner:
    number: int
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    kind: Literal["a", "b"]
    inner: tuple[Inner, ...]
    by_name: Mapping[str, Inner]
    texts: list[str] = dataclasses.field(default_factory=list)
    pair: tuple[int, str] = (0, "")
    anything: Any = None


WHOLE = {
    "name": "é",
    "flag": True,
    "kind": "b",
    "inner": [{"number": 1, "share": 2}, {"number": 2}],
    "by_name": {"x": {"number": 3, "share": None}},
}


def test_objects_become_dataclasses() -> None:
    outer = as_type(WHOLE | {"pair": [1, "2"]}, Outer)
    inner = (Inner(1, 2.0), Inner(2, None))
    assert outer == Outer("é", True, "b", inner, {"x": Inner(3, None)}, [], (1, "2"))
    assert type(outer.inner[0].share) is float
    assert as_type(WHOLE | {"texts": ["t"], "anything": [1]}, Outer).texts == ["t"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 1}, "^name=1 must be a text"),
        ({"name": "\ud800"}, "name=.* must be a text without half a surrogate pair"),
        ({"flag": 1}, "flag=1 must be true or false"),
        ({"kind": "c"}, "kind='c' must be one of a, b"),
        ({"kind": []}, "kind=\\[\\] must be one of a, b"),
        ({"inner": {}}, "inner=\\{\\} must be an array"),
        ({"inner": [{"number": True}]}, "inner\\[0\\].number=True must be a whole number"),
        ({"inner": [{"number": 1.0}]}, "inner\\[0\\].number=1.0 must be a whole number"),
        ({"inner": [{"number": 1, "share": "1"}]}, "inner\\[0\\].share='1' must be a number"),
        ({"inner": [{"share": 1.0}]}, "inner\\[0\\].number is missing"),
        ({"by_name": []}, "by_name=\\[\\] must be an object"),
        ({"by_name": {"\x1b[2J": 1}}, r"by_name.'\\x1b\[2J'=1 must be an object"),
        ({"texts": "text"}, "texts='text' must be an array"),
        ({"pair": [1]}, "pair=\\[1\\] must be an array of 2"),
        ({"pair": [1, 2]}, "pair\\[1\\]=2 must be a text"),
        ({"other": 1}, "^other is an unknown field"),
        ({"\n": 1}, r"^'\\n' is an unknown field"),
    ],
)
def test_wrong_fields_are_named_with_their_values(changes: Any, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        as_type(WHOLE | changes, Outer)


def test_a_value_that_is_not_an_object() -> None:
    with pytest.raises(JsonError, match="^must be an object"):
        as_type([], Outer)


def test_one_field_of_an_object() -> None:
    holder = {"a": 1, "b": None}
    assert get(holder, "a", int) == 1
    assert get(holder, "b", int, 7) == get(holder, "c", int, 7) == 7
    with pytest.raises(JsonError, match=r"^x.c is missing"):
        get(holder, "c", int, name="x")
    with pytest.raises(JsonError, match=r"^b=None must be a whole number"):
        get(holder, "b", int)
    with pytest.raises(JsonError, match=r"^a=1 must be a text"):
        get(holder, "a", str, "")
    with pytest.raises(JsonError, match=r"^x=\[\] must be an object"):
        get([], "a", int, name="x")


def test_messages_stay_short() -> None:
    assert len(shown("x" * 10**6)) < 100
    assert plain("model.norm.weight") == "model.norm.weight"
    assert plain("x" * 100).startswith("'xxx") and len(plain("x" * 10**6)) < 100
    assert plain("") == "''" and plain("\x1b[2J") == "'\\x1b[2J'"
    assert len(shown({str(i): list(range(1000)) for i in range(1000)})) < 1000
