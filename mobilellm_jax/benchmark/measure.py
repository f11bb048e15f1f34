"""Measures one model in this process, which does nothing else: `python -m ... PATH TEXT`.

The last line on the standard output is a JSON object, a `Measurement`. Times are those of the
whole machine: every runtime uses all cores.

- load: from the file to a model that can be asked.
- init: the first prompt and the token after it (in JAX, twice), with whatever is compiled, packed
  or allocated at first use.
- prefill: a prompt read at once, with the logits of every position.
- decode: a token by the cache, after such a prompt; for a checkpoint in JAX, in its compiled loop.
- memory: what the process' resident memory grows by at its peak, libraries not counted.
"""

import argparse
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
from mobilellm_jax.generation.generate import Prepared, generate, prepare
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.open_model import OpenedModel, open_model
from mobilellm_jax.quantize.parameters import quantize_model, stored_bytes
from mobilellm_jax.quantize.schemes import Scheme, find_scheme
from mobilellm_jax.storage import sealing

_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a process found; times are seconds, one per round where there are several."""

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
    """A model that has been loaded."""

    @property
    def name(self) -> str: ...

    def read(self, prompt: Sequence[int]) -> None: ...

    def decode(self, prompt: Sequence[int], count: int) -> float: ...

    def loss(self, tokenizer: Tokenizer, text: str) -> float: ...


class _InRuntime:
    """An artefact."""

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
    """A checkpoint."""

    def __init__(self, model: OpenedModel) -> None:
        import jax

        self._config = model.config
        self._params = model.params
        self._prepared: Prepared = prepare(model.config, model.params)
        self.name = f"JAX {jax.__version__}"

    def read(self, prompt: Sequence[int]) -> None:
        self._generate(prompt, 1)

    def decode(self, prompt: Sequence[int], count: int) -> float:
        """Returns the seconds per token: what more tokens take beyond a single one."""
        one = _seconds(lambda: self._generate(prompt, 1))
        return (_seconds(lambda: self._generate(prompt, 1 + count)) - one) / count

    def loss(self, tokenizer: Tokenizer, text: str) -> float:
        length = self._config.max_seq_len
        return perplexity(self._config, self._params, tokenizer, text, stride=length).loss

    def _generate(self, prompt: Sequence[int], count: int) -> None:
        generate(self._config, self._prepared, [prompt], max_new_tokens=count, sampling=GREEDY)


def is_artifact(path: Path) -> bool:
    """Returns whether `path` is meant as an export for a device, and not as a checkpoint."""
    folder = path if path.is_dir() else path.parent
    inside_run = path.is_dir() and path.resolve().name.isdecimal()  # a step is sealed as well
    return path.is_file() or ((folder / sealing.MANIFEST).is_file() and not inside_run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be measured: an artefact, or a checkpoint in JAX."""

    path: Path
    scheme: Scheme | None = None  # that the checkpoint is quantized by


def check(subject: Subject, prompt_tokens: int, new_tokens: int) -> None:
    """Refuses what cannot be measured, before anything is.

    Raises:
      FileNotFoundError, ValueError: if there is no model at `path`, its runtime is not installed,
        or the tokens are more than it takes.
      ConfigError: if the scheme cannot be had of the checkpoint.
    """
    path = subject.path
    if path.exists() and is_artifact(path):
        artifact = open_artifact(path)
        artifact.loader()
        room = artifact.info.max_seq_len
    else:
        opened = _open(subject)
        room = opened.config.max_seq_len
    # The one token more is that of the prompt, which decoding starts from.
    if prompt_tokens + new_tokens + 1 > room:
        raise UserError(
            f"--prompt_tokens={prompt_tokens} and --new_tokens={new_tokens} and one more must fit "
            f"max_seq_len={room} of {path}; lower one of them."
        )


def measure(
    subject: Subject, *, prompt_tokens: int, new_tokens: int, rounds: int, text: str
) -> Measurement:
    """Loads a model, which `check` did not refuse, and measures it."""
    path = subject.path
    if is_artifact(path):
        artifact = open_artifact(path)
        config, tokenizer = artifact.info.model, artifact.tokenizer()
        precision, size = artifact.info.precision, artifact.model_bytes
        load = _loader(artifact)
    else:
        # Once to know it and once for the time: an artefact has been read before as well.
        opened = _open(subject)
        config, tokenizer = opened.config, opened.tokenizer
        precision = subject.scheme.name if subject.scheme else "float32"
        size = stored_bytes(opened.params)
        del opened

        def load() -> _Loaded:
            return _InJax(_open(subject))

    prompt = _prompt(tokenizer, text, prompt_tokens)
    before = _reset_peak()
    began = time.perf_counter()
    loaded = load()
    load_sec = time.perf_counter() - began
    init_sec = _seconds(lambda: loaded.decode(prompt, 1))
    loaded.decode(prompt, new_tokens)  # programs for these lengths
    prefill_sec, decode_sec = [], []
    for _ in range(rounds):
        prefill_sec.append(_seconds(lambda: loaded.read(prompt)))
        decode_sec.append(loaded.decode(prompt, new_tokens))
    memory = _peak() - before
    return Measurement(
        path=str(path),
        runtime=loaded.name,
        precision=precision,
        model=config,
        model_bytes=size,
        load_sec=load_sec,
        init_sec=init_sec,
        prefill_sec=prefill_sec,
        decode_sec=decode_sec,
        memory_bytes=memory,
        loss=loaded.loss(tokenizer, text),
    )


def _open(checkpoint: Subject) -> OpenedModel:
    opened = open_model(checkpoint.path)
    if checkpoint.scheme is None:
        return opened
    params = quantize_model(opened.config, opened.params, checkpoint.scheme)
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
    """Returns the resident memory in bytes, from which on the peak counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()  # no such thing here: the peak so far counts as used before
    return _status("VmRSS")


def _peak() -> int:
    if _STATUS.is_file():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompt_tokens", type=int, required=True)
    parser.add_argument("--new_tokens", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--scheme")
    given = parser.parse_args()
    found = measure(
        Subject(path=given.path, scheme=find_scheme(given.scheme) if given.scheme else None),
        prompt_tokens=given.prompt_tokens,
        new_tokens=given.new_tokens,
        rounds=given.rounds,
        text=given.text.read_text(encoding="utf-8"),
    )
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    _main()
