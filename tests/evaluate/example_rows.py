"""Rows for every task, in the layout of the published data sets, and the requests they lead to."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Ask = tuple[str, str]  # context, continuation

_COLOURS = ("red", "blue", "green", "grey", "black", "white", "brown", "pink")


def arc(i: int) -> Row:
    labels = ["1", "2", "3"] if i % 2 else ["A", "B", "C"]
    return {
        "id": f"arc{i}",
        "question": f"Which colour is {_COLOURS[i]}?",
        "choices": {"text": [_COLOURS[i], "none at all", "all"], "label": labels},
        "answerKey": labels[i % 3],
    }


def openbookqa(i: int) -> Row:
    return {
        "id": f"obqa{i}",
        "question_stem": f"The {_COLOURS[i]} sun",
        "choices": {"text": ["shines", "rains", "sings", "ends"], "label": ["A", "B", "C", "D"]},
        "answerKey": f" {'ABCD'[i % 4]}",
    }


def boolq(i: int) -> Row:
    return {
        "question": f"is the sky {_COLOURS[i]}",
        "passage": f"Sky -- The sky is {_COLOURS[i]}.\u2028Mostly.",
        "idx": i,
        "label": i % 2,
    }


def piqa(i: int) -> Row:
    return {"goal": f"Paint it {_COLOURS[i]}.", "sol1": "Use paint.", "sol2": "No", "label": i % 2}


def siqa(i: int) -> Row:
    return {
        "context": f"Ann wore {_COLOURS[i]}.",
        "question": "Why?",
        **{"answerA": "it fits", "answerB": "a bet", "answerC": "no reason"},
        "label": str(1 + i % 3),
    }


def hellaswag(i: int) -> Row:
    return {
        "ind": 7,
        "activity_label": "Painting",
        "ctx_a": f"A  wall is {_COLOURS[i]}.",
        "ctx_b": "then ANN" if i % 2 else "",
        "endings": ["paints [title] it.", "sits [substeps] down.", "runs.", "is a wall."],
        "label": str(i % 4),
    }


def winogrande(i: int) -> Row:
    sentence = f"The ball missed the vase because the _ was {_COLOURS[i]} ."
    return {"sentence": sentence, "option1": "ball", "option2": "vase", "answer": str(1 + i % 2)}


def triviaqa(i: int) -> Row:
    aliases = [_COLOURS[i].title(), _COLOURS[i], "a colour"]
    return {
        "question": f"What is {_COLOURS[i]}" + "?" * (i % 2),
        "question_id": f"tc_{i}",
        "answer": {"value": "not shown", "aliases": aliases},
    }


def race(i: int) -> Row:
    options = ["paint", "rain", "night", "day"]
    questions = (
        f"What is {_COLOURS[i]}?",
        "It came from  _  .",
        "The wall  _",
        "Then it was  _  .",
    )
    problems = [
        {"question": question, "options": options, "answer": answer}
        for question, answer in zip(questions, "ABCD", strict=True)
    ]
    return {"article": f"A {_COLOURS[i]} wall.", "problems": str(problems[: 4 - i % 4])}


def wikitext(i: int) -> Row:
    return {"page": f" = {_COLOURS[i]} = \n It is a 1 @,@ 000 @-@ fold <unk> colour .\n" * (i + 1)}


ROWS = {
    "arc_easy/test": arc,
    "arc_challenge/test": arc,
    "openbookqa/test": openbookqa,
    "boolq/validation": boolq,
    "piqa/validation": piqa,
    "siqa/validation": siqa,
    "hellaswag/validation": hellaswag,
    "winogrande/validation": winogrande,
    "triviaqa/validation": triviaqa,
    "race/high": race,
    "race/middle": race,
    "wikitext/test": wikitext,
}


def write_rows(data_dir: Path, count: int = 3) -> None:
    """Writes `count` rows to score and five examples for every task."""
    for name, row in ROWS.items():
        folder, scored = name.split("/")
        (data_dir / folder).mkdir(parents=True, exist_ok=True)
        _write(data_dir / folder / f"{scored}.jsonl", [row(i) for i in range(count)])
        if folder not in ("race", "wikitext"):
            _write(data_dir / folder / "fewshot.jsonl", [row(i) for i in range(3, 8)])


def _write(file: Path, rows: list[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", "utf-8")


# The requests for the first row of each task, written by hand from the task files of
# lm-evaluation-harness. The first article of RACE has four questions.
ASKED: dict[str, list[Ask]] = {
    "arc_easy": [
        ("Question: Which colour is red?\nAnswer:", " red"),
        ("Question: Which colour is red?\nAnswer:", " none at all"),
        ("Question: Which colour is red?\nAnswer:", " all"),
    ],
    "arc_challenge": [
        ("Question: Which colour is red?\nAnswer:", " red"),
        ("Question: Which colour is red?\nAnswer:", " none at all"),
        ("Question: Which colour is red?\nAnswer:", " all"),
    ],
    "openbookqa": [("The red sun", f" {verb}") for verb in ("shines", "rains", "sings", "ends")],
    "boolq": [
        ("Sky -- The sky is red.\u2028Mostly.\nQuestion: is the sky red?\nAnswer:", " no"),
        ("Sky -- The sky is red.\u2028Mostly.\nQuestion: is the sky red?\nAnswer:", " yes"),
    ],
    "piqa": [
        ("Question: Paint it red.\nAnswer:", " Use paint."),
        ("Question: Paint it red.\nAnswer:", " No"),
    ],
    "social_iqa": [
        ("Q: Ann wore red. Why?\nA:", " it fits"),
        ("Q: Ann wore red. Why?\nA:", " a bet"),
        ("Q: Ann wore red. Why?\nA:", " no reason"),
    ],
    "hellaswag": [
        ("Painting: A wall is red.", " paints. it."),
        ("Painting: A wall is red.", " sits down."),
        ("Painting: A wall is red.", " runs."),
        ("Painting: A wall is red.", " is a wall."),
    ],
    "winogrande": [
        ("The ball missed the vase because the ball", " was red ."),
        ("The ball missed the vase because the vase", " was red ."),
    ],
    "race_high": [
        (
            "Article: A red wall.\n\n"
            "Question: What is red?\nAnswer: paint\n"
            "It came from rain\n"
            "Question: The wall  _\nAnswer: night\n"
            "Then it was  _  .",
            f" {option}",
        )
        for option in ("paint", "rain", "night", "day")
    ],
}
ASKED["race_middle"] = ASKED["race_high"]
