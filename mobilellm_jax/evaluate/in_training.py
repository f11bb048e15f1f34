"""Scores tasks and a text during training, with the sharded parameters on the devices."""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from mobilellm_jax.config import Config, ConfigError, EvaluateConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import require
from mobilellm_jax.evaluate.engine import JaxEngine
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.evaluate.scoring import Scorer
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.sharding import Rules

Evaluator = Callable[[Params], dict[str, float]]


def make_evaluator(config: Config, tokenizer: Tokenizer, mesh: Mesh, rules: Rules) -> Evaluator:
    """Returns a function from parameters to "evaluate/TASK/METRIC" and "evaluate/text/METRIC".

    It reads rows and text at once, so that mistakes in them show before training starts.

    Raises:
      UserError: if `evaluate.tasks` is set without the `eval` extra, or a task or row is wrong.
      ConfigError: if `evaluate.text` is not a text.
      MissingFileError: if a file of rows is missing.
    """
    if not (config.evaluate.tasks or config.evaluate.text):
        return lambda params: {}
    scorer = Scorer(config.model, mesh, rules)
    parts = []
    if config.evaluate.tasks:
        parts.append(_task_evaluator(config, tokenizer, scorer))
    if config.evaluate.text:
        parts.append(_text_evaluator(config, tokenizer, scorer))

    def evaluate(params: Params) -> dict[str, float]:
        return {f"evaluate/{name}": value for part in parts for name, value in part(params).items()}

    return evaluate


def _task_evaluator(config: Config, tokenizer: Tokenizer, scorer: Scorer) -> Evaluator:
    chosen = config.evaluate
    require("lm_eval", "eval", f"evaluate.tasks={chosen.tasks!r}")
    from mobilellm_jax.evaluate.harness import HarnessModel
    from mobilellm_jax.evaluate.journal import Journal
    from mobilellm_jax.evaluate.tasks import load_tasks, quick_scores

    names = [name.strip() for name in chosen.tasks.split(",")]
    tasks = load_tasks(names, data_dir=Path(chosen.data_dir) if chosen.data_dir else None)

    def evaluate(params: Params) -> dict[str, float]:
        # Each call has a new journal, because other parameters give other answers.
        engine = JaxEngine(scorer, params)
        journal = Journal(None, {})
        model = HarnessModel(engine, tokenizer, journal, origin="in training", show=False)
        return quick_scores(model, tasks, chosen.limit or None)

    return evaluate


def _text_evaluator(config: Config, tokenizer: Tokenizer, scorer: Scorer) -> Evaluator:
    """Scores every token of a text, in windows as long as the model can read."""
    length = config.model.max_seq_len
    text = CutText.cut(tokenizer, _read_text(config.evaluate), length, stride=length)

    def evaluate(params: Params) -> dict[str, float]:
        found = perplexity(JaxEngine(scorer, params), text, show=False)
        return {
            "text/loss": found.loss,
            "text/perplexity": found.perplexity,
            "text/bits_per_byte": found.bits_per_byte,
        }

    return evaluate


def _read_text(chosen: EvaluateConfig) -> str:
    try:
        text = Path(chosen.text).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"evaluate.text={chosen.text!r} must be a text file in UTF-8: {error}."
        ) from error
    if not text:
        raise ConfigError(f"evaluate.text={chosen.text!r} is empty; name a file with text.")
    return text
