"""Scores a model on tasks, by lm-evaluation-harness, or measures the perplexity of a text.

  mobilellm evaluate --checkpoint=runs/mine --tasks=mobilellm --output=scores.json
  mobilellm evaluate --checkpoint=exported/hf --tasks=hellaswag,piqa --limit=200 --data_dir=evals
  mobilellm evaluate --checkpoint=runs/mine --tasks=triviaqa --num_fewshot=5
  mobilellm evaluate --checkpoint=runs/quickstart --perplexity=README.md
  mobilellm evaluate --checkpoint=exported/hf --perplexity=wiki.txt --stride=512 --output=wiki.json

Tasks are those of the installed harness (pip install 'mobilellm-jax[eval]'), and `mobilellm` is
the paper's table: arc_easy, arc_challenge, boolq, piqa, social_iqa, hellaswag, openbookqa and
winogrande (mobilellm_zero_shot), triviaqa with 1, 5 and 64 examples, race_middle and race_high
(mobilellm_questions). The harness downloads their rows, unless --data_dir=DIR has them:
DIR/TASK/test.jsonl or validation.jsonl, whichever the task scores, and fewshot.jsonl for examples
(siqa for social_iqa, one triviaqa, race/middle.jsonl and race/high.jsonl), in the layout of the
data sets' rows. --output=FILE.json gets the harness' own layout; an evaluation that was killed goes
on from FILE.json.journal when it is started again.

For perplexity the text is cut into windows of model.max_seq_len tokens, without overlap; what is
left after the last full window is not scored. With --stride=N every token is scored, after as many
tokens as N leaves in a window.
"""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from mobilellm_jax.cli.errors import UsageError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run folder (its latest step), step folder or Hugging Face directory",
    required=True,
)
_TASKS = flags.DEFINE_list("tasks", [], "tasks or groups of them, separated by commas")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "solved examples before each question", lower_bound=0
)
_LIMIT = flags.DEFINE_integer("limit", None, "rows of each task, for a trial", lower_bound=1)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder with the tasks' rows; see above")
_PERPLEXITY = flags.DEFINE_string("perplexity", None, "text file in UTF-8")
_STRIDE = flags.DEFINE_integer(
    "stride", None, "tokens that each window of the text scores; it reads model.max_seq_len"
)
_OUTPUT = flags.DEFINE_string("output", None, "file for the result, besides the standard output")


def main(argv: list[str]) -> None:
    """Evaluates."""
    del argv  # no config, no overrides
    _check_flags()
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if output is not None:
        _check_output(output)
    if _PERPLEXITY.value:
        _measure_perplexity(Path(_PERPLEXITY.value), output)
    else:
        _evaluate_tasks(output)


def _measure_perplexity(file: Path, output: Path | None) -> None:
    from mobilellm_jax.evaluate.perplexity import perplexity
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.rundir import write_whole

    text = _read_text(file)
    model = open_model(_CHECKPOINT.value)
    result = perplexity(model.config, model.params, model.tokenizer, text, stride=_STRIDE.value)
    record: dict[str, Any] = {"checkpoint": model.origin, "file": str(file)}
    if _STRIDE.value is not None:
        record["stride"] = _STRIDE.value
    content = json.dumps({**record, **dataclasses.asdict(result)}, indent=2) + "\n"
    print(content, end="", flush=True)
    if output is not None:
        write_whole(output, content)


def _evaluate_tasks(output: Path | None) -> None:
    data_dir = Path(_DATA_DIR.value) if _DATA_DIR.value else None
    if data_dir is not None:
        # Read when the libraries are imported: with local files, nothing asks a network.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import jax

    from mobilellm_jax.config import MeshConfig
    from mobilellm_jax.evaluate.harness import HarnessModel
    from mobilellm_jax.evaluate.journal import Journal, identity
    from mobilellm_jax.evaluate.scoring import Scorer
    from mobilellm_jax.evaluate.tasks import as_json, format_results, load_tasks, run_tasks
    from mobilellm_jax.host_memory import keep_freed_memory
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.rundir import write_whole
    from mobilellm_jax.sharding import logical_rules, make_mesh, replicated

    tasks = load_tasks(_TASKS.value, data_dir=data_dir, num_fewshot=_NUM_FEWSHOT.value)
    opened = open_model(_CHECKPOINT.value)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    mesh = make_mesh(MeshConfig())
    params = jax.device_put(opened.params, replicated(mesh))
    path = output.with_name(f"{output.name}.journal") if output else None
    journal = Journal(path, identity(opened.config, params, opened.tokenizer))
    if journal.replaced:
        _say(f"{path} was of another model; starting anew.")
    elif journal.answers:
        _say(f"{path} has {len(journal.answers):,} answers; going on from there.")
    model = HarnessModel(
        opened.config,
        opened.tokenizer,
        Scorer(opened.config, mesh, logical_rules(opened.config, mesh.shape)),
        params,
        journal,
        origin=opened.origin,
    )
    results = run_tasks(model, tasks, _LIMIT.value)
    if model.cut:
        _say(
            f"{model.cut:,} requests were longer than model.max_seq_len="
            f"{opened.config.max_seq_len}; the beginnings of their contexts were left out."
        )
    print(format_results(results, opened.config), end="", flush=True)
    if output is not None:
        write_whole(output, as_json(results))
        journal.remove()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_output(output: Path) -> None:
    """Refuses, before anything is computed, a name that no file can have."""
    if output.is_dir():
        raise IsADirectoryError(f"--output={output} is a folder; name a file.")
    if not output.parent.is_dir():
        raise FileNotFoundError(
            f"--output={output}: the folder {output.parent} does not exist; make it first."
        )


def _check_flags() -> None:
    """Refuses flags that do not go together, before anything is loaded."""
    if bool(_TASKS.value) == bool(_PERPLEXITY.value):
        both = "cannot both be given" if _TASKS.value else "are both missing; give one of them"
        raise UsageError(f"--tasks and --perplexity {both}. See mobilellm evaluate --help.")
    of_tasks = {"num_fewshot": _NUM_FEWSHOT, "limit": _LIMIT, "data_dir": _DATA_DIR}
    others = {"stride": _STRIDE} if _TASKS.value else of_tasks
    for name, flag in others.items():
        if flag.value is not None:
            owner = "--perplexity" if _TASKS.value else "--tasks"
            raise UsageError(f"--{name}={flag.value} goes with {owner} only.")
    if _TASKS.value and importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f"--tasks={','.join(_TASKS.value)} needs lm-evaluation-harness; install it with "
            "pip install 'mobilellm-jax[eval]'."
        )


def _read_text(file: Path) -> str:
    """Reads the file as it is: line ends are part of the text."""
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"--perplexity={file} {what}; name a text file in UTF-8.")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--perplexity={file} must be UTF-8, but byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert it, for example with iconv."
        ) from error
