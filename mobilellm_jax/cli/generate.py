"""Continues prompts; without any, reads them line by line until end of input (Ctrl-D).

  mobilellm generate --checkpoint=runs/quickstart --prompt='Return a list of'
  mobilellm generate --checkpoint=runs/quickstart/checkpoints/400 --prompt='Once' --temperature=0
  mobilellm generate --checkpoint=exported/hf --top_k=40 --top_p=1 --seed=7
  mobilellm generate --checkpoint=runs/quickstart --prompt_file=prompts.txt --batch_size=16
  mobilellm generate --checkpoint=runs/quickstart --prompt='Once' --quantize=w8a8
  cat prompts.txt | mobilellm generate --checkpoint=runs/quickstart --max_new_tokens=50

Prompt and continuation go to the standard output, tokens per second to the standard error. One
prompt is continued as it is read, token by token. Several, by --prompt again and again or in a
--prompt_file (one on each line), are continued together, --batch_size at a time, and printed when
they are complete. --prompt= (empty) starts a text from nothing.
"""

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from mobilellm_jax.cli.errors import UsageError, is_bad_input
from mobilellm_jax.cli.quantizing import PARTS_HELP, QUANTIZE_HELP, chosen_scheme, quantize_opened
from mobilellm_jax.errors import UserError

if TYPE_CHECKING:
    from mobilellm_jax.generation.generate import Prepared
    from mobilellm_jax.generation.sampling import Sampling
    from mobilellm_jax.open_model import OpenedModel

_DEFAULT_NEW_TOKENS = 128

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run folder (its latest step), step folder or Hugging Face directory",
    required=True,
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "text to continue, may be repeated; without any, read line by line"
)
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "UTF-8 text with a prompt on each line")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "prompts that are continued together, if there are several", lower_bound=1
)
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
_QUANTIZE = flags.DEFINE_string("quantize", None, QUANTIZE_HELP)
_QUANTIZED_PARTS = flags.DEFINE_string("quantized_parts", None, PARTS_HELP)
_SEED = flags.DEFINE_integer("seed", 0, "same seed, same text")

# An untrained model says any byte. On a terminal, control characters are shown as symbols.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def main(argv: list[str]) -> None:
    """Generates."""
    del argv  # no config, no overrides
    from mobilellm_jax.generation.sampling import Sampling
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.startup.compile_cache import use_compile_cache

    sampling = Sampling(
        temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value, seed=_SEED.value
    )
    prompts = _prompts()
    scheme = chosen_scheme(_QUANTIZE.value, _QUANTIZED_PARTS.value)
    use_compile_cache()
    model = quantize_opened(open_model(_CHECKPOINT.value), scheme)
    speaker = _Speaker.of(model, sampling)
    if prompts is not None and len(prompts) == 1:
        speaker.speak(prompts[0])
    elif prompts is not None:
        for first in range(0, len(prompts), _BATCH_SIZE.value):
            speaker.speak_together(prompts[first : first + _BATCH_SIZE.value])
    elif sys.stdin.isatty():
        _converse(speaker)
    else:
        for line in _lines():
            speaker.speak(line.removesuffix("\n"))


def _prompts() -> list[str] | None:
    """Returns the prompts of the command line; None: they come by the standard input."""
    file = _PROMPT_FILE.value
    if file is None:
        return None if _PROMPT.value is None else list(_PROMPT.value)
    if _PROMPT.value is not None:
        raise UsageError("--prompt and --prompt_file exclude each other; put all in the file.")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt_file={file!r} must be UTF-8: {error}.") from error
    prompts = text.removesuffix("\n").split("\n")  # not splitlines: U+2028 is part of a text
    if not text:
        raise UserError(f"prompt_file={file!r} is empty; put a prompt on each line.")
    return [prompt.removesuffix("\r") for prompt in prompts]


def _lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"The prompts on the standard input must be UTF-8: {error}.") from error


def _converse(speaker: "_Speaker") -> None:
    print(
        f"{speaker.model.origin}: a line is continued; Ctrl-C stops a text, Ctrl-D ends.",
        file=sys.stderr,
    )
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        try:
            speaker.speak(prompt)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            if not is_bad_input(error):
                raise
            print(error, file=sys.stderr)  # a prompt that is too long, say; the next one may fit


@dataclasses.dataclass(frozen=True)
class _Speaker:
    """A model whose weights are laid out for decoding, once for all prompts."""

    model: "OpenedModel"
    prepared: "Prepared"
    sampling: "Sampling"

    @classmethod
    def of(cls, model: "OpenedModel", sampling: "Sampling") -> "_Speaker":
        from mobilellm_jax.generation.generate import prepare

        return cls(model, prepare(model.config, model.params), sampling)

    def speak(self, prompt: str) -> None:
        """Prints the prompt, its continuation as it comes, and the speed."""
        from mobilellm_jax.generation.generate import stream
        from mobilellm_jax.generation.text_stream import decode_stream

        [ids] = self._encode([prompt])
        clock = _Clock()
        chunks = stream(
            *(self.model.config, self.prepared, ids),
            max_new_tokens=self._limit([ids]),
            sampling=self.sampling,
            eos_id=self.model.tokenizer.eos_id,
        )
        pieces = decode_stream(self.model.tokenizer, ids, clock.count(chunks))
        first = next(pieces, "")  # before the prompt is shown, so that an error stands alone
        for text in (prompt, first):
            _show(text)
        for text in pieces:
            _show(text)
        print(flush=True)
        print(clock.report(), file=sys.stderr, flush=True)

    def speak_together(self, prompts: Sequence[str]) -> None:
        """Prints the prompts with their continuations, one after the other, and the speed."""
        from mobilellm_jax.generation.generate import stream_batch
        from mobilellm_jax.generation.text_stream import decode_stream

        batch = self._encode(prompts)
        clock = _Clock()
        rows: list[list[int]] = [[] for _ in batch]
        for parts in stream_batch(
            *(self.model.config, self.prepared, batch),
            max_new_tokens=self._limit(batch),
            sampling=self.sampling,
            eos_id=self.model.tokenizer.eos_id,
        ):
            clock.tick(sum(map(len, parts)))
            for row, part in zip(rows, parts, strict=True):
                row.extend(part)
        for prompt, ids, new in zip(prompts, batch, rows, strict=True):
            _show("".join([prompt, *decode_stream(self.model.tokenizer, ids, [new])]))
            print(flush=True)
        print(clock.report(), file=sys.stderr, flush=True)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        from mobilellm_jax.generation.text_stream import encode_prompt

        return [encode_prompt(self.model.tokenizer, prompt) for prompt in prompts]

    def _limit(self, batch: Sequence[Sequence[int]]) -> int:
        """Returns how many tokens to draw: what was asked for, or what fits after the longest."""
        room = self.model.config.max_seq_len - max(map(len, batch))
        return int(_MAX_NEW_TOKENS.value or max(1, min(_DEFAULT_NEW_TOKENS, room)))


def _show(text: str) -> None:
    sys.stdout.write(text.translate(_VISIBLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@dataclasses.dataclass
class _Clock:
    """Counts tokens as they pass.

    The first two chunks may wait for a compiler, so the speed is that of the later ones.
    """

    tokens: int = 0
    chunks: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)
    compiled: tuple[int, float] | None = None  # tokens and time when the second chunk had come
    ended: float = 0.0

    def count(self, chunks: Iterable[list[int]]) -> Iterator[list[int]]:
        for chunk in chunks:
            self.tick(len(chunk))
            yield chunk

    def tick(self, tokens: int) -> None:
        """Counts the tokens of one chunk, which is there now."""
        self.tokens += tokens
        self.chunks += 1
        self.ended = time.perf_counter()
        if self.chunks == 2:
            self.compiled = (self.tokens, self.ended)

    def report(self) -> str:
        line = f"[{self.tokens} tokens in {self.ended - self.started:.1f} s"
        if self.compiled and self.tokens > self.compiled[0]:
            tokens, moment = self.compiled
            rate = (self.tokens - tokens) / (self.ended - moment)
            line += f", {rate:.1f} tokens/s once compiled"
        return line + "]"
