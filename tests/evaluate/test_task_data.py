import json
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax.evaluate.task_data import GROUPS, TASK_DATA, read_rows

PROBLEM = {"question": "What?", "options": ["w", "x", "y", "z"], "answer": "D"}
ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "id": "x",
        "question": "Which?",
        "choices": {"text": ["u", "v", "w"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    },
    "boolq": {"question": "is it", "passage": "It -- is.", "idx": 0, "label": 1},
    "piqa": {"goal": "do", "sol1": "so", "sol2": "thus", "label": 0},
    "social_iqa": {
        "context": "c", "question": "q", "label": "3",
        "answerA": "a", "answerB": "b", "answerC": "c",
    },
    "hellaswag": {
        "activity_label": "Run", "ctx_a": "They run.", "ctx_b": "",
        "endings": ["x", "y"], "label": "1",
    },
    "openbookqa": {
        "question_stem": "The sun",
        "choices": {"text": ["u", "v"], "label": ["A", "B"]},
        "answerKey": " B",
    },
    "winogrande": {"sentence": "As _ said.", "option1": "x", "option2": "y", "answer": "2"},
    "triviaqa": {"question": "Who", "answer": {"value": "X", "aliases": ["X", "x"]}},
    "race_high": {"article": "Text.", "problems": str([PROBLEM, PROBLEM])},
    "wikitext": {"page": " = Title = \n"},
}  # fmt: skip


def damaged(task: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**ROWS[task], **changes}.items() if v is not None}


def problems(**changes: Any) -> str:
    return str([PROBLEM, {**PROBLEM, **changes}])


@pytest.mark.parametrize("task", ROWS)
def test_correct_rows_are_returned_unchanged(task: str, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    # str.splitlines() would break a line at these characters. The last line has no line end.
    rows = [ROWS[task], {**ROWS[task], "extra": "two\u2028lines\x85"}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read_rows(file, TASK_DATA[task].check) == rows


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("arc_easy", damaged("arc_easy", question=None), "question is missing."),
        ("arc_easy", damaged("arc_easy", answerKey="4"), "answerKey='4' must be one of '1'"),
        ("arc_easy", damaged("arc_easy", choices={"text": ["u"]}), "choices.label is missing."),
        ("arc_easy", damaged("arc_easy", choices={"text": [], "label": []}), "choices.text=\\[\\]"),
        ("arc_easy", damaged("arc_easy", choices={"text": ["u"], "label": ["1", "3"]}),
         "choices.label has 2 entries and choices.text has 1"),
        ("arc_easy", damaged("arc_easy", choices=7), "choices=7 must be an object"),
        ("boolq", damaged("boolq", label=True), "label=True must be a whole number"),
        ("boolq", damaged("boolq", label=2), "label=2 must be one of 0, 1"),
        ("boolq", damaged("boolq", passage=None), "passage is missing."),
        ("piqa", damaged("piqa", sol2=7), "sol2=7 must be a text"),
        ("piqa", damaged("piqa", sol2="\ud800"), "sol2=.* must be a text without half a surrogate"),
        ("piqa", damaged("piqa", label=-1), "label=-1 must be one of 0, 1"),
        ("social_iqa", damaged("social_iqa", label="0"), "label='0' must be one of '1'"),
        ("social_iqa", damaged("social_iqa", answerC=None), "answerC is missing."),
        ("hellaswag", damaged("hellaswag", label="2"), "label='2' must be one of '0', '1'"),
        ("hellaswag", damaged("hellaswag", label=2), "label=2 must be one of 0, 1"),
        ("hellaswag", damaged("hellaswag", label=[1]), "label=\\[1\\] must be a whole number"),
        ("hellaswag", damaged("hellaswag", label=True), "label=True must be a whole number"),
        ("hellaswag", damaged("hellaswag", endings=["x", 1]), r"endings\[1\]=1 must be a text"),
        ("openbookqa", damaged("openbookqa", answerKey="C"), "answerKey='C'"),
        ("winogrande", damaged("winogrande", sentence="No."), "must have a _ in place of"),
        ("winogrande", damaged("winogrande", answer=2), "answer=2 must be a text"),
        ("triviaqa", damaged("triviaqa", answer={"aliases": []}), "answer.aliases=\\[\\]"),
        ("triviaqa", damaged("triviaqa", answer={}), "answer.aliases is missing."),
        ("race_high", damaged("race_high", problems="[{"), "problems must be a Python literal"),
        ("race_high", damaged("race_high", problems="[]"), "a list with at least one problem"),
        ("race_high", damaged("race_high", problems="['x']"), r"problems\[0\]='x' must be an"),
        ("race_high", damaged("race_high", problems=problems(answer="E")),
         r"problems\[1\].answer='E' must be one of 'A'"),
        ("race_high", damaged("race_high", problems=problems(options=["w"])),
         "has 1 options; it must have 4"),
        ("race_high", damaged("race_high", problems=[PROBLEM]), "must be a text"),
        ("wikitext", damaged("wikitext", page=None), "page is missing."),
        ("wikitext", [1], "the row=\\[1\\] must be an object."),
    ],
)  # fmt: skip
def test_the_message_for_a_wrong_row_names_file_and_line(
    task: str, row: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(f"{json.dumps(ROWS[task])}\n\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=rf"test\.jsonl, line 3: .*{message}.* delete it"):
        read_rows(file, TASK_DATA[task].check)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"page": "x"}\n{"page": \n', r"line 2: is not JSON .Expecting value"),
        (b'{"page": "x"}\n{"page": "caf\xe9"}\n', r"line 2: is not UTF-8"),
        (b"\n", r"test\.jsonl has no rows"),
    ],
)
def test_a_damaged_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(file, TASK_DATA["wikitext"].check)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl does not exist"):
        read_rows(tmp_path / "test.jsonl", TASK_DATA["wikitext"].check)


def test_examples_come_from_a_separate_file_except_for_race(tmp_path: Path) -> None:
    arc, race = TASK_DATA["arc_easy"], TASK_DATA["race_middle"]
    assert list(arc.files(tmp_path, 0)) == ["test"]
    assert arc.files(tmp_path, 3)["fewshot"] == tmp_path / "arc_easy" / "fewshot.jsonl"
    assert list(race.files(tmp_path, 3)) == ["middle"]


def test_the_groups_are_the_papers_tables() -> None:
    assert len(GROUPS["mobilellm_zero_shot"]) == 8
    assert GROUPS["mobilellm"] == (*GROUPS["mobilellm_zero_shot"], *GROUPS["mobilellm_questions"])
    assert set(GROUPS["mobilellm"]) < set(TASK_DATA)
