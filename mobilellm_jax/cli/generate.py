"""Continues a prompt; without one, reads prompts line by line until end of input (Ctrl-D).

  mobilellm generate --checkpoint=runs/quickstart --prompt='Return a list of'
  mobilellm generate --checkpoint=runs/quickstart/checkpoints/400 --prompt='Once' --temperature=0
  mobilellm generate --checkpoint=exported/hf --top_k=40 --top_p=1 --seed=7
  cat prompts.txt | mobilellm generate --checkpoint=runs/quickstart --max_new_tokens=50

Prompt and continuation go to the standard output as they come, tokens per second to the standard
error. --prompt= (empty) starts a text from nothing.
"""

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from absl import flags

from mobilellm_jax.cli.errors import is_bad_input

if TYPE_CHECKING:
    from mobilellm_jax.open_model import OpenedModel
    from mobilellm_jax.sampling import Sampling

_DEFAULT_NEW_TOKENS = 128

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run folder (its latest step), step folder or Hugging Face directory",
    required=True,
)
_PROMPT = flags.DEFINE_string("prompt", None, "text to continue; without it, read line by line")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    f"tokens after which a text ends (default: {_DEFAULT_NEW_TOKENS}, or fewer where the model's "
    "longest sequence leaves no more room)",
    lower_bound=1,
)
# Sampling's defaults, which a test compares: importing it here would load jax even for --help.
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "0 takes the likeliest token, 1 draws from the model's own distribution"
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the K likeliest tokens; 0 keeps all")
_TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "keep the likeliest tokens that together reach this probability; 1 keeps all"
)
_SEED = flags.DEFINE_integer("seed", 0, "same seed, same text")

# An untrained model says any byte. On a terminal, control characters are shown as symbols.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def main(argv: list[str]) -> None:
    """Generates."""
    del argv  # no config, no overrides
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.sampling import Sampling

    sampling = Sampling(
        temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value, seed=_SEED.value
    )
    model = open_model(_CHECKPOINT.value)
    if _PROMPT.value is not None:
        _speak(model, _PROMPT.value, sampling)
    elif sys.stdin.isatty():
        _converse(model, sampling)
    else:
        for line in _lines():
            _speak(model, line.removesuffix("\n"), sampling)


def _lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise ValueError(f"The prompts on the standard input must be UTF-8: {error}.") from error


def _converse(model: "OpenedModel", sampling: "Sampling") -> None:
    print(
        f"{model.origin}: a line is continued; Ctrl-C stops a text, Ctrl-D ends.", file=sys.stderr
    )
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        try:
            _speak(model, prompt, sampling)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            if not is_bad_input(error):
                raise
            print(error, file=sys.stderr)  # a prompt that is too long, say; the next one may fit


def _speak(model: "OpenedModel", prompt: str, sampling: "Sampling") -> None:
    """Prints the prompt, its continuation as it comes, and the speed."""
    from mobilellm_jax.generate import decode_stream, encode_prompt, stream

    ids = encode_prompt(model.tokenizer, prompt)
    room = model.config.max_seq_len - len(ids)
    limit = _MAX_NEW_TOKENS.value or max(1, min(_DEFAULT_NEW_TOKENS, room))
    clock = _Clock()
    chunks = stream(
        *(model.config, model.params, ids),
        max_new_tokens=limit,
        sampling=sampling,
        eos_id=model.tokenizer.eos_id,
    )
    pieces = decode_stream(model.tokenizer, ids, clock.count(chunks))
    first = next(pieces, "")  # before the prompt is shown, so that an error stands alone
    for text in (prompt, first):
        _show(text)
    for text in pieces:
        _show(text)
    print(flush=True)
    print(clock.report(), file=sys.stderr, flush=True)


def _show(text: str) -> None:
    sys.stdout.write(text.translate(_VISIBLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@dataclasses.dataclass
class _Clock:
    """Counts tokens as they pass.

    The first two chunks may wait for a compiler, so the speed is that of the later ones.
    """

    tokens: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)
    compiled: tuple[int, float] | None = None  # tokens and time when the second chunk had come
    ended: float = 0.0

    def count(self, chunks: Iterable[list[int]]) -> Iterator[list[int]]:
        for number, chunk in enumerate(chunks):
            self.tokens += len(chunk)
            self.ended = time.perf_counter()
            if number == 1:
                self.compiled = (self.tokens, self.ended)
            yield chunk

    def report(self) -> str:
        line = f"[{self.tokens} tokens in {self.ended - self.started:.1f} s"
        if self.compiled and self.tokens > self.compiled[0]:
            tokens, moment = self.compiled
            rate = (self.tokens - tokens) / (self.ended - moment)
            line += f", {rate:.1f} tokens/s once compiled"
        return line + "]"
