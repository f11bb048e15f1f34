"""Writes a checkpoint in a format that others read, and checks what was written.

  mobilellm export --checkpoint=runs/quickstart --output=exported/hf
  mobilellm export --checkpoint=runs/ls --format=mobilellm --dtype=bfloat16 --output=exported/ls
  mobilellm export --checkpoint=runs/quickstart --format=gguf --quantize=q8_0 --output=exported/q8

--format=hf is a plain LlamaForCausalLM, which needs no custom code; shared blocks are written once
per application. --format=mobilellm holds them once and loads with trust_remote_code=True; it also
takes what a Llama cannot express: a ReLU or GELU feed-forward, and a width that is no multiple of
the number of heads. Both come with --dtype=float32, bfloat16 or float16.

For devices (pip install 'mobilellm-jax[export]'), a folder with the model file, the tokenizer,
model_card.md and a manifest of checksums:

  gguf        llama.cpp
  onnx        ONNX Runtime
  executorch  ExecuTorch, XNNPACK
  litert      LiteRT
  stablehlo   XLA, on CPU, GPU and TPU

Where the format's runtime is installed, the export is run in it and compared with the checkpoint
before it gets its name (--noverify leaves that out): the logits of a fixed text read at once and
token by token, the text's loss, and 64 greedy tokens.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.artifact import EXTRA
from mobilellm_jax.export.formats import (
    DTYPES,
    FORMATS,
    HUGGINGFACE_PRECISIONS,
    check_precision,
    offered,
)
from mobilellm_jax.export.source import Source
from mobilellm_jax.model.size import parameter_count

_HUGGINGFACE = ("hf", "mobilellm")

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "run folder (its latest step), step folder or Hugging Face directory",
    required=True,
)
_FORMAT = flags.DEFINE_enum("format", "hf", [*_HUGGINGFACE, *FORMATS], "format, see above")
_OUTPUT = flags.DEFINE_string("output", None, "folder to make", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "of the stored weights; without it and --quantize, float32"
)
_QUANTIZE = flags.DEFINE_string(
    "quantize",
    None,
    "how weights are quantized; "
    + "; ".join(f"{name}: {', '.join(offered(name, quantized=True))}" for name in FORMATS),
)
_VERIFY = flags.DEFINE_bool(
    "verify", None, "run the export and compare; without the flag, if its runtime is installed"
)


def main(argv: list[str]) -> None:
    """Exports."""
    del argv  # no config, no overrides
    name: Any = _FORMAT.value
    precision: Any = _precision(name)
    verified = _verified(name)

    from mobilellm_jax.export.exporting import export_for_device, export_huggingface
    from mobilellm_jax.export.huggingface.model_card import Training
    from mobilellm_jax.open_model import open_model

    model = open_model(_CHECKPOINT.value)
    source = Source(model.config, model.params, model.tokenizer, model.origin)
    training = None
    if model.run_config is not None and model.step is not None:
        training = Training(model.run_config, model.step)
    output = Path(_OUTPUT.value)
    common: Any = {"training": training, "verified": verified}
    if name in _HUGGINGFACE:
        exported = export_huggingface(source, output, layout=name, dtype=precision, **common)
    else:
        exported = export_for_device(
            source, output, format_name=name, precision=precision, **common
        )
    config = model.config
    print(
        f"{output}: {model.origin}",
        f"{parameter_count(config):,} parameters, {exported.layers} layers stored, "
        f"{config.applied_depth} applied",
        f"{exported.model_bytes:,} bytes of weights in {precision}",
        sep="\n  ",
    )
    if config.num_repeats > 1:
        form = FORMATS.get(name)
        bits = (form.precisions if form else HUGGINGFACE_PRECISIONS)[precision].bits
        print(f"  {_sharing(config, exported.layers, bits)}")
    if exported.verification is not None:
        print("  " + "\n  ".join(exported.verification.lines()))


def _precision(name: str) -> str:
    """Returns what --dtype and --quantize ask for, refusing what the format does not have."""
    if name in FORMATS:
        return check_precision(name, _DTYPE.value, _QUANTIZE.value)
    if _QUANTIZE.value is not None:
        raise UsageError(
            f"--quantize={_QUANTIZE.value} is none of --format={name}, which stores weights as "
            f"they are; use --dtype, or --format={', '.join(FORMATS)}."
        )
    return str(_DTYPE.value or "float32")


def _verified(name: str) -> bool:
    """Returns whether to run the export; says so where it cannot be although nobody declined."""
    from mobilellm_jax.export.exporting import can_verify

    if _VERIFY.value is False or can_verify(name):
        return _VERIFY.value is not False
    if _VERIFY.value:
        raise UsageError(
            f"--verify runs --format={name} in its runtime, which is not installed; {EXTRA}."
        )
    print(f"Not verified: the runtime of {name} is not installed ({EXTRA}).", file=sys.stderr)
    return False


def _sharing(config: ModelConfig, layers: int, bits: float) -> str:
    """Says what sharing layers did to the size."""
    unshared = dataclasses.replace(config, num_blocks=config.applied_depth, num_repeats=1)
    size = int((parameter_count(unshared) - parameter_count(config)) * bits / 8)
    if layers == config.num_blocks:
        return f"shared blocks once: about {size:,} bytes less than written per application"
    return (
        f"shared blocks once per application, since the format has no other way: about {size:,} "
        "bytes more than stored once"
    )
