"""Measures exports in their own runtimes, and checkpoints in JAX, side by side on this machine.

  mobilellm benchmark --artifact=exported/gguf --artifact=runs/quickstart --output=benchmarks/mine
  mobilellm benchmark --artifact=runs/quickstart --quantize=w8a8 --quantize=w4 --output=in_jax
  mobilellm benchmark --artifact=exported/q8 --prompt_tokens=64 --new_tokens=64 --output=q8

Every model is loaded in separate processes, and the models take turns. The table shows:

  - the size of the model file, and its bits per parameter of the model (a format that repeats
    shared blocks needs more bits)
  - the time to load the model
  - the time until the first token of the first prompt (init)
  - the tokens/s of reading a prompt with logits at every position (prefill), and of decoding
  - the peak memory
  - the loss of a text (--text=FILE, or a built-in text)

Energy and battery are estimates, not measurements: they use the paper's 0.1 J per token and billion
parameters, for a phone with 50 kJ at 10 tokens/s. The command writes benchmark.md, .csv, .json and
.png to --output.
"""

from pathlib import Path

from absl import flags

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.shared import QUANTIZE_HELP, new_flags, read_text
from mobilellm_jax.errors import UserError
from mobilellm_jax.quantize.schemes import find_scheme

FLAGS = new_flags()
_ARTIFACT = flags.DEFINE_multi_string(
    "artifact",
    None,
    "folder of `mobilellm export`, or a checkpoint; may be repeated",
    FLAGS,
    required=True,
)
_QUANTIZE = flags.DEFINE_multi_string(
    "quantize",
    [],
    f"also measure every checkpoint in JAX with this quantization; may be repeated. "
    f"{QUANTIZE_HELP}",
    FLAGS,
)
_OUTPUT = flags.DEFINE_string("output", None, "folder for the results", FLAGS, required=True)
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 128, "tokens of the prompt", lower_bound=1, flag_values=FLAGS
)
_NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 64, "tokens to decode", lower_bound=1, flag_values=FLAGS
)
_RUNS = flags.DEFINE_integer("runs", 3, "processes per model", lower_bound=1, flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "measurements in each process", lower_bound=1, flag_values=FLAGS
)
_TEXT = flags.DEFINE_string(
    "text", "", "UTF-8 text for the loss; the prompt comes from the same text", FLAGS
)


def main(argv: list[str]) -> None:
    """Measures the models, prints the table and writes the results."""
    del argv  # the command has no config, so it has no overrides
    from mobilellm_jax.benchmark.measure import Request, check, is_artifact
    from mobilellm_jax.benchmark.run import benchmark, write_results
    from mobilellm_jax.benchmark.table import markdown
    from mobilellm_jax.export.verify import TEXT

    text = read_text("--text", Path(_TEXT.value)) if _TEXT.value else TEXT
    if not text.strip():
        raise UserError(f"--text={_TEXT.value} is empty; name a file with text.")
    schemes = [find_scheme(name).name for name in _QUANTIZE.value]
    requests = [
        Request(
            path=path,
            scheme=scheme,
            prompt_tokens=_PROMPT_TOKENS.value,
            new_tokens=_NEW_TOKENS.value,
            rounds=_ROUNDS.value,
            text=text,
        )
        for path in _ARTIFACT.value
        for scheme in [None, *([] if is_artifact(Path(path)) else schemes)]
    ]
    if schemes and not any(request.scheme for request in requests):
        raise UsageError(
            f"--quantize={schemes[0]} needs a checkpoint among --artifact; an export is "
            "quantized by `mobilellm export --quantize`."
        )
    for request in requests:
        check(request)
    output = Path(_OUTPUT.value)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder.")
    rows, measured = benchmark(requests, _RUNS.value)
    write_results(output, rows, measured)
    print(markdown(rows), end="")
    print(f"\n{output}/benchmark.md, .csv, .json, .png; energy and battery are estimates.")
