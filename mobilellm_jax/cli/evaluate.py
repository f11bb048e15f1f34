"""Scores a model on tasks, by lm-evaluation-harness, or measures the perplexity of a text.

  mobilellm evaluate --checkpoint=runs/mine --tasks=mobilellm --output=scores.json
  mobilellm evaluate --checkpoint=exported/hf --tasks=hellaswag,piqa --limit=200 --data_dir=evals
  mobilellm evaluate --checkpoint=runs/mine --tasks=triviaqa --num_fewshot=5
  mobilellm evaluate --checkpoint=runs/quickstart --perplexity=README.md
  mobilellm evaluate --checkpoint=exported/hf --perplexity=wiki.txt --stride=512 --output=wiki.json
  mobilellm evaluate --checkpoint=runs/mine --tasks=mobilellm --quantize=w8a8
  mobilellm evaluate --artifact=exported/q8 --tasks=piqa --limit=100 --output=scores.json

Tasks are those of the installed harness (pip install 'mobilellm-jax[eval]'), and `mobilellm` is
the paper's table: arc_easy, arc_challenge, boolq, piqa, social_iqa, hellaswag, openbookqa and
winogrande (mobilellm_zero_shot), triviaqa with 1, 5 and 64 examples, race_middle and race_high
(mobilellm_questions). The harness downloads their rows, unless --data_dir=DIR has them:
DIR/TASK/test.jsonl or validation.jsonl, whichever the task scores, and fewshot.jsonl for examples
(siqa for social_iqa, one triviaqa, race/middle.jsonl and race/high.jsonl), in the layout of the
data sets' rows. --output=FILE.json gets the harness' own layout; an evaluation that was killed goes
on from FILE.json.journal when it is started again.

With --artifact an exported folder is measured instead, in its own runtime: what the export and its
quantization cost. It reads one sequence after the other.

For perplexity the text is cut into windows of model.max_seq_len tokens, without overlap; what is
left after the last full window is not scored. With --stride=N every token is scored, after as many
tokens as N leaves in a window.

With --quantize=SCHEME the checkpoint is measured in integers, on tasks and text alike.
"""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.quantizing import PARTS_HELP, QUANTIZE_HELP, chosen_scheme, quantize_opened
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.quantize.schemes import Scheme

if TYPE_CHECKING:
    from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
    from mobilellm_jax.evaluate.engine import Engine

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "run folder (its latest step), step folder or Hugging Face directory",
)
_ARTIFACT = flags.DEFINE_string("artifact", "", "folder that mobilellm export made for a device")
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
_QUANTIZE = flags.DEFINE_string("quantize", None, QUANTIZE_HELP)
_QUANTIZED_PARTS = flags.DEFINE_string("quantized_parts", None, PARTS_HELP)
_OUTPUT = flags.DEFINE_string("output", None, "file for the result, besides the standard output")


def main(argv: list[str]) -> None:
    """Evaluates."""
    del argv  # no config, no overrides
    _check_flags()
    scheme = chosen_scheme(_QUANTIZE.value, _QUANTIZED_PARTS.value)
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if output is not None:
        _check_output(output)
    if _PERPLEXITY.value:
        _measure_perplexity(Path(_PERPLEXITY.value), output, scheme)
    else:
        _evaluate_tasks(output, scheme)


def _measure_perplexity(file: Path, output: Path | None, scheme: Scheme | None) -> None:
    from mobilellm_jax.evaluate.perplexity import perplexity, runtime_perplexity
    from mobilellm_jax.export.artifact import open_artifact
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.storage.rundir import write_whole

    text = _read_text(file)
    record: dict[str, Any]
    if _ARTIFACT.value:
        artifact = open_artifact(_ARTIFACT.value)
        result = runtime_perplexity(
            artifact.load(), artifact.tokenizer(), text, stride=_STRIDE.value
        )
        record = {"artifact": _ARTIFACT.value, "precision": artifact.info.precision}
    else:
        model = quantize_opened(open_model(_CHECKPOINT.value), scheme)
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
        # Read when the libraries are imported: with local files, nothing asks a network.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from mobilellm_jax.evaluate.harness import HarnessModel
    from mobilellm_jax.evaluate.journal import Journal
    from mobilellm_jax.evaluate.tasks import as_json, format_results, load_tasks, run_tasks
    from mobilellm_jax.storage.rundir import write_whole

    tasks = load_tasks(_TASKS.value, data_dir=data_dir, num_fewshot=_NUM_FEWSHOT.value)
    subject = _artifact_subject() if _ARTIFACT.value else _checkpoint_subject(scheme)
    path = output.with_name(f"{output.name}.journal") if output else None
    journal = Journal(path, subject.identity)
    if journal.replaced:
        _say(f"{path} was of another model; starting anew.")
    elif journal.answers:
        _say(f"{path} has {len(journal.answers):,} answers; going on from there.")
    config = subject.engine.config
    model = HarnessModel(subject.engine, subject.tokenizer, journal, origin=subject.origin)
    results = run_tasks(model, tasks, _LIMIT.value)
    if model.cut:
        _say(
            f"{model.cut:,} requests were longer than model.max_seq_len="
            f"{config.max_seq_len}; the beginnings of their contexts were left out."
        )
    print(format_results(results, config), end="", flush=True)
    if output is not None:
        write_whole(output, as_json(results))
        journal.remove()


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is evaluated on tasks."""

    engine: "Engine"
    tokenizer: "Tokenizer"
    identity: dict[str, Any]  # tells its answers from those of others
    origin: str


def _checkpoint_subject(scheme: Scheme | None) -> _Subject:
    import jax

    from mobilellm_jax.config import MeshConfig
    from mobilellm_jax.evaluate.engine import JaxEngine
    from mobilellm_jax.evaluate.journal import identity
    from mobilellm_jax.evaluate.scoring import Scorer
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.sharding import logical_rules, make_mesh, replicated
    from mobilellm_jax.startup.host_memory import keep_freed_memory

    opened = quantize_opened(open_model(_CHECKPOINT.value), scheme)
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


def _artifact_subject() -> _Subject:
    from mobilellm_jax.evaluate.engine import RuntimeEngine
    from mobilellm_jax.export.artifact import open_artifact

    artifact = open_artifact(_ARTIFACT.value)
    runtime = artifact.load()
    return _Subject(
        RuntimeEngine(artifact.info.model, artifact.info.precision, runtime),
        artifact.tokenizer(),
        {"artifact": artifact.sha256, "runtime": runtime.name},
        str(artifact.folder),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_output(output: Path) -> None:
    """Refuses, before anything is computed, a name that no file can have."""
    if output.is_dir():
        raise IsADirectoryError(f"--output={output} is a folder; name a file.")
    if not output.parent.is_dir():
        raise MissingFileError(
            f"--output={output}: the folder {output.parent} does not exist; make it first."
        )


def _check_flags() -> None:
    """Refuses flags that do not go together, before anything is loaded."""
    if bool(_CHECKPOINT.value) == bool(_ARTIFACT.value):
        both = "cannot both be given" if _ARTIFACT.value else "are both missing; give one of them"
        raise UsageError(f"--checkpoint and --artifact {both}. See mobilellm evaluate --help.")
    if bool(_TASKS.value) == bool(_PERPLEXITY.value):
        both = "cannot both be given" if _TASKS.value else "are both missing; give one of them"
        raise UsageError(f"--tasks and --perplexity {both}. See mobilellm evaluate --help.")
    if _ARTIFACT.value and _QUANTIZE.value is not None:
        raise UsageError(
            f"--quantize={_QUANTIZE.value} goes with --checkpoint only: an artifact was quantized "
            "when it was exported."
        )
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
        raise MissingFileError(f"--perplexity={file} {what}; name a text file in UTF-8.")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--perplexity={file} must be UTF-8, but byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert it, for example with iconv."
        ) from error
