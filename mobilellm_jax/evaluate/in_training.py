"""Measures a model during training: the loss on held-out data, and scores on tasks and a text.

The sharded parameters stay on their devices.

The loss of a component is the mean over its targets. If `train.eval_batches` is set, the mean is
taken only over the first `train.eval_batches` batches. The loss of a mixture is the mean of the
components' losses, weighted by their numbers of targets. This is the loss over all held-out data,
or an estimate of that loss if `train.eval_batches` is set.

Bits per byte are loss * targets / (ln 2 * bytes of text) over the whole split. If a loss mask
removes targets, the bytes of the other targets are not known, and bits per byte are left out.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from mobilellm_jax.config import Config
from mobilellm_jax.data.loader import validation_batches
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.sources.source import VALIDATION
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.windows import count_targets
from mobilellm_jax.errors import require
from mobilellm_jax.evaluate.engine import JaxEngine
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.evaluate.scoring import Scorer
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.sharding import Rules, local_rows, put_batch
from mobilellm_jax.storage.text_file import read_text
from mobilellm_jax.storage.user_path import user_path
from mobilellm_jax.train.step import make_loss_sums

Evaluator = Callable[[Params], dict[str, float]]
"""A function that measures parameters and returns a dict of metrics."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """The held-out data of a component; `text_bytes` is None if this number is not known."""

    name: str
    data: Mixture
    targets: int
    text_bytes: int | None


def make_validator(config: Config, mixture: Mixture, mesh: Mesh, rules: Rules) -> Evaluator:
    """Returns a function that validates parameters and returns a dict of metrics.

    The keys are "validation/loss", "validation/bpb" if bits per byte are known, and for a mixture
    "validation/loss/NAME" for each component with held-out targets.
    """
    train = config.train
    rows = train.global_batch // train.accumulation_steps
    loss_sums = make_loss_sums(config, mesh, rules, rows)
    parts = _parts(config, mixture)

    def loss_of(params: Params, part: _Part) -> float | None:
        batches = validation_batches(
            part.data,
            config.data,
            batch=rows,
            num_batches=train.eval_batches or None,
            rows=local_rows(mesh, rows),
        )
        placed = (put_batch(batch, mesh, rows) for batch in batches)
        sums = jax.device_get([loss_sums(params, batch) for batch in placed])
        nats, targets = (math.fsum(float(pair[i]) for pair in sums) for i in (0, 1))
        return nats / targets if targets else None

    def validate(params: Params) -> dict[str, float]:
        found = [(part, loss_of(params, part)) for part in parts]
        looked_at = [(part, loss) for part, loss in found if loss is not None]
        if not looked_at:
            return {}
        targets = sum(part.targets for part, _ in looked_at)
        loss = math.fsum(part.targets / targets * loss for part, loss in looked_at)
        values = {"validation/loss": loss}
        text_bytes = [part.text_bytes for part, _ in looked_at]
        if None not in text_bytes:
            total = sum(each for each in text_bytes if each is not None)
            values["validation/bpb"] = loss / math.log(2) * targets / total
        if len(mixture.components) > 1:
            values |= {f"validation/loss/{part.name}": loss for part, loss in looked_at}
        return values

    return validate


def _parts(config: Config, mixture: Mixture) -> list[_Part]:
    parts = []
    for component in mixture.components:
        stream = component.stream(VALIDATION)
        targets = count_targets(stream, config.data.boundaries) if stream else 0
        if stream and targets:
            text_bytes = component.counts(VALIDATION).text_bytes
            known = text_bytes if text_bytes and not stream.has_loss_mask else None
            parts.append(_Part(component.name, mixture.alone(component), targets, known))
    return parts


def make_evaluator(config: Config, tokenizer: Tokenizer, mesh: Mesh, rules: Rules) -> Evaluator:
    """Returns a function that scores parameters and returns a dict of metrics.

    The keys of the dict are "evaluate/TASK/METRIC" and "evaluate/text/METRIC". `make_evaluator`
    itself reads the rows and the text, so that mistakes in these files appear before training
    starts.

    Raises:
      UserError: if `evaluate.tasks` is set without the `eval` extra, a task or row is wrong, or
        `evaluate.text` is not a text.
      MissingFileError: if a file of rows or text is missing.
    """
    chosen = config.evaluate
    if not (chosen.tasks or chosen.text):
        return lambda params: {}
    scorer = Scorer(config.model, mesh, rules)
    score_tasks, text = read_inputs(config, tokenizer)

    def evaluate(params: Params) -> dict[str, float]:
        engine = JaxEngine(scorer, params)
        values = score_tasks(engine) if score_tasks else {}
        if text is not None:
            found = perplexity(engine, text, show=False)
            for name in ("loss", "perplexity", "bits_per_byte"):
                values[f"text/{name}"] = getattr(found, name)
        return {f"evaluate/{name}": value for name, value in values.items()}

    return evaluate


def read_inputs(
    config: Config, tokenizer: Tokenizer
) -> tuple[Callable[[JaxEngine], dict[str, float]] | None, CutText | None]:
    """Reads what evaluations during training need: the tasks and the text; starts no backend.

    Raises:
      UserError, MissingFileError: as `make_evaluator`.
    """
    chosen, length = config.evaluate, config.model.max_seq_len
    score_tasks = _task_scores(config, tokenizer) if chosen.tasks else None
    if not chosen.text:
        return score_tasks, None
    content = read_text("evaluate.text", user_path("evaluate.text", chosen.text))
    return score_tasks, CutText.cut(tokenizer, content, length, stride=length)


def _task_scores(config: Config, tokenizer: Tokenizer) -> Callable[[JaxEngine], dict[str, float]]:
    chosen = config.evaluate
    require("lm_eval", "eval", f"evaluate.tasks={chosen.tasks!r}")
    from mobilellm_jax.evaluate.harness import HarnessModel
    from mobilellm_jax.evaluate.journal import Journal
    from mobilellm_jax.evaluate.tasks import check_tasks, load_tasks, quick_scores

    names = [name.strip() for name in chosen.tasks.split(",")]
    folder = user_path("evaluate.data_dir", chosen.data_dir) if chosen.data_dir else None
    tasks = load_tasks(names, data_dir=folder)
    check_tasks(tasks, config.model, draws=True)

    def score(engine: JaxEngine) -> dict[str, float]:
        # The parameters differ at each call, so the answers of earlier calls are of no use.
        journal = Journal(None, {})
        model = HarnessModel(engine, tokenizer, journal, origin="in training", show=False)
        return quick_scores(model, tasks, chosen.limit or None)

    return score
