"""Tests the files that a run and an evaluation write, and the rows of tasks."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mobilellm_jax.evaluate.journal import Journal
from mobilellm_jax.evaluate.task_data import TASK_DATA, read_rows
from mobilellm_jax.train.metrics import read_metrics
from tests.fuzz.hostile import damaged_bytes, damaged_json, fuzz


def test_metrics(tmp_path: Path) -> None:
    records = [
        {"step": 1, "train/loss": 2.5, "train/attention": "xla"},
        {"step": 2, "train/loss": 2.25},
    ]
    lines = [json.dumps(record).encode() for record in records]

    @st.composite
    def inputs(draw: DrawFn) -> bytes:
        changed = [draw(damaged_json(records[0])), lines[1]]
        return (
            draw(damaged_bytes(b"\n".join(lines))) if draw(st.booleans()) else b"\n".join(changed)
        )

    def parse(content: bytes) -> None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
        for record in read_metrics(tmp_path / "metrics.jsonl"):
            assert record["step"] - 1 < float("inf")

    fuzz(parse, inputs(), tmp_path, valid=b"\n".join(lines))


def test_journal(tmp_path: Path) -> None:
    whose = {"format": 1, "weights": "x"}
    file = tmp_path / "journal.jsonl"
    first = json.dumps(whose).encode()
    answers = [["a" * 32, [-1.5, True]], ["b" * 32, "text"]]
    valid = b"".join(json.dumps(line).encode() + b"\n" for line in answers)

    @st.composite
    def inputs(draw: DrawFn) -> bytes:
        if draw(st.booleans()):
            return first + b"\n" + draw(damaged_bytes(valid))
        return first + b"\n" + draw(damaged_json(answers[0])) + b"\n" + valid

    def parse(content: bytes) -> None:
        file.write_bytes(content)
        for answer in Journal(file, whose).answers.values():
            if not isinstance(answer, str):
                likelihood, likeliest = answer
                assert type(likelihood) is float and type(likeliest) is bool

    fuzz(parse, inputs(), tmp_path, valid=first + b"\n" + valid, refuses=False)


ROWS = {
    "arc_easy": {
        "question": "q",
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "boolq": {"passage": "p", "question": "q", "label": 1},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    "social_iqa": {
        "context": "c",
        "question": "q",
        "answerA": "a",
        "answerB": "b",
        "answerC": "c",
        "label": "3",
    },
    "hellaswag": {
        "activity_label": "x",
        "ctx_a": "a",
        "ctx_b": "b",
        "endings": ["c", "d"],
        "label": "1",
    },
    "winogrande": {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"},
    "triviaqa": {"question": "q", "answer": {"aliases": ["a"]}},
    "race_middle": {
        "article": "a",
        "problems": "[{'question': 'q', 'options': ['a', 'b', 'c', 'd'], 'answer': 'A'}]",
    },
    "wikitext": {"page": "p"},
}


@pytest.mark.parametrize("task", ROWS)
def test_rows_of_a_task(task: str, tmp_path: Path) -> None:
    def parse(content: bytes) -> None:
        (tmp_path / "rows.jsonl").write_bytes(content)
        assert read_rows(tmp_path / "rows.jsonl", TASK_DATA[task].check)

    valid = json.dumps(ROWS[task]).encode()
    fuzz(parse, damaged_json(ROWS[task]), tmp_path, valid=valid, share=0.3)


def test_literals_in_the_rows_of_race(tmp_path: Path) -> None:
    row = ROWS["race_middle"]
    deep = [
        "[" * 300,
        "-" * 9000,
        "(" * 90,
        "{" * 9000,
        "1" + "0" * 5000,
        "__import__('os')",
        "{[]}",
    ]

    @st.composite
    def inputs(draw: DrawFn) -> bytes:
        problems = draw(damaged_bytes(str(row["problems"]).encode())).decode("utf-8", "replace")
        at = draw(st.integers(0, len(problems)))
        problems = problems[:at] + draw(st.sampled_from(["", *deep])) + problems[at:]
        return json.dumps({**row, "problems": problems}).encode()

    def parse(content: bytes) -> None:
        (tmp_path / "rows.jsonl").write_bytes(content)
        assert read_rows(tmp_path / "rows.jsonl", TASK_DATA["race_middle"].check)

    fuzz(parse, inputs(), tmp_path, valid=json.dumps(row).encode())
