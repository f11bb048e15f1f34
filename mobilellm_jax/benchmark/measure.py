"""Measures one model in a process that does nothing else.

`python -m mobilellm_jax.benchmark.measure` reads a `Request` as JSON from the standard input. The
last line on the standard output is a `Measurement` as JSON. All runtimes use all cores.

- load: seconds from the file to a model that can answer.
- init: seconds for the first prompt and the token after it (two such passes in JAX), with
  everything that is compiled, packed or allocated at first use.
- prefill: seconds for a prompt that is read at once, with logits at every position.
- decode: seconds per token with the cache, after such a prompt. JAX decodes in a compiled loop.
- memory: growth of the process's resident memory at its peak, without the libraries.
"""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.perplexity import perplexity, runtime_perplexity
from mobilellm_jax.export.artifact import Artifact, open_artifact
from mobilellm_jax.export.runtime import Runtime
from mobilellm_jax.generation import generate
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.open_model import OpenedModel, open_model
from mobilellm_jax.quantize.parameters import quantize_model, stored_bytes
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


class _Loaded(Protocol):
    """A loaded model."""

    @property
    def name(self) -> str: ...

    def read(self, prompt: Sequence[int]) -> None: ...

    def decode(self, prompt: Sequence[int], count: int) -> float: ...

    def loss(self, tokenizer: Tokenizer, text: str) -> float: ...


class _InRuntime:
    """An exported model in its runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.name = runtime.name

    def read(self, prompt: Sequence[int]) -> None:
        self._runtime.read(prompt)

    def decode(self, prompt: Sequence[int], count: int) -> float:
        """Returns the seconds per token."""
        token = int(self._runtime.read(prompt)[-1].argmax())
        began = time.perf_counter()
        for _ in range(count):
            token = int(self._runtime.append(token).argmax())
        return (time.perf_counter() - began) / count

    def loss(self, tokenizer: Tokenizer, text: str) -> float:
        return runtime_perplexity(
            self._runtime, tokenizer, text, stride=self._runtime.max_seq_len
        ).loss


class _InJax:
    """A checkpoint in JAX."""

    def __init__(self, model: OpenedModel) -> None:
        import jax

        self._config = model.config
        self._params = model.params
        self._prepared: generate.Prepared = generate.prepare(model.config, model.params)
        self.name = f"JAX {jax.__version__}"

    def read(self, prompt: Sequence[int]) -> None:
        self._generate(prompt, 1)

    def decode(self, prompt: Sequence[int], count: int) -> float:
        """Returns the seconds per token, from the difference between one and more tokens."""
        one = _seconds(lambda: self._generate(prompt, 1))
        return (_seconds(lambda: self._generate(prompt, 1 + count)) - one) / count

    def loss(self, tokenizer: Tokenizer, text: str) -> float:
        length = self._config.max_seq_len
        return perplexity(self._config, self._params, tokenizer, text, stride=length).loss

    def _generate(self, prompt: Sequence[int], count: int) -> None:
        request = generate.Request([prompt], max_new_tokens=count, sampling=GREEDY)
        generate.generate(self._config, self._prepared, request)


def is_artifact(path: Path) -> bool:
    """Returns whether `path` names an export for a device instead of a checkpoint."""
    folder = path if path.is_dir() else path.parent
    inside_run = (
        path.is_dir() and path.resolve().name.isdecimal()
    )  # a step folder also has a manifest
    return path.is_file() or ((folder / sealing.MANIFEST).is_file() and not inside_run)


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
        artifact.loader()
        room = artifact.info.max_seq_len
    else:
        room = _open(request).config.max_seq_len
    # Decoding in JAX starts from one more token after the prompt.
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
        load = _loader(artifact)
    else:
        # The checkpoint is read before it is timed, because an export has also been read before.
        opened = _open(request)
        config, tokenizer = opened.config, opened.tokenizer
        precision = request.scheme or "float32"
        size = stored_bytes(opened.params)
        del opened

        def load() -> _Loaded:
            return _InJax(_open(request))

    prompt = _prompt(tokenizer, request.text, request.prompt_tokens)
    before = _reset_peak()
    began = time.perf_counter()
    loaded = load()
    load_sec = time.perf_counter() - began
    init_sec = _seconds(lambda: loaded.decode(prompt, 1))
    loaded.decode(prompt, request.new_tokens)  # compiles the programs for these lengths
    prefill_sec, decode_sec = [], []
    for _ in range(request.rounds):
        prefill_sec.append(_seconds(lambda: loaded.read(prompt)))
        decode_sec.append(loaded.decode(prompt, request.new_tokens))
    memory = _peak() - before
    return Measurement(
        path=request.path,
        runtime=loaded.name,
        precision=precision,
        model=config,
        model_bytes=size,
        load_sec=load_sec,
        init_sec=init_sec,
        prefill_sec=prefill_sec,
        decode_sec=decode_sec,
        memory_bytes=memory,
        loss=loaded.loss(tokenizer, request.text),
    )


def _open(request: Request) -> OpenedModel:
    opened = open_model(request.path)
    if request.scheme is None:
        return opened
    params = quantize_model(opened.config, opened.params, find_scheme(request.scheme))
    return dataclasses.replace(opened, params=params)


def _loader(artifact: Artifact) -> Callable[[], _Loaded]:
    load = artifact.loader()
    return lambda: _InRuntime(load())


def _prompt(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    ids = tokenizer.encode(text)
    return [tokenizer.bos_id, *(ids * (count // len(ids) + 1))][:count]


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


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
