"""Times `evaluate --tasks` and lm-evaluation-harness' `hf` model on the same requests.

    pip install 'mobilellm-jax[eval]' torch transformers accelerate
    python benchmarks/evaluate.py --data_dir=EVALS --rows=200 --rounds=3

Both models have the same random weights in the shape of --model, compute in float32 on all cores of
this machine's CPU, and score the requests of the same rows of --task. Each batch size is one
contender; our batch sizes count tokens, and the harness' batch sizes count sequences. All
contenders take turns in each round. The script prints medians and the ratio between the two best.
The first round compiles and is printed separately. A long measurement can be split
(--first=0 --rows=50, --first=50 --rows=50, ...).

The model has the full vocabulary. The tokenizer is trained on the task and has fewer pieces, so
texts have slightly more tokens than usual.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import jax
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from mobilellm_jax.config import MeshConfig, ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.evaluate.engine import JaxEngine
from mobilellm_jax.evaluate.harness import HarnessModel
from mobilellm_jax.evaluate.journal import Journal
from mobilellm_jax.evaluate.scoring import Scorer
from mobilellm_jax.evaluate.tasks import load_tasks, run_tasks
from mobilellm_jax.export.huggingface.directory import write_llama
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.transformer import Params, init_params
from mobilellm_jax.paper.architectures import MOBILELLM
from mobilellm_jax.sharding import logical_rules, make_mesh, replicated
from mobilellm_jax.startup.host_memory import keep_freed_memory

_CLOSE = 1e-3
Score = Callable[[Sequence[Instance]], list[tuple[float, bool]]]


class _Recorder(LM):
    """Records all requests."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Instance] = []

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        self.asked += requests
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        raise NotImplementedError("choose a task that only scores continuations")

    generate_until = loglikelihood_rolling


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="folder of rows, as for `evaluate`"
    )
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--model", default="125m", choices=sorted(MOBILELLM))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_tokens", default="2048", help="our batch sizes, with commas")
    parser.add_argument(
        "--batch_sizes", default="8,16", help="batch sizes of the harness, with commas"
    )
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch", "lm_eval"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}")
    asked = _requests(arguments)
    last = arguments.first + arguments.rows
    requests = [each for each in asked if arguments.first <= each.doc_id < last]
    config = dataclasses.replace(MOBILELLM[arguments.model], compute_dtype="float32")
    params = init_params(config, jax.random.key(0))
    keep_freed_memory()
    contenders: dict[str, Score] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = ["".join(request.args) for request in asked]
        tokenizer = train_tokenizer(texts, 4096, folder / "tokenizer.model")
        (folder / "hf").mkdir()
        write_llama(OpenedModel(config, params, tokenizer, "random"), folder / "hf", "float32")
        for size in arguments.batch_tokens.split(","):
            contenders[f"ours {size}"] = _ours(config, params, tokenizer, int(size))
        for size in arguments.batch_sizes.split(","):
            theirs = HFLM(
                pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=int(size)
            )
            contenders[f"hf {size}"] = _theirs(theirs)
    torch.set_num_threads(os.cpu_count() or 1)
    print(
        f"{arguments.model}, float32, {arguments.task} rows {arguments.first} to "
        f"{last - 1}, {len(requests)} requests",
        flush=True,
    )
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    scores = {}
    for turn in range(-1, arguments.rounds):
        for name, score in contenders.items():
            if turn < 0 and name.startswith("hf"):
                score(requests[:4])  # the harness does not compile; a few requests warm it up
                continue
            started = time.perf_counter()
            scores[name] = score(requests)
            elapsed = time.perf_counter() - started
            print(
                f"{'compiling' if turn < 0 else turn:>10}  {name:<12}{elapsed:8.2f} s", flush=True
            )
            if turn >= 0:
                seconds[name].append(elapsed)
    _report(seconds, scores)


def _requests(arguments: argparse.Namespace) -> list[Instance]:
    recorder = _Recorder()
    tasks = load_tasks([arguments.task], data_dir=arguments.data_dir, num_fewshot=0)
    run_tasks(recorder, tasks)
    return recorder.asked


def _ours(config: ModelConfig, params: Params, tokenizer: Tokenizer, batch_tokens: int) -> Score:
    mesh = make_mesh(MeshConfig())
    rules = logical_rules(config, mesh.shape)
    scorer = Scorer(config, mesh, rules, batch_tokens=batch_tokens)
    placed = jax.device_put(params, replicated(mesh))

    def score(requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        # Each call has a new journal, so no answer is reused.
        model = HarnessModel(
            *(JaxEngine(scorer, placed), tokenizer, Journal(None, {})),
            origin="",
            show=False,
        )
        return model.loglikelihood(requests)

    return score


def _theirs(model: HFLM) -> Score:
    return lambda requests: model.loglikelihood(requests, disable_tqdm=True)


def _report(seconds: dict[str, list[float]], scores: dict[str, list[tuple[float, bool]]]) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{'':<12}{'median s':>10}{'least':>8}{'most':>8}")
    for name, values in seconds.items():
        print(f"{name:<12}{medians[name]:10.2f}{min(values):8.2f}{max(values):8.2f}")
    best = {
        who: min((name for name in medians if name.startswith(who)), key=lambda name: medians[name])
        for who in ("ours", "hf")
    }
    print(f"{best['ours']} is {medians[best['hf']] / medians[best['ours']]:.2f} x {best['hf']}")
    pairs = list(zip(scores[best["ours"]], scores[best["hf"]], strict=True))
    worst = max(abs(ours - theirs) for (ours, _), (theirs, _) in pairs)
    greedy = sum(ours != theirs for (_, ours), (_, theirs) in pairs)
    print(f"largest difference of a log-likelihood {worst:.1e}, of `is_greedy` {greedy}")
    assert worst < _CLOSE and not greedy, "the two models give different answers"


if __name__ == "__main__":
    main()
