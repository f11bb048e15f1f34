"""Writes a checkpoint as a directory that Hugging Face transformers and its readers load.

  mobilellm export --checkpoint=runs/quickstart --output=exported/hf
  mobilellm export --checkpoint=runs/ls --format=mobilellm --dtype=bfloat16 --output=exported/ls

--format=hf is a plain LlamaForCausalLM, which needs no custom code; shared blocks are written once
per application. --format=mobilellm holds them once and loads with trust_remote_code=True; it also
takes what a Llama cannot express: a ReLU or GELU feed-forward, and a width that is no multiple of
the number of heads.
"""

import dataclasses
from pathlib import Path

from absl import flags

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run folder (its latest step), step folder or Hugging Face directory",
    required=True,
)
_FORMAT = flags.DEFINE_enum("format", "hf", ["hf", "mobilellm"], "layout, see above")
_OUTPUT = flags.DEFINE_string("output", None, "folder to make", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "of the stored weights"
)


def main(argv: list[str]) -> None:
    """Exports."""
    del argv  # no config, no overrides
    from mobilellm_jax.export.huggingface import write_huggingface
    from mobilellm_jax.model.size import parameter_count
    from mobilellm_jax.open_model import open_model

    model = open_model(_CHECKPOINT.value)
    exported = write_huggingface(
        *(model.config, model.params, model.tokenizer, Path(_OUTPUT.value)),
        layout=_FORMAT.value,  # type: ignore[arg-type]  # of the enumeration
        dtype=_DTYPE.value,  # type: ignore[arg-type]  # of the enumeration
    )
    config = model.config
    unique = parameter_count(config)
    print(
        f"{_OUTPUT.value}: step {model.step} of {model.origin}"
        if model.step is not None
        else f"{_OUTPUT.value}: {model.origin}",
        f"{unique:,} parameters, {exported.layers} layers stored, {config.applied_depth} applied",
        f"{exported.tensor_bytes:,} bytes of weights in {_DTYPE.value}",
        sep="\n  ",
    )
    if config.num_repeats > 1:
        unshared = dataclasses.replace(config, num_blocks=config.applied_depth, num_repeats=1)
        bytes_each = exported.tensor_bytes // exported.parameters
        difference = (parameter_count(unshared) - unique) * bytes_each
        print(
            f"  shared blocks once per application: {difference:,} bytes more than "
            "--format=mobilellm takes"
            if _FORMAT.value == "hf"
            else f"  shared blocks once: {difference:,} bytes less than --format=hf takes"
        )
