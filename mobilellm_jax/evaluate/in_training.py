"""Scores tasks and a text during training; the sharded parameters stay on their devices."""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from mobilellm_jax.config import Config, EvaluateConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import require
from mobilellm_jax.evaluate.engine import JaxEngine
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.evaluate.scoring import Scorer
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.sharding import Rules
from mobilellm_jax.storage.text_file import read_text

Evaluator = Callable[[Params], dict[str, float]]


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
    length = config.model.max_seq_len
    scorer = Scorer(config.model, mesh, rules)
    score_tasks = _task_scores(chosen, tokenizer) if chosen.tasks else None
    text = None
    if chosen.text:
        content = read_text("evaluate.text", Path(chosen.text))
        text = CutText.cut(tokenizer, content, length, stride=length)

    def evaluate(params: Params) -> dict[str, float]:
        engine = JaxEngine(scorer, params)
        values = score_tasks(engine) if score_tasks else {}
        if text is not None:
            found = perplexity(engine, text, show=False)
            for name in ("loss", "perplexity", "bits_per_byte"):
                values[f"text/{name}"] = getattr(found, name)
        return {f"evaluate/{name}": value for name, value in values.items()}

    return evaluate


def _task_scores(
    chosen: EvaluateConfig, tokenizer: Tokenizer
) -> Callable[[JaxEngine], dict[str, float]]:
    require("lm_eval", "eval", f"evaluate.tasks={chosen.tasks!r}")
    from mobilellm_jax.evaluate.harness import HarnessModel
    from mobilellm_jax.evaluate.journal import Journal
    from mobilellm_jax.evaluate.tasks import load_tasks, quick_scores

    names = [name.strip() for name in chosen.tasks.split(",")]
    tasks = load_tasks(names, data_dir=Path(chosen.data_dir) if chosen.data_dir else None)

    def score(engine: JaxEngine) -> dict[str, float]:
        # The parameters differ at each call, so the answers of earlier calls are of no use.
        journal = Journal(None, {})
        model = HarnessModel(engine, tokenizer, journal, origin="in training", show=False)
        return quick_scores(model, tasks, chosen.limit or None)

    return score
