"""Measures exports in their own runtimes, and checkpoints in JAX, side by side on this machine.

  mobilellm benchmark --artifact=exported/gguf --artifact=runs/quickstart --output=benchmarks/mine
  mobilellm benchmark --artifact=runs/quickstart --quantize=w8a8 --quantize=w4 --output=in_jax
  mobilellm benchmark --artifact=exported/q8 --prompt_tokens=64 --new_tokens=64 --output=q8

Every model is loaded in processes of its own, in turn with the others. The table says the size of
the model file, its bits for each parameter of the model (a format that writes a shared block out
as often as it is applied has more), the time to load it, the first prompt and token (init),
tokens/s of reading a prompt (prefill, logits at every position) and of decoding, how much memory it
needs at its peak, and the loss of a text (--text=FILE, or one of our own). Energy and battery are
not measured: they are estimates by the paper's 0.1 J per token and billion parameters, for a phone
of 50 kJ at 10 tokens/s. --output gets benchmark.md, .csv, .json and .png.
"""

from pathlib import Path

from absl import flags

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.quantizing import QUANTIZE_HELP
from mobilellm_jax.errors import UserError
from mobilellm_jax.quantize.schemes import find_scheme

_ARTIFACT = flags.DEFINE_multi_string(
    "artifact", None, "folder that mobilellm export made, or a CKPT; may be repeated", required=True
)
_QUANTIZE = flags.DEFINE_multi_string(
    "quantize",
    [],
    f"measure every CKPT in JAX in this form as well; may be repeated. {QUANTIZE_HELP}",
)
_OUTPUT = flags.DEFINE_string("output", None, "folder for the results", required=True)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 128, "tokens of the prompt", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "tokens that are decoded", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 3, "processes per model", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "times that each process measures", lower_bound=1)
_TEXT = flags.DEFINE_string("text", "", "UTF-8 text whose loss is measured, and the prompt's words")


def main(argv: list[str]) -> None:
    """Measures."""
    del argv  # no config, no overrides
    from mobilellm_jax.benchmark.measure import Subject, check, is_artifact
    from mobilellm_jax.benchmark.run import benchmark, write_results
    from mobilellm_jax.benchmark.table import markdown
    from mobilellm_jax.export.verify import TEXT

    schemes = [find_scheme(name) for name in _QUANTIZE.value]
    subjects = []
    for path in map(Path, _ARTIFACT.value):
        subjects.append(Subject(path=path))
        if not is_artifact(path):
            subjects += [Subject(path=path, scheme=scheme) for scheme in schemes]
    if schemes and not any(subject.scheme for subject in subjects):
        raise UsageError(
            f"--quantize={schemes[0].name} needs a checkpoint among --artifact; exports are "
            "quantized by export --quantize."
        )
    for subject in subjects:
        check(subject, _PROMPT_TOKENS.value, _NEW_TOKENS.value)
    text = _read(Path(_TEXT.value)) if _TEXT.value else TEXT
    output = Path(_OUTPUT.value)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output={output} is a file; name a folder.")
    rows, measured = benchmark(
        subjects,
        prompt_tokens=_PROMPT_TOKENS.value,
        new_tokens=_NEW_TOKENS.value,
        runs=_RUNS.value,
        rounds=_ROUNDS.value,
        text=text,
    )
    write_results(output, rows, measured)
    print(markdown(rows), end="")
    print(f"\n{output}/benchmark.md, .csv, .json, .png; energy and battery are estimates.")


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text={file} must be UTF-8; byte {error.start} is not.") from error
    if not text.strip():
        raise UserError(f"--text={file} is empty; name a file with text.")
    return text
