"""Continues prompts from the flags or from standard input.

  mobilellm generate --checkpoint=runs/quickstart --prompt='Return a list of'
  mobilellm generate --checkpoint=runs/quickstart/checkpoints/400 --prompt='Once' --temperature=0
  mobilellm generate --checkpoint=exported/hf --top_k=40 --top_p=1 --seed=7
  mobilellm generate --checkpoint=runs/quickstart --prompt_file=prompts.txt --batch_size=16
  mobilellm generate --checkpoint=runs/quickstart --prompt='Once' --quantize=w8a8
  cat prompts.txt | mobilellm generate --checkpoint=runs/quickstart --max_new_tokens=50

Without --prompt and --prompt_file, the command reads one prompt per line from standard input until
Ctrl-D. The texts go to standard output, and the speed goes to standard error. A single prompt is
printed first, and then its continuation token by token. Several prompts (several --prompt flags, or
one prompt per line of --prompt_file) are continued in batches of --batch_size, and each batch is
printed when it is complete. With --prompt= (empty), the model starts a text without a prompt.
"""

import dataclasses
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm_jax.cli.errors import UsageError, message
from mobilellm_jax.cli.flags import flag
from mobilellm_jax.cli.shared import CHECKPOINT_HELP, PARTS_HELP, QUANTIZE_HELP, chosen_scheme
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.text_file import decoded_lines, read_lines

if TYPE_CHECKING:
    from mobilellm_jax.generation.generate import Prepared, Shape
    from mobilellm_jax.generation.sampling import Sampling
    from mobilellm_jax.model.opened import OpenedModel

_log = logging.getLogger(__name__)
_DEFAULT_NEW_TOKENS = 128
_SHOWN = 40  # Characters of a prompt in a message.
_NAMED = 8  # Prompts that one error names.


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    checkpoint: Path = flag(None, CHECKPOINT_HELP, required=True)
    prompt: list[str] | None = flag(
        None,
        "text to continue, may be repeated; without this flag the command reads standard input",
    )
    prompt_file: Path | None = flag(None, "UTF-8 text with a prompt on each line")
    batch_size: int = flag(8, "prompts to continue together", lower_bound=1)
    max_new_tokens: int | None = flag(
        None,
        f"largest number of new tokens (default: {_DEFAULT_NEW_TOKENS}, or the number that fits "
        "into model.max_seq_len)",
        lower_bound=1,
    )
    # The defaults equal those of `Sampling`, as a test checks; importing it would load jax.
    temperature: float = flag(
        0.8, "0 takes the likeliest token; 1 draws from the distribution of the model"
    )
    top_k: int = flag(0, "keep the K likeliest tokens; 0 keeps all")
    top_p: float = flag(
        0.95, "keep the likeliest tokens that together reach this probability; 1 keeps all"
    )
    quantize: str | None = flag(None, QUANTIZE_HELP)
    quantized_parts: str | None = flag(None, PARTS_HELP)
    seed: int = flag(
        0, "random seed; the random numbers of the n-th prompt depend only on the seed and n"
    )


# An untrained model may draw any byte. On a terminal, we print control characters as symbols.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def main(flags: Flags) -> None:
    """Continues the prompts and prints the texts."""
    from mobilellm_jax.generation.generate import prepare
    from mobilellm_jax.generation.sampling import Sampling
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.startup.compile_cache import use_compile_cache

    sampling = Sampling(
        temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed
    )
    given = _given(flags)
    scheme = chosen_scheme(flags.quantize, flags.quantized_parts)
    use_compile_cache()
    model = open_model(flags.checkpoint, scheme)
    speaker = _Speaker(model, prepare(model.config, model.params), sampling, flags.max_new_tokens)
    if given is not None:
        prompts = _checked(speaker, given)
        if len(prompts) == 1:
            speaker.speak(prompts[0])
            return
        for first in range(0, len(prompts), flags.batch_size):
            speaker.speak_together(prompts[first : first + flags.batch_size])
    elif sys.stdin.isatty():
        _converse(speaker)
    else:
        lines = decoded_lines(sys.stdin.buffer, "The standard input")
        for number, line in enumerate(lines):
            speaker.speak(speaker.prompt(line, number, f"line {number + 1} of the standard input"))


def _given(flags: Flags) -> list[tuple[str, str]] | None:
    """Returns the prompts in the flags with their places; None if they come from standard input."""
    if flags.prompt_file is None:
        if flags.prompt is None:
            return None
        return [(text, f"--prompt={_start(text)}") for text in map(_as_utf8, flags.prompt)]
    if flags.prompt is not None:
        raise UsageError("--prompt and --prompt_file exclude each other; put all in the file.")
    lines = read_lines("--prompt_file", flags.prompt_file)
    return [(line, f"line {number} of {flags.prompt_file}") for number, line in enumerate(lines, 1)]


def _as_utf8(text: str) -> str:
    """Decodes the bytes that Python could not decode, because the locale is C or ASCII."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text  # The tokenizer refuses a text that is not UTF-8.


def _start(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _converse(speaker: "_Speaker") -> None:
    _log.info(
        f"{speaker.model.origin}: enter a line to continue; Ctrl-C stops a text, Ctrl-D ends."
    )
    for number in itertools.count():
        try:
            text = input("> ")
        except EOFError:
            _log.info("")
            return
        try:
            speaker.speak(speaker.prompt(text, number, "this line"))
        except KeyboardInterrupt:
            print()
        except UserError as error:  # For example, the prompt is too long.
            _log.warning(message(error))


@dataclasses.dataclass(frozen=True)
class _Prompt:
    text: str
    ids: list[int]
    number: int  # The draws depend on the seed and on this number, which starts from 0.
    limit: int  # The largest number of new tokens.


def _checked(speaker: "_Speaker", given: Sequence[tuple[str, str]]) -> list[_Prompt]:
    """Returns the prompts with their tokens; one error names every prompt that does not fit."""
    prompts, errors = [], []
    for number, (text, place) in enumerate(given):
        try:
            prompts.append(speaker.prompt(text, number, place))
        except UserError as error:
            errors.append(str(error))
    if errors:
        more = [f"There are {len(errors) - _NAMED} more such prompts."] * (len(errors) > _NAMED)
        raise UserError("\n".join([*errors[:_NAMED], *more]))
    return prompts


@dataclasses.dataclass(frozen=True)
class _Speaker:
    """A model that continues prompts; its weights are prepared once for all prompts."""

    model: "OpenedModel"
    prepared: "Prepared"
    sampling: "Sampling"
    max_new_tokens: int | None  # If None, the default, or fewer if fewer fit.
    compiled: set["Shape"] = dataclasses.field(default_factory=set)

    def prompt(self, text: str, number: int, place: str) -> _Prompt:
        """Returns a prompt that fits the model; an error message begins with `place`."""
        from mobilellm_jax.data.tokenizers.tokenizer import prompt_ids
        from mobilellm_jax.generation.generate import new_tokens_for

        try:
            ids = prompt_ids(self.model.tokenizer, text)
            limit = new_tokens_for(self.model.config, ids, self.max_new_tokens, _DEFAULT_NEW_TOKENS)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        return _Prompt(text, ids, number, limit)

    def speak(self, prompt: _Prompt) -> None:
        """Prints the prompt and its continuation token by token, and logs the speed."""
        from mobilellm_jax.generation.text_stream import decode_stream

        parts = (part for [part] in self._continue([prompt]))
        pieces = decode_stream(self.model.tokenizer, prompt.ids, parts)
        first = next(pieces, "")  # Raises errors before the prompt is printed.
        for text in itertools.chain([prompt.text, first], pieces):
            _show(text)
        print(flush=True)

    def speak_together(self, prompts: Sequence[_Prompt]) -> None:
        """Prints each prompt with its complete continuation, and logs the speed."""
        from mobilellm_jax.generation.text_stream import decode_stream

        rows: list[list[int]] = [[] for _ in prompts]
        for parts in self._continue(prompts):
            for row, part in zip(rows, parts, strict=True):
                row.extend(part)
        for prompt, new in zip(prompts, rows, strict=True):
            pieces = decode_stream(self.model.tokenizer, prompt.ids, [new])
            _show("".join([prompt.text, *pieces]))
            print(flush=True)

    def _continue(self, batch: Sequence[_Prompt]) -> Iterator[list[list[int]]]:
        """Yields parts with a few new tokens of every prompt, and logs the speed at the end."""
        from mobilellm_jax.generation.generate import Request, shape_of, stream

        request = Request(
            [prompt.ids for prompt in batch],
            max_new_tokens=[prompt.limit for prompt in batch],
            sampling=self.sampling,
            end_ids=self.model.tokenizer.convention.end_ids,
            streams=[prompt.number for prompt in batch],
        )
        shape = shape_of(self.model.config, self.prepared, request)
        if shape not in self.compiled:
            self.compiled.add(shape)
            _log.info(
                f"compiling for {shape.rows} x {shape.capacity} tokens; the first time on a "
                "machine takes longest"
            )
        tokens, chunks, compiled = 0, 0, (0, 0.0)
        began = now = time.perf_counter()
        for parts in stream(self.model.config, self.prepared, request):
            tokens += sum(map(len, parts))
            chunks += 1
            now = time.perf_counter()
            if chunks == 2:  # The first two chunks may include compilation.
                compiled = (tokens, now)
            yield parts
        speed = f"{tokens} tokens in {now - began:.1f} s"
        if chunks > 2 and tokens > compiled[0]:
            rate = (tokens - compiled[0]) / (now - compiled[1])
            speed += f", {rate:.1f} tokens/s once compiled"
        _log.info(f"[{speed}]")


def _show(text: str) -> None:
    sys.stdout.write(text.translate(_VISIBLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()
