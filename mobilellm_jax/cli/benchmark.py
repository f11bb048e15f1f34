"""Compares exports (in their own runtimes) and checkpoints (in JAX) on this machine.

  mobilellm benchmark --artifact=exported/gguf --artifact=runs/quickstart --output=benchmarks/mine
  mobilellm benchmark --artifact=runs/quickstart --quantize=w8a8 --quantize=w4 --output=in_jax
  mobilellm benchmark --artifact=exported/q8 --prompt_tokens=64 --new_tokens=64 --output=q8

Each model is measured in several processes, and the models take turns. The table shows:

  - the size of the model file, also in bits per parameter (more bits if the format stores a shared
    block several times)
  - the time to load the model
  - the time for the first prompt and two new tokens, which includes compilation (init)
  - the speed of reading a prompt (prefill) and of decoding, in tokens/s
  - the peak memory
  - the loss on a text (--text=FILE, or a built-in text)

Energy and battery hours are not measured. They are estimates from the paper's numbers: 0.1 J per
token and billion parameters, a phone battery of 50 kJ, and 10 tokens/s. The estimate ignores the
rest of the phone, so the table shows more than one week as "> 168" hours. The command writes
benchmark.md, .csv, .json and .png to --output.
"""

import dataclasses
from pathlib import Path

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.flags import flag
from mobilellm_jax.cli.shared import QUANTIZE_HELP
from mobilellm_jax.errors import UserError, require
from mobilellm_jax.quantize.schemes import find_scheme
from mobilellm_jax.storage.outputs import MODEL_FILES, own_folder
from mobilellm_jax.storage.text_file import read_text


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    artifact: list[Path] = flag(
        None, "folder of `mobilellm export`, or a checkpoint; may be repeated", required=True
    )
    quantize: list[str] = flag(
        [],
        "also measure every checkpoint in JAX with this quantization; may be repeated. "
        + QUANTIZE_HELP,
    )
    output: Path = flag(None, "folder for the results", required=True)
    prompt_tokens: int = flag(128, "tokens of the prompt", lower_bound=1)
    new_tokens: int = flag(64, "tokens to decode", lower_bound=1)
    runs: int = flag(3, "processes per model", lower_bound=1)
    rounds: int = flag(3, "measurements in each process", lower_bound=1)
    text: Path | None = flag(None, "UTF-8 text for the loss; the prompt comes from the same text")


def main(flags: Flags) -> None:
    """Measures the models, prints the table and writes the results."""
    from mobilellm_jax.benchmark.measure import Request, check, is_artifact, measure_all
    from mobilellm_jax.benchmark.table import (
        RESULTS,
        is_benchmark,
        markdown,
        summarize,
        write_results,
    )
    from mobilellm_jax.export.verify import TEXT

    require("matplotlib", "report", "the picture of mobilellm benchmark")
    names = (*RESULTS, *MODEL_FILES)
    folder = own_folder("--output", flags.output, "a benchmark", is_benchmark, names)
    text = read_text("--text", flags.text) if flags.text else TEXT
    text_name = str(flags.text) if flags.text else "the built-in text"
    if not text.strip():
        raise UserError(f"--text={flags.text} is empty; name a file with text.")
    schemes = [find_scheme(name).name for name in flags.quantize]
    requests = [
        Request(
            path=str(path),
            scheme=scheme,
            prompt_tokens=flags.prompt_tokens,
            new_tokens=flags.new_tokens,
            rounds=flags.rounds,
            text=text,
        )
        for path in flags.artifact
        for scheme in [None, *([] if is_artifact(path) else schemes)]
    ]
    if schemes and not any(request.scheme for request in requests):
        raise UsageError(
            f"--quantize={schemes[0]} needs a checkpoint among --artifact; an export is "
            "quantized by `mobilellm export --quantize`."
        )
    for request in requests:
        check(request)
    measured = measure_all(requests, flags.runs)
    rows = [summarize(each, flags.prompt_tokens) for each in measured]
    print(markdown(rows, text_name), end="", flush=True)  # Before the disk can be full.
    write_results(folder, rows, measured, text_name)
    print(f"\n{flags.output}/benchmark.md, .csv, .json, .png; energy and battery are estimates.")
