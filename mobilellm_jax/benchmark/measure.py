"""Measures models, each in several processes that do nothing else.

`python -m mobilellm_jax.benchmark.measure` reads a `Request` as JSON from the standard input. It
prints a `Measurement` as JSON on the last line of the standard output. Each runtime uses all CPU
cores.

- load: seconds from opening the file until the model can be used.
- init: seconds for the first prompt and two new tokens. This includes everything that the runtime
  compiles, packs or allocates at its first use.
- prefill: seconds until the first new token. The model reads the prompt in one pass. An export also
  computes logits at every position of the prompt.
- decode: seconds per new token after the first one, with the cache. JAX decodes in a compiled loop.
- memory: the peak of the resident memory minus the resident memory before the model is loaded, so
  libraries do not count.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from mobilellm_jax.checkpoint import is_step_folder
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.engine import Engine, RuntimeEngine, Writer, jax_engine
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.generation import generate
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.open_model import open_model
from mobilellm_jax.quantize.parameters import stored_bytes
from mobilellm_jax.quantize.schemes import find_scheme
from mobilellm_jax.startup.host_memory import peak_bytes
from mobilellm_jax.storage import sealing, strict_json

_STATUS = Path("/proc/self/status")


class MeasuringError(RuntimeError):
    """A process that measured a model failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """The results of one process; times are in seconds, and lists have one value per round."""

    path: str
    runtime: str
    precision: str
    model: ModelConfig
    model_bytes: int
    load_sec: float
    init_sec: float
    prefill_sec: list[float]  # Seconds per prompt.
    decode_sec: list[float]  # Seconds per token.
    memory_bytes: int
    loss: float  # In nats per token of the text.


def is_artifact(path: Path) -> bool:
    """Returns whether `path` is an export for a device; otherwise it is a checkpoint."""
    folder = path if path.is_dir() else path.parent
    # A step has a manifest too.
    return path.is_file() or ((folder / sealing.MANIFEST).is_file() and not is_step_folder(folder))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A model to measure, and the settings of the measurement."""

    path: str  # An export or a checkpoint.
    scheme: str | None = None  # Quantization of a checkpoint, which runs in JAX.
    prompt_tokens: int
    new_tokens: int
    rounds: int
    text: str


def check(request: Request) -> None:
    """Checks that a model can be measured, before the measurements start.

    Raises:
      UserError: if the tokens do not fit the model, or its runtime is not installed.
      MissingFileError: if there is no model at `path`.
      ConfigError: if the scheme does not apply to the checkpoint.
    """
    path = Path(request.path)
    if path.exists() and is_artifact(path):
        artifact = open_artifact(path)
        artifact.check_runtime()
        room = artifact.info.model.max_seq_len
    else:
        room = _open(request).config.max_seq_len
    # Decoding is timed for `new_tokens` tokens, and prefill draws one token before them.
    if request.prompt_tokens + request.new_tokens + 1 > room:
        raise UserError(
            f"--prompt_tokens={request.prompt_tokens} and --new_tokens={request.new_tokens} and "
            f"one more must fit max_seq_len={room} of {path}; lower one of them."
        )


def measure_all(requests: Sequence[Request], runs: int) -> list[list[Measurement]]:
    """Returns all measurements of each request; every measurement is a new process.

    All models are measured one after another, `runs` times in total. Other work on the machine
    therefore affects all models alike.

    Raises:
      MeasuringError: if a process fails; the message holds the last lines that it wrote.
    """
    found: list[list[Measurement]] = [[] for _ in requests]
    turns = [(i, request) for _ in range(runs) for i, request in enumerate(requests)]
    for i, request in tqdm(turns, unit="process", disable=None):
        found[i].append(_measured(request))
    return found


def measure(request: Request) -> Measurement:
    """Loads and measures a model; call `check` before."""
    path = Path(request.path)
    if is_artifact(path):
        artifact = open_artifact(path)
        config, tokenizer = artifact.info.model, artifact.tokenizer()
        precision, size = artifact.info.precision, artifact.model_bytes

        def load() -> Engine:
            return RuntimeEngine(config, precision, artifact.load())

    else:
        # `open_artifact` reads every file of an export. So the disk cache holds an export before we
        # time its loading. We read a checkpoint once, so that the disk cache holds it too.
        opened = _open(request)
        config, tokenizer = opened.config, opened.tokenizer
        precision, size = request.scheme or "float32", stored_bytes(opened.params)
        del opened

        def load() -> Engine:
            return jax_engine(config, _open(request).params, jax.devices()[:1])

    prompt = _prompt(tokenizer, request.text, request.prompt_tokens)
    before = _reset_peak()
    began = time.perf_counter()
    engine = load()
    write = engine.writer()
    load_sec = time.perf_counter() - began
    init_sec = sum(_seconds(write, prompt, 1))
    _seconds(write, prompt, request.new_tokens)  # Compiles the programs for these lengths.
    rounds = [_seconds(write, prompt, request.new_tokens) for _ in range(request.rounds)]
    memory = _peak() - before
    text = CutText.cut(tokenizer, request.text, config.max_seq_len, stride=config.max_seq_len)
    return Measurement(
        path=request.path,
        runtime=engine.name,
        precision=precision,
        model=config,
        model_bytes=size,
        load_sec=load_sec,
        init_sec=init_sec,
        prefill_sec=[prefill for prefill, _ in rounds],
        decode_sec=[decode for _, decode in rounds],
        memory_bytes=memory,
        loss=perplexity(engine, text).loss,
    )


def _measured(request: Request) -> Measurement:
    process = subprocess.run(
        [sys.executable, "-m", "mobilellm_jax.benchmark.measure"],
        input=json.dumps(dataclasses.asdict(request)),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",  # A runtime in C++ may write any bytes.
    )
    if process.returncode:
        # If a signal killed a runtime in C++, there is no message, so we report the signal.
        end = f"signal {-process.returncode}" if process.returncode < 0 else process.returncode
        last = process.stderr.strip().splitlines()[-12:]
        raise MeasuringError(f"Measuring {request.path} ended with {end}:\n" + "\n".join(last))
    answer = strict_json.parse(process.stdout.splitlines()[-1])
    found: Measurement = strict_json.as_type(answer, Measurement, request.path)
    return found


def _open(request: Request) -> OpenedModel:
    return open_model(request.path, find_scheme(request.scheme) if request.scheme else None)


def _prompt(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    ids = tokenizer.encode(text)
    return [*tokenizer.convention.before, *(ids * (count // len(ids) + 1))][:count]


def _seconds(write: Writer, prompt: list[int], count: int) -> tuple[float, float]:
    """Returns the seconds until the first new token, and the seconds per later token."""
    began = time.perf_counter()
    tokens = write(generate.Request([prompt], max_new_tokens=1 + count, sampling=GREEDY))
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - began, (time.perf_counter() - first) / count


def _reset_peak() -> int:
    """Resets the peak of the resident memory; returns the resident memory now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()  # This system cannot reset the peak.
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM") if _STATUS.is_file() else peak_bytes()


def _status(field: str) -> int:
    [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    asked = strict_json.as_type(strict_json.parse(sys.stdin.read()), Request)
    print(json.dumps(dataclasses.asdict(measure(asked))))
