"""Scores a model on tasks with lm-evaluation-harness, or measures the perplexity of a text.

  mobilellm evaluate --checkpoint=runs/mine --tasks=mobilellm --output=scores.json
  mobilellm evaluate --checkpoint=exported/hf --tasks=hellaswag,piqa --limit=200 --data_dir=evals
  mobilellm evaluate --checkpoint=runs/mine --tasks=triviaqa --num_fewshot=5
  mobilellm evaluate --checkpoint=runs/quickstart --perplexity=README.md
  mobilellm evaluate --checkpoint=exported/hf --perplexity=wiki.txt --stride=512 --output=wiki.json
  mobilellm evaluate --checkpoint=exported/hf --perplexity=wiki.txt --window=512
  mobilellm evaluate --checkpoint=runs/mine --tasks=mobilellm --quantize=w8a8
  mobilellm evaluate --artifact=exported/q8 --tasks=piqa --limit=100 --output=scores.json

--tasks accepts all tasks of lm-evaluation-harness (pip install 'mobilellm-jax[eval]'). The group
`mobilellm` contains all tasks of the paper's tables, in two smaller groups:
  mobilellm_zero_shot  arc_easy, arc_challenge, boolq, piqa, social_iqa, hellaswag, openbookqa and
                       winogrande
  mobilellm_questions  triviaqa with 1, 5 and 64 examples, race_middle and race_high
The harness downloads the rows of the tasks. With --data_dir=DIR, it reads local files, whose rows
have the same fields as the published data sets. DIR/TASK/test.jsonl or DIR/TASK/validation.jsonl
holds the rows to score, and DIR/TASK/fewshot.jsonl holds the examples. Some names differ. The
folder siqa holds the rows of social_iqa. The folder triviaqa holds the rows of all triviaqa tasks.
The files race/middle.jsonl and race/high.jsonl hold the rows of race_middle and race_high.

With --tasks, --output=FILE.json writes the results in the harness' own layout. If the evaluation is
killed, the same command continues with the answers in FILE.json.journal.

--artifact evaluates an exported folder in its own runtime, which reads one sequence at a time. The
scores show how much quality the export and its quantization lose.

--perplexity cuts the text into windows of --window=N tokens, by default model.max_seq_len. They do
not overlap, and the tokens after the last full window are not scored. A text that is shorter than a
window is scored as it is, and the command says so. With --stride=N, every token is scored: each
window scores N tokens, and the model also reads as many earlier tokens as fit into the window.

--quantize=SCHEME quantizes the checkpoint before it is evaluated.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.flags import flag
from mobilellm_jax.cli.shared import CHECKPOINT_HELP, PARTS_HELP, QUANTIZE_HELP, chosen_scheme
from mobilellm_jax.errors import UserError, require
from mobilellm_jax.quantize.schemes import Scheme
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.outputs import check_file
from mobilellm_jax.storage.text_file import read_text

if TYPE_CHECKING:
    from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
    from mobilellm_jax.evaluate.engine import Engine

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    checkpoint: Path | None = flag(None, CHECKPOINT_HELP)
    artifact: Path | None = flag(None, "folder of `mobilellm export`")
    tasks: list[str] | None = flag(
        None, "tasks or groups of tasks, separated by commas", commas=True
    )
    num_fewshot: int | None = flag(None, "solved examples before each question", lower_bound=0)
    limit: int | None = flag(None, "rows of each task, for a trial", lower_bound=1)
    data_dir: Path | None = flag(None, "folder with the tasks' rows; see above")
    perplexity: Path | None = flag(None, "text file in UTF-8")
    window: int | None = flag(
        None, "tokens of a window of --perplexity (default: model.max_seq_len)", lower_bound=2
    )
    stride: int | None = flag(None, "tokens that each window scores, if windows overlap")
    quantize: str | None = flag(None, QUANTIZE_HELP)
    quantized_parts: str | None = flag(None, PARTS_HELP)
    output: Path | None = flag(None, "file that also gets the result")


def main(flags: Flags) -> None:
    """Evaluates the model and prints the result."""
    _check_flags(flags)
    scheme = chosen_scheme(flags.quantize, flags.quantized_parts)
    output = flags.output
    if output is not None:
        check_file("--output", output, _is_result)
    if flags.tasks is None:
        _measure_perplexity(flags, output, scheme)
    else:
        _evaluate_tasks(flags, output, scheme)


def _measure_perplexity(flags: Flags, output: Path | None, scheme: Scheme | None) -> None:
    from mobilellm_jax.evaluate.perplexity import CutText, perplexity
    from mobilellm_jax.storage.rundir import write_whole

    file = flags.perplexity
    assert file is not None, "`main` calls this function with --perplexity only"
    content = read_text("--perplexity", file)
    subject = _open(flags, scheme)
    longest = subject.engine.config.max_seq_len
    length = flags.window or longest
    if length > longest:
        raise UserError(f"--window={length} must be at most model.max_seq_len={longest}.")
    text = CutText.cut(subject.tokenizer, content, length, flags.stride)
    _log.info(f"scoring {len(text.windows):,} windows; the first one compiles the model")
    record: dict[str, Any] = {**subject.record, "file": str(file)}
    record |= {
        name: getattr(flags, name)
        for name in ("window", "stride")
        if getattr(flags, name) is not None
    }
    if len(text.ids) < length:
        record["note"] = f"the text has {len(text.ids)} tokens, fewer than a window of {length}"
        _log.warning(f"{file}: {record['note']}; all of it is one window.")
    record |= dataclasses.asdict(perplexity(subject.engine, text))
    result = json.dumps(strict_json.with_null(record), indent=2) + "\n"
    print(result, end="", flush=True)
    if output is not None:
        write_whole(output, result)


def _evaluate_tasks(flags: Flags, output: Path | None, scheme: Scheme | None) -> None:
    data_dir = flags.data_dir
    if data_dir is not None:
        # Local files need no network. The libraries read these variables when they are imported.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from mobilellm_jax.evaluate.harness import HarnessModel
    from mobilellm_jax.evaluate.journal import Journal
    from mobilellm_jax.evaluate.tasks import as_json, format_results, load_tasks, run_tasks
    from mobilellm_jax.storage.rundir import is_special, write_whole

    tasks = load_tasks(flags.tasks or [], data_dir=data_dir, num_fewshot=flags.num_fewshot)
    subject = _open(flags, scheme)
    path = None
    if output is not None and not is_special(output):
        path = output.with_name(f"{output.name}.journal")
    journal = Journal(path, subject.identity())
    if journal.replaced:
        _log.info(f"{path} was of another model; starting anew.")
    elif journal.answers:
        _log.info(f"{path} has {len(journal.answers):,} answers; continuing from there.")
    config = subject.engine.config
    model = HarnessModel(subject.engine, subject.tokenizer, journal, origin=subject.origin)
    results = run_tasks(model, tasks, flags.limit)
    if model.cut:
        _log.warning(
            f"{model.cut:,} requests were longer than model.max_seq_len="
            f"{config.max_seq_len}; the beginnings of their contexts were left out."
        )
    print(format_results(results, config), end="", flush=True)
    if output is not None:
        write_whole(output, as_json(results))
        journal.remove()


@dataclasses.dataclass(frozen=True)
class _Subject:
    engine: "Engine"
    tokenizer: "Tokenizer"
    origin: str
    record: dict[str, str]  # Describes the model in the result of --perplexity.
    identity: Callable[[], dict[str, Any]]  # Returns what identifies a journal's model.


def _open(flags: Flags, scheme: Scheme | None) -> _Subject:
    import jax

    from mobilellm_jax.evaluate.engine import RuntimeEngine, jax_engine
    from mobilellm_jax.evaluate.journal import identity
    from mobilellm_jax.export.artifact import open_artifact
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.startup.host_memory import keep_freed_memory

    if flags.artifact is not None:
        artifact = open_artifact(flags.artifact)
        info, runtime = artifact.info, artifact.load()
        return _Subject(
            RuntimeEngine(info.model, info.precision, runtime),
            artifact.tokenizer(),
            str(artifact.folder),
            {"artifact": str(flags.artifact), "precision": info.precision},
            lambda: {"artifact": artifact.sha256, "runtime": runtime.name},
        )
    opened = open_model(str(flags.checkpoint), scheme)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    engine = jax_engine(opened.config, opened.params)
    how = {"quantize": str(scheme)} if scheme else {}
    return _Subject(
        engine,
        opened.tokenizer,
        ", ".join([opened.origin, *how.values()]),
        {"checkpoint": opened.origin, **how},
        lambda: identity(opened.config, engine.params, opened.tokenizer, how.get("quantize")),
    )


def _is_result(file: Path) -> bool:
    """Returns whether `evaluate` wrote the file, so that a new result may replace it."""
    try:
        values = (
            json.loads(file.read_text("utf-8"))
            if file.stat().st_size < strict_json.MAX_BYTES
            else None
        )
    except ValueError:
        return False
    return isinstance(values, dict) and not {"results", "perplexity"}.isdisjoint(values)


def _check_flags(flags: Flags) -> None:
    """Refuses flags that contradict each other, before a model is loaded."""
    for one, other in (("checkpoint", "artifact"), ("tasks", "perplexity")):
        if (getattr(flags, one) is None) == (getattr(flags, other) is None):
            raise UsageError(f"Give exactly one of --{one} and --{other}.")
    if flags.artifact is not None and flags.quantize is not None:
        raise UsageError(
            f"--quantize={flags.quantize} goes with --checkpoint only: an artifact was quantized "
            "when it was exported."
        )
    given, others = "--tasks", ["window", "stride"]
    if flags.tasks is None:
        given, others = "--perplexity", ["num_fewshot", "limit", "data_dir"]
    for name in others:
        value = getattr(flags, name)
        if value is not None:
            raise UsageError(f"--{name}={value} does not go with {given}.")
    if flags.tasks is not None:
        require("lm_eval", "eval", f"--tasks={','.join(flags.tasks)}")
