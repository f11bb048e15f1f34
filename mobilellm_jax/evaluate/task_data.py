"""Lists the tasks of the paper's tables, and reads the rows of tasks from local files.

A local folder of rows contains one folder per data set. Its files hold JSON lines with the same
fields as the rows of the data set on the Hugging Face Hub. The rows to score are in `test.jsonl` or
`validation.jsonl`, and the examples are in `fewshot.jsonl`. All rows are checked before the first
row is scored.
"""

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.storage import file_kind, strict_json
from mobilellm_jax.storage.strict_json import JsonError, shown

FEWSHOT = "fewshot"
_SHOWN_CHOICES = 20
Row = dict[str, Any]
Check = Callable[[Row], None]
"""A function that raises a JsonError if a row does not have the fields of its data set."""


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task: its definition in lm-evaluation-harness, the files of its rows, and their check."""

    harness_file: str  # File in the harness' folder of tasks, without .yaml.
    folder: str
    scored: str  # Name of the scored split, and of its file without .jsonl.
    full_rows: int  # Number of rows in the scored split of the published data set.
    check: Check
    fewshot: str = FEWSHOT  # Name of the file with the examples, without .jsonl.
    shots: int | None = None  # Number of examples, if the task's name fixes this number.

    def files(self, data_dir: Path, num_fewshot: int) -> dict[str, Path]:
        """Returns a dict from the name of each needed split to its file."""
        names = dict.fromkeys([self.scored, *([self.fewshot] if num_fewshot else [])])
        return {name: data_dir / self.folder / f"{name}.jsonl" for name in names}


def read_rows(file: Path, check: Check) -> list[Row]:
    """Returns the rows of a file of JSON lines.

    Raises:
      MissingFileError: if the file does not exist.
      UserError: if a row is wrong; the message names the file and the line.
    """
    if not file.is_file():
        raise MissingFileError(f"{file} {file_kind.absence(file)}; it should hold JSON lines.")
    rows = strict_json.read_lines(
        file,
        lambda row: check(strict_json.as_type(row, dict[str, Any], "the row")),
        whole=True,
    )
    if not rows:
        raise UserError(f"{file} has no rows; a task needs at least one row.")
    return rows


def _one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        some = ", ".join(map(shown, choices[:_SHOWN_CHOICES]))
        raise JsonError(f"{name}={shown(value)} must be one of {some}.")


def _texts(holder: Row, key: str, name: str = "") -> list[str]:
    texts: list[str] = strict_json.get(holder, key, list[str], name=name)
    if not texts:
        raise JsonError(f"{name + '.' if name else ''}{key}=[] must have at least one text.")
    return texts


def _labelled(label: str, kind: type, choices: Sequence[Any], *texts: str) -> Check:
    """Returns a check that the fields `texts` are strings and the field `label` is in `choices`."""

    def check(row: Row) -> None:
        for name in texts:
            strict_json.get(row, name, str)
        _one_of(label, strict_json.get(row, label, kind), choices)

    return check


def _lettered(question: str) -> Check:
    """Returns the check for rows of ARC and OpenBookQA, which list a label for each choice."""

    def check(row: Row) -> None:
        strict_json.get(row, question, str)
        choices = strict_json.get(row, "choices", dict[str, Any])
        texts, labels = (_texts(choices, key, "choices") for key in ("text", "label"))
        if len(texts) != len(labels):
            raise JsonError(
                f"choices.label has {len(labels)} entries and choices.text has {len(texts)}; both "
                "must have the same number."
            )
        _one_of("answerKey", strict_json.get(row, "answerKey", str).lstrip(), labels)

    return check


def _check_hellaswag(row: Row) -> None:
    for name in ("activity_label", "ctx_a", "ctx_b"):
        strict_json.get(row, name, str)
    endings = _texts(row, "endings")
    # Some copies of the data set store the label as a string, and others as a number.
    kind = str if isinstance(row.get("label"), str) else int
    _one_of("label", strict_json.get(row, "label", kind), [kind(n) for n in range(len(endings))])


def _check_winogrande(row: Row) -> None:
    _labelled("answer", str, ("1", "2"), "sentence", "option1", "option2")(row)
    if "_" not in row["sentence"]:
        raise JsonError(f"sentence={shown(row['sentence'])} must have a _ in place of the option.")


def _check_triviaqa(row: Row) -> None:
    strict_json.get(row, "question", str)
    _texts(strict_json.get(row, "answer", dict[str, Any]), "aliases", "answer")


def _check_race(row: Row) -> None:
    strict_json.get(row, "article", str)
    literal = strict_json.get(row, "problems", str)
    try:
        problems = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError) as error:
        raise JsonError(f"problems must be a Python literal: {error}.") from error
    except (MemoryError, RecursionError):  # Python's parser raises both, even if memory is free.
        raise JsonError("problems is nested too deep for a Python literal.") from None
    if not isinstance(problems, list) or not problems:
        raise JsonError("problems must be a list with at least one problem.")
    for i, problem in enumerate(problems):
        name = f"problems[{i}]"
        strict_json.get(problem, "question", str, name=name)
        options = _texts(problem, "options", name)
        if len(options) != 4:
            raise JsonError(f"{name}.options has {len(options)} options; it must have 4.")
        answer = strict_json.get(problem, "answer", str, name=name)
        _one_of(f"{name}.answer", answer, ("A", "B", "C", "D"))


def _check_wikitext(row: Row) -> None:
    strict_json.get(row, "page", str)


_TRIVIAQA = TaskData("triviaqa/default", "triviaqa", "validation", 17_944, _check_triviaqa)
_BOOLQ = _labelled("label", int, (0, 1), "passage", "question")
_PIQA = _labelled("label", int, (0, 1), "goal", "sol1", "sol2")
_SIQA = _labelled(
    "label", str, ("1", "2", "3"), "context", "question", "answerA", "answerB", "answerC"
)
TASK_DATA: Mapping[str, TaskData] = {
    "arc_easy": TaskData("arc/arc_easy", "arc_easy", "test", 2376, _lettered("question")),
    "arc_challenge": TaskData(
        "arc/arc_challenge", "arc_challenge", "test", 1172, _lettered("question")
    ),
    "boolq": TaskData("super_glue/boolq/default", "boolq", "validation", 3270, _BOOLQ),
    "piqa": TaskData("piqa/piqa", "piqa", "validation", 1838, _PIQA),
    "social_iqa": TaskData("siqa/siqa", "siqa", "validation", 1954, _SIQA),
    "hellaswag": TaskData(
        "hellaswag/hellaswag", "hellaswag", "validation", 10_042, _check_hellaswag
    ),
    "openbookqa": TaskData(
        "openbookqa/openbookqa", "openbookqa", "test", 500, _lettered("question_stem")
    ),
    "winogrande": TaskData(
        "winogrande/default", "winogrande", "validation", 1267, _check_winogrande
    ),
    "triviaqa": _TRIVIAQA,
    "triviaqa_1shot": dataclasses.replace(_TRIVIAQA, shots=1),
    "triviaqa_5shot": dataclasses.replace(_TRIVIAQA, shots=5),
    "triviaqa_64shot": dataclasses.replace(_TRIVIAQA, shots=64),
    # A row of RACE is an article with several questions, and the harness scores only the last
    # question. The harness defines no other split of RACE, so the examples come from the scored
    # split.
    "race_middle": TaskData("race/race", "race", "middle", 362, _check_race, fewshot="middle"),
    "race_high": TaskData("race/race", "race", "high", 1045, _check_race, fewshot="high"),
    "wikitext": TaskData("wikitext/wikitext", "wikitext", "test", 62, _check_wikitext, shots=0),
}
"""Our tasks by name. If lm-evaluation-harness has the task too, it uses the same name."""

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
"""Groups of tasks: the eight zero-shot tasks (Tables 3 and 8), the questions (Table 4), or all."""
