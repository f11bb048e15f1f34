"""Scores a model on tasks with lm-evaluation-harness, or measures the perplexity of a text.

  mobilellm evaluate --checkpoint=runs/mine --tasks=mobilellm --output=scores.json
  mobilellm evaluate --checkpoint=exported/hf --tasks=hellaswag,piqa --limit=200 --data_dir=evals
  mobilellm evaluate --checkpoint=runs/mine --tasks=triviaqa --num_fewshot=5
  mobilellm evaluate --checkpoint=runs/quickstart --perplexity=README.md
  mobilellm evaluate --checkpoint=exported/hf --perplexity=wiki.txt --stride=512 --output=wiki.json
  mobilellm evaluate --checkpoint=runs/mine --tasks=mobilellm --quantize=w8a8
  mobilellm evaluate --artifact=exported/q8 --tasks=piqa --limit=100 --output=scores.json

--tasks takes every task of the installed harness (pip install 'mobilellm-jax[eval]'). `mobilellm`
is the paper's table:
  mobilellm_zero_shot  arc_easy, arc_challenge, boolq, piqa, social_iqa, hellaswag, openbookqa and
                       winogrande
  mobilellm_questions  triviaqa with 1, 5 and 64 examples, race_middle and race_high
The harness downloads the rows of the tasks. With --data_dir=DIR it reads them from files in the
layout of the data sets' rows: DIR/TASK/test.jsonl or validation.jsonl, which the task scores, and
DIR/TASK/fewshot.jsonl for examples. Three tasks have folders of another name: siqa (social_iqa),
triviaqa (for every number of examples), and race/middle.jsonl and race/high.jsonl.

--output=FILE.json gets the results in the harness' own layout. If an evaluation is killed, the same
command continues from FILE.json.journal.

--artifact measures an exported folder in its own runtime, and so shows the cost of the export and
of its quantization. It reads one sequence at a time.

For perplexity, the text is cut into windows of model.max_seq_len tokens without overlap, and the
tokens after the last full window are not scored. With --stride=N every token is scored: each
window scores N tokens and reads the earlier tokens that fit.

--quantize=SCHEME measures the checkpoint in integers, on tasks and on text.
"""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.shared import (
    CHECKPOINT_HELP,
    PARTS_HELP,
    QUANTIZE_HELP,
    chosen_scheme,
    exactly_one,
    new_flags,
    quantize_opened,
    read_text,
)
from mobilellm_jax.errors import MissingFileError, UserError, require
from mobilellm_jax.quantize.schemes import Scheme

if TYPE_CHECKING:
    from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
    from mobilellm_jax.evaluate.engine import Engine

_log = logging.getLogger(__name__)

FLAGS = new_flags()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP, FLAGS)
_ARTIFACT = flags.DEFINE_string("artifact", None, "folder of `mobilellm export`", FLAGS)
_TASKS = flags.DEFINE_list("tasks", None, "tasks or groups of tasks, separated by commas", FLAGS)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "solved examples before each question", lower_bound=0, flag_values=FLAGS
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "rows of each task, for a trial", lower_bound=1, flag_values=FLAGS
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder with the tasks' rows; see above", FLAGS)
_PERPLEXITY = flags.DEFINE_string("perplexity", None, "text file in UTF-8", FLAGS)
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "tokens that each window scores; a window reads model.max_seq_len tokens",
    flag_values=FLAGS,
)
_QUANTIZE = flags.DEFINE_string("quantize", None, QUANTIZE_HELP, FLAGS)
_QUANTIZED_PARTS = flags.DEFINE_string("quantized_parts", None, PARTS_HELP, FLAGS)
_OUTPUT = flags.DEFINE_string("output", None, "file that also gets the result", FLAGS)
exactly_one(FLAGS, "checkpoint", "artifact")
exactly_one(FLAGS, "tasks", "perplexity")


def main(argv: list[str]) -> None:
    """Evaluates the model and prints the result."""
    del argv  # the command has no config, so it has no overrides
    _check_flags()
    scheme = chosen_scheme(_QUANTIZE.value, _QUANTIZED_PARTS.value)
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if output is not None:
        _check_output(output)
    if _PERPLEXITY.value is not None:
        _measure_perplexity(Path(_PERPLEXITY.value), output, scheme)
    else:
        _evaluate_tasks(output, scheme)


def _measure_perplexity(file: Path, output: Path | None, scheme: Scheme | None) -> None:
    from mobilellm_jax.evaluate.perplexity import perplexity, runtime_perplexity
    from mobilellm_jax.export.artifact import open_artifact
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.storage.rundir import write_whole

    text = read_text("--perplexity", file)
    record: dict[str, Any]
    if _ARTIFACT.value is not None:
        artifact = open_artifact(_ARTIFACT.value)
        result = runtime_perplexity(
            artifact.load(), artifact.tokenizer(), text, stride=_STRIDE.value
        )
        record = {"artifact": _ARTIFACT.value, "precision": artifact.info.precision}
    else:
        model = quantize_opened(open_model(str(_CHECKPOINT.value)), scheme)
        result = perplexity(model.config, model.params, model.tokenizer, text, stride=_STRIDE.value)
        record = {"checkpoint": model.origin}
        if scheme is not None:
            record["quantize"] = str(scheme)
    record["file"] = str(file)
    if _STRIDE.value is not None:
        record["stride"] = _STRIDE.value
    content = json.dumps({**record, **dataclasses.asdict(result)}, indent=2) + "\n"
    print(content, end="", flush=True)
    if output is not None:
        write_whole(output, content)


def _evaluate_tasks(output: Path | None, scheme: Scheme | None) -> None:
    data_dir = Path(_DATA_DIR.value) if _DATA_DIR.value else None
    if data_dir is not None:
        # The libraries read these variables when they are imported. Local files need no network.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from mobilellm_jax.evaluate.harness import HarnessModel
    from mobilellm_jax.evaluate.journal import Journal
    from mobilellm_jax.evaluate.tasks import as_json, format_results, load_tasks, run_tasks
    from mobilellm_jax.storage.rundir import write_whole

    tasks = load_tasks(_TASKS.value or [], data_dir=data_dir, num_fewshot=_NUM_FEWSHOT.value)
    if _ARTIFACT.value is not None:
        subject = _artifact_subject(_ARTIFACT.value)
    else:
        subject = _checkpoint_subject(str(_CHECKPOINT.value), scheme)
    path = output.with_name(f"{output.name}.journal") if output else None
    journal = Journal(path, subject.identity)
    if journal.replaced:
        _log.info(f"{path} was of another model; starting anew.")
    elif journal.answers:
        _log.info(f"{path} has {len(journal.answers):,} answers; continuing from there.")
    config = subject.engine.config
    model = HarnessModel(subject.engine, subject.tokenizer, journal, origin=subject.origin)
    results = run_tasks(model, tasks, _LIMIT.value)
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
    """A model that is evaluated on tasks."""

    engine: "Engine"
    tokenizer: "Tokenizer"
    identity: dict[str, Any]  # a journal with another identity belongs to another model
    origin: str


def _checkpoint_subject(checkpoint: str, scheme: Scheme | None) -> _Subject:
    import jax

    from mobilellm_jax.config import MeshConfig
    from mobilellm_jax.evaluate.engine import JaxEngine
    from mobilellm_jax.evaluate.journal import identity
    from mobilellm_jax.evaluate.scoring import Scorer
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.sharding import logical_rules, make_mesh, replicated
    from mobilellm_jax.startup.host_memory import keep_freed_memory

    opened = quantize_opened(open_model(checkpoint), scheme)
    how = str(scheme) if scheme else None
    config = opened.config
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    mesh = make_mesh(MeshConfig())
    params = jax.device_put(opened.params, replicated(mesh))
    scorer = Scorer(config, mesh, logical_rules(config, mesh.shape))
    return _Subject(
        JaxEngine(config, scorer, params),
        opened.tokenizer,
        identity(config, params, opened.tokenizer, how),
        f"{opened.origin}, {how}" if how else opened.origin,
    )


def _artifact_subject(folder: str) -> _Subject:
    from mobilellm_jax.evaluate.engine import RuntimeEngine
    from mobilellm_jax.export.artifact import open_artifact

    artifact = open_artifact(folder)
    runtime = artifact.load()
    return _Subject(
        RuntimeEngine(artifact.info.model, artifact.info.precision, runtime),
        artifact.tokenizer(),
        {"artifact": artifact.sha256, "runtime": runtime.name},
        str(artifact.folder),
    )


def _check_output(output: Path) -> None:
    """Refuses an impossible file name before anything is computed."""
    if output.is_dir():
        raise UserError(f"--output={output} is a folder; name a file.")
    if not output.parent.is_dir():
        raise MissingFileError(
            f"--output={output}: the folder {output.parent} does not exist; make it first."
        )


def _check_flags() -> None:
    """Refuses flags that contradict each other, before anything is loaded."""
    if _ARTIFACT.value is not None and _QUANTIZE.value is not None:
        raise UsageError(
            f"--quantize={_QUANTIZE.value} goes with --checkpoint only: an artifact was quantized "
            "when it was exported."
        )
    given = "--tasks"
    others: list[flags.FlagHolder[Any]] = [_STRIDE]
    if _TASKS.value is None:
        given, others = "--perplexity", [_NUM_FEWSHOT, _LIMIT, _DATA_DIR]
    for flag in others:
        if flag.value is not None:
            raise UsageError(f"--{flag.name}={flag.value} does not go with {given}.")
    if _TASKS.value is not None:
        require("lm_eval", "eval", f"--tasks={','.join(_TASKS.value)}")
