"""Measures one model in a process that does nothing else.

`python -m mobilellm_jax.benchmark.measure` reads a `Request` as JSON from the standard input. The
last line on the standard output is a `Measurement` as JSON. All runtimes use all cores.

- load: seconds from the file to a model that can answer.
- init: seconds for the first prompt and the two tokens after it, with everything that is compiled,
  packed or allocated at first use.
- prefill: seconds until the first token. The prompt is read at once; an export computes logits at
  every position of it.
- decode: seconds per further token of the same text, with the cache. JAX decodes in a compiled
  loop.
- memory: growth of the process's resident memory at its peak, without the libraries.
"""

import dataclasses
import json
import resource
import sys
import time
from pathlib import Path

import jax

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.engine import Engine, RuntimeEngine, Writer, jax_engine
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.generation import generate
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.open_model import OpenedModel, open_model
from mobilellm_jax.quantize.parameters import stored_bytes
from mobilellm_jax.quantize.schemes import find_scheme
from mobilellm_jax.storage import sealing, strict_json

_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of one process; times are in seconds, and lists have one value per round."""

    path: str
    runtime: str
    precision: str
    model: ModelConfig
    model_bytes: int
    load_sec: float
    init_sec: float
    prefill_sec: list[float]  # per prompt
    decode_sec: list[float]  # per token
    memory_bytes: int
    loss: float  # nats per token of the text


def is_artifact(path: Path) -> bool:
    """Returns whether `path` names an export for a device instead of a checkpoint."""
    folder = path if path.is_dir() else path.parent
    is_step = path.is_dir() and path.resolve().name.isdecimal()  # it has a manifest too
    return path.is_file() or ((folder / sealing.MANIFEST).is_file() and not is_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A model and how it is measured."""

    path: str  # an export or a checkpoint
    scheme: str | None = None  # quantization of a checkpoint in JAX
    prompt_tokens: int
    new_tokens: int
    rounds: int
    text: str


def check(request: Request) -> None:
    """Checks a model before anything is measured.

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
    # The prefill draws one more token than the tokens that are timed.
    if request.prompt_tokens + request.new_tokens + 1 > room:
        raise UserError(
            f"--prompt_tokens={request.prompt_tokens} and --new_tokens={request.new_tokens} and "
            f"one more must fit max_seq_len={room} of {path}; lower one of them."
        )


def measure(request: Request) -> Measurement:
    """Loads a model that `check` has accepted, and measures it."""
    path = Path(request.path)
    if is_artifact(path):
        artifact = open_artifact(path)
        config, tokenizer = artifact.info.model, artifact.tokenizer()
        precision, size = artifact.info.precision, artifact.model_bytes

        def load() -> Engine:
            return RuntimeEngine(config, precision, artifact.load())

    else:
        # The checkpoint is read before it is timed, because an export has also been read before.
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
    _seconds(write, prompt, request.new_tokens)  # compiles the programs for these lengths
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


def _open(request: Request) -> OpenedModel:
    return open_model(request.path, find_scheme(request.scheme) if request.scheme else None)


def _prompt(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    ids = tokenizer.encode(text)
    return [tokenizer.bos_id, *(ids * (count // len(ids) + 1))][:count]


def _seconds(write: Writer, prompt: list[int], count: int) -> tuple[float, float]:
    """Returns the seconds until the first token, and the seconds per token of `count` more."""
    began = time.perf_counter()
    tokens = write(generate.Request([prompt], max_new_tokens=1 + count, sampling=GREEDY))
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - began, (time.perf_counter() - first) / count


def _reset_peak() -> int:
    """Resets the peak of the resident memory and returns the present value in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()  # this system cannot reset the peak
    return _status("VmRSS")


def _peak() -> int:
    if _STATUS.is_file():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    asked = strict_json.as_type(strict_json.parse(sys.stdin.read()), Request)
    print(json.dumps(dataclasses.asdict(measure(asked))))
