"""Checks that `evaluate --tasks` gives the same answers as lm-evaluation-harness' `hf` model.

    pip install 'mobilellm-jax[eval]' torch transformers accelerate
    python benchmarks/compare_harness.py --model=exported/hf --data_dir=EVALS --limit=100 --shots=3

Both read the same Hugging Face directory and compute in float32 on the CPU. For each task, the
script prints the number of requests, the largest difference between log-likelihoods, how many
`is_greedy` and how many texts differ, and whether all metrics are equal. A text of several windows
(wikitext) has a log-likelihood of thousands of nats, and a float32 sum keeps only seven digits.
Such texts are also compared with float64, to show which of the two is more exact.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mobilellm_jax.evaluate.engine import jax_engine
from mobilellm_jax.evaluate.harness import HarnessModel
from mobilellm_jax.evaluate.journal import Journal
from mobilellm_jax.evaluate.task_data import GROUPS
from mobilellm_jax.evaluate.tasks import load_tasks, run_tasks
from mobilellm_jax.open_model import open_model

_TASKS = (*GROUPS["mobilellm_zero_shot"], "triviaqa", "race_middle", "race_high", "wikitext")
_CLOSE = 1e-3
_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def main() -> None:
    """Compares and prints the results; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="folder of rows, as for `evaluate`"
    )
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--tasks", default=",".join(_TASKS))
    given = parser.parse_args()
    ours, theirs, exact = _ours(given.model), _theirs(given.model, "float32"), None
    wrong = 0
    for name in given.tasks.split(","):
        tasks = load_tasks([name], data_dir=given.data_dir, num_fewshot=given.shots)
        (our_metrics, mine), (their_metrics, hf) = (
            _asked(model, tasks, given.limit) for model in (ours, theirs)
        )
        assert list(mine) == list(hf), "both models must get the same requests"
        far, greedy, texts = 0.0, 0, 0
        for request, answer in mine.items():
            if isinstance(answer, str):
                texts += answer != hf[request]
                continue
            (a, b), (c, d) = _pair(answer), _pair(hf[request])
            far = max(far, abs(a - c))
            greedy += b != d
        equal = our_metrics == their_metrics
        line = f"{name:<14}{given.shots} shots {len(mine):5} requests, largest difference {far:.1e}"
        if name == "wikitext":
            exact = exact or _theirs(given.model, "float64")
            _, true = _asked(exact, tasks, given.limit)
            off = [max(abs(answers[r] - true[r]) for r in true) for answers in (mine, hf)]
            line += f" (from float64: ours {off[0]:.1e}, hf {off[1]:.1e})"
            equal = all(
                abs(our_metrics[m] - their_metrics[m]) < 1e-6 * abs(their_metrics[m])
                for m in our_metrics
            )
            far = off[0]
        print(f"{line}, is_greedy {greedy}, texts {texts}, metrics {our_metrics} equal: {equal}")
        wrong += far > _CLOSE or greedy > 0 or texts > 0 or not equal
    raise SystemExit(1 if wrong else 0)


def _pair(answer: Any) -> tuple[float, bool]:
    return (answer, False) if isinstance(answer, float) else answer


def _asked(model: Any, tasks: Any, limit: int) -> tuple[dict[str, float], dict[Any, Any]]:
    """Returns the metrics of a task and the answers to all its requests."""
    answers: dict[Any, Any] = {}
    for kind in _KINDS:
        answer = getattr(type(model), kind)

        def recorded(requests: Sequence[Instance], answer: Any = answer, **how: Any) -> Any:
            found = answer(model, requests, **how)
            for request, value in zip(requests, found, strict=True):
                answers[str(request.args), request.doc_id, request.idx] = value
            return found

        setattr(model, kind, recorded)
    [values] = run_tasks(model, tasks, limit)["results"].values()
    metrics = {
        m.partition(",")[0]: v
        for m, v in values.items()
        if "," in m and "stderr" not in m and isinstance(v, float)
    }
    return metrics, answers


def _ours(folder: Path) -> HarnessModel:
    model = open_model(folder)
    engine = jax_engine(model.config, model.params)
    return HarnessModel(engine, model.tokenizer, Journal(None, {}), origin=str(folder))


def _theirs(folder: Path, dtype: str) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype=dtype, batch_size=8)


if __name__ == "__main__":
    main()
