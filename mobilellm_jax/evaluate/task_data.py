"""The tasks of the paper's tables, and their rows from local files instead of a download.

A folder of such files holds one folder per data set, with JSON lines in the layout of the data
set's rows on the Hugging Face Hub: the split that is scored (`test.jsonl`, `validation.jsonl`) and
`fewshot.jsonl`, from which examples are drawn. Every row is checked before any is scored.
"""

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.strict_json import shown

FEWSHOT = "fewshot"
_SHOWN_CHOICES = 20
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A data set: where its rows are, and what they must be."""

    folder: str
    scored: str  # the file of the split that is scored, without .jsonl
    full_rows: int  # that split's, in the published data set
    check: Callable[[Row], str]  # what is wrong with a row, or ""
    fewshot: str = FEWSHOT  # the file that examples are drawn from

    def files(self, data_dir: Path, num_fewshot: int) -> dict[str, Path]:
        """Returns the files that are read, by name of the split."""
        names = dict.fromkeys([self.scored, *([self.fewshot] if num_fewshot else [])])
        return {name: data_dir / self.folder / f"{name}.jsonl" for name in names}


def read_rows(file: Path, check: Callable[[Row], str]) -> list[Row]:
    """Returns the rows of a file of JSON lines.

    Raises:
      MissingFileError: if there is no such file.
      UserError: naming the file and the line that is not what it should be.
    """
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; it should hold JSON lines.")
    rows = []
    # Not str.splitlines(), which also splits at U+2028 and its like inside a string.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = strict_json.parse(line)
        except strict_json.JsonError as error:
            raise _bad_line(file, number, str(error)) from None
        wrong = check(row) if isinstance(row, dict) else "is not a JSON object."
        if wrong:
            raise _bad_line(file, number, wrong)
        rows.append(row)
    if not rows:
        raise UserError(f"{file} has no rows; a task needs at least one.")
    return rows


def _bad_line(file: Path, number: int, wrong: str) -> UserError:
    return UserError(f"{file}, line {number} {wrong} Correct the line or take it out.")


def _fields(row: Mapping[str, Any], **types: type | tuple[type, ...]) -> str:
    """Returns what is wrong with the presence and types of the fields."""
    for name, expected in types.items():
        if name not in row:
            return f"has no {name!r}."
        value = row[name]
        # In JSON true is no number.
        if not isinstance(value, expected) or isinstance(value, bool):
            found = type(value).__name__
            named = expected if isinstance(expected, tuple) else (expected,)
            wanted = " or ".join(each.__name__ for each in named)
            return f"has {name}={shown(value)}, of type {found}; it must be of type {wanted}."
        if isinstance(value, str) and not _is_text(value):
            return f"has {name}={shown(value)}, with half a surrogate pair, which is no character."
    return ""


def _strings(name: str, values: list[Any], count: int | None = None) -> str:
    if not values or not all(isinstance(value, str) and _is_text(value) for value in values):
        return f"has {name}={shown(values)}, which must be a list of strings."
    if count is not None and len(values) != count:
        return f"has {len(values)} {name}, which must be {count}."
    return ""


def _one_of(name: str, value: Any, choices: Sequence[Any]) -> str:
    some = ", ".join(map(shown, choices[:_SHOWN_CHOICES]))
    return "" if value in choices else f"has {name}={shown(value)}, which must be one of {some}."


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _lettered(question: str) -> Callable[[Row], str]:
    """ARC and OpenBookQA: choices with labels of their own."""

    def check(row: Row) -> str:
        wrong = _fields(row, **{question: str, "choices": dict, "answerKey": str})
        wrong = wrong or _fields(row["choices"], text=list, label=list)
        if wrong:
            return wrong
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        return (
            _strings("choices.text", texts)
            or _strings("choices.label", labels, len(texts))
            or _one_of("answerKey", row["answerKey"].lstrip(), labels)
        )

    return check


def _check_boolq(row: Row) -> str:
    wrong = _fields(row, passage=str, question=str, label=int)
    return wrong or _one_of("label", row["label"], (0, 1))


def _check_piqa(row: Row) -> str:
    wrong = _fields(row, goal=str, sol1=str, sol2=str, label=int)
    return wrong or _one_of("label", row["label"], (0, 1))


def _check_siqa(row: Row) -> str:
    texts = dict.fromkeys(("context", "question", "answerA", "answerB", "answerC", "label"), str)
    return _fields(row, **texts) or _one_of("label", row["label"], ("1", "2", "3"))


def _check_hellaswag(row: Row) -> str:
    wrong = _fields(
        row, activity_label=str, ctx_a=str, ctx_b=str, endings=list, label=(int, str)
    ) or _strings("endings", row["endings"])
    choices = [str(n) for n in range(len(row["endings"]))] if not wrong else []
    return wrong or _one_of("label", str(row["label"]), choices)


def _check_winogrande(row: Row) -> str:
    wrong = _fields(row, sentence=str, option1=str, option2=str, answer=str)
    wrong = wrong or _one_of("answer", row["answer"], ("1", "2"))
    if not wrong and "_" not in row["sentence"]:
        return f"has sentence={shown(row['sentence'])}, without the _ for an option."
    return wrong


def _check_triviaqa(row: Row) -> str:
    wrong = _fields(row, question=str, answer=dict) or _fields(row["answer"], aliases=list)
    return wrong or _strings("answer.aliases", row["answer"]["aliases"])


def _check_race(row: Row) -> str:
    wrong = _fields(row, article=str, problems=str)
    if wrong:
        return wrong
    try:
        problems = ast.literal_eval(row["problems"])
    except (ValueError, SyntaxError, TypeError) as error:
        return f"has problems that are no Python literal: {error}."
    except (MemoryError, RecursionError):  # of Python's parser, whatever memory there is
        return "has problems that are nested too deep for a Python literal."
    if not isinstance(problems, list) or not problems:
        return "has problems that are no list with at least one of them."
    for problem in problems:
        if not isinstance(problem, dict):
            return f"has a problem that is not a dict: {shown(problem)}."
        wrong = (
            _fields(problem, question=str, options=list, answer=str)
            or _strings("options", problem["options"], 4)
            or _one_of("answer", problem["answer"], ("A", "B", "C", "D"))
        )
        if wrong:
            return f"has a problem that {wrong}"
    return ""


def _check_wikitext(row: Row) -> str:
    return _fields(row, page=str)


_TRIVIAQA = TaskData("triviaqa", "validation", 17_944, _check_triviaqa)
TASK_DATA: Mapping[str, TaskData] = {
    "arc_easy": TaskData("arc_easy", "test", 2376, _lettered("question")),
    "arc_challenge": TaskData("arc_challenge", "test", 1172, _lettered("question")),
    "boolq": TaskData("boolq", "validation", 3270, _check_boolq),
    "piqa": TaskData("piqa", "validation", 1838, _check_piqa),
    "social_iqa": TaskData("siqa", "validation", 1954, _check_siqa),
    "hellaswag": TaskData("hellaswag", "validation", 10_042, _check_hellaswag),
    "openbookqa": TaskData("openbookqa", "test", 500, _lettered("question_stem")),
    "winogrande": TaskData("winogrande", "validation", 1267, _check_winogrande),
    "triviaqa": _TRIVIAQA,
    "triviaqa_1shot": _TRIVIAQA,
    "triviaqa_5shot": _TRIVIAQA,
    "triviaqa_64shot": _TRIVIAQA,
    # Of an article only the last question is scored, so the rows are the articles. The harness
    # knows no other split of RACE, and draws examples from the one that it scores.
    "race_middle": TaskData("race", "middle", 362, _check_race, fewshot="middle"),
    "race_high": TaskData("race", "high", 1045, _check_race, fewshot="high"),
    "wikitext": TaskData("wikitext", "test", 62, _check_wikitext),
}
"""Task -> its data. The names are lm-evaluation-harness', as far as it knows the task."""

ZERO_SHOT = (
    *("arc_easy", "arc_challenge", "boolq", "piqa", "social_iqa", "hellaswag", "openbookqa"),
    "winogrande",
)
QUESTIONS = ("triviaqa_1shot", "triviaqa_5shot", "triviaqa_64shot", "race_middle", "race_high")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "mobilellm": (*ZERO_SHOT, *QUESTIONS),
    "mobilellm_zero_shot": ZERO_SHOT,
    "mobilellm_questions": QUESTIONS,
}
"""Group -> tasks: the paper's tables of eight zero-shot tasks (3, 8) and of questions (4)."""
