"""Measures the perplexity of a text: loss, perplexity and bits per byte, as JSON.

  mobilellm evaluate --checkpoint=runs/quickstart --perplexity=README.md
  mobilellm evaluate --checkpoint=exported/hf --perplexity=wikitext2.txt --output=wikitext2.json

The text is cut into windows of model.max_seq_len tokens, without overlap; what is left after the
last full window is not scored.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run folder (its latest step), step folder or Hugging Face directory",
    required=True,
)
_PERPLEXITY = flags.DEFINE_string("perplexity", None, "text file in UTF-8", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "file for the result, besides the standard output")


def main(argv: list[str]) -> None:
    """Evaluates."""
    del argv  # no config, no overrides
    from mobilellm_jax.evaluate.perplexity import perplexity
    from mobilellm_jax.open_model import open_model
    from mobilellm_jax.rundir import write_whole

    file = Path(_PERPLEXITY.value)
    text = _read_text(file)
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if output is not None:
        _check_output(output)
    model = open_model(_CHECKPOINT.value)
    result = perplexity(model.config, model.params, model.tokenizer, text)
    record = {"checkpoint": model.origin, "file": str(file), **dataclasses.asdict(result)}
    content = json.dumps(record, indent=2) + "\n"
    print(content, end="", flush=True)
    if output is not None:
        write_whole(output, content)


def _check_output(output: Path) -> None:
    """Refuses, before anything is computed, a name that no file can have."""
    if output.is_dir():
        raise IsADirectoryError(f"--output={output} is a folder; name a file.")
    if not output.parent.is_dir():
        raise FileNotFoundError(
            f"--output={output}: the folder {output.parent} does not exist; make it first."
        )


def _read_text(file: Path) -> str:
    """Reads the file as it is: line ends are part of the text."""
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"--perplexity={file} {what}; name a text file in UTF-8.")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--perplexity={file} must be UTF-8, but byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert it, for example with iconv."
        ) from error
