"""Writes a checkpoint in a format that other programs read, and checks the written files.

  mobilellm export --checkpoint=runs/quickstart --output=exported/hf
  mobilellm export --checkpoint=runs/ls --format=mobilellm --dtype=bfloat16 --output=exported/ls
  mobilellm export --checkpoint=runs/quickstart --format=gguf --quantize=q8_0 --output=exported/q8

--format=hf writes a plain LlamaForCausalLM, which needs no custom code. It holds one copy of a
shared block for each application of the block. --format=mobilellm holds shared blocks once and
loads with trust_remote_code=True. It also takes models that a Llama cannot express: a ReLU or GELU
feed-forward, or a width that is not a multiple of the number of heads. Both formats take
--dtype=float32, bfloat16 or float16.

Formats for devices (pip install 'mobilellm-jax[export]') write a folder with the model file, the
tokenizer, model_card.md and a manifest of checksums:

  gguf        llama.cpp
  onnx        ONNX Runtime
  executorch  ExecuTorch, XNNPACK
  litert      LiteRT
  stablehlo   XLA, on CPU, GPU and TPU

If the runtime of the format is installed, the command runs the export in it before the export gets
its name, and compares it with the checkpoint: the logits of a fixed text, read at once and token by
token, the loss of the text, and 64 greedy tokens. --noverify skips this check.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from absl import flags

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.shared import CHECKPOINT_HELP, new_flags
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

_log = logging.getLogger(__name__)
_HUGGINGFACE = ("hf", "mobilellm")

FLAGS = new_flags()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP, FLAGS, required=True)
_FORMAT = flags.DEFINE_enum("format", "hf", [*_HUGGINGFACE, *FORMATS], "format, see above", FLAGS)
_OUTPUT = flags.DEFINE_string("output", None, "folder to make", FLAGS, required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "type of the stored weights (default without --quantize: float32)", FLAGS
)
_QUANTIZE = flags.DEFINE_string(
    "quantize",
    None,
    "quantization of the weights; "
    + "; ".join(f"{name}: {', '.join(offered(name, quantized=True))}" for name in FORMATS),
    FLAGS,
)
_VERIFY = flags.DEFINE_bool(
    "verify",
    None,
    "run the export and compare it with the checkpoint (default: if the runtime is installed)",
    FLAGS,
)


def main(argv: list[str]) -> None:
    """Exports the checkpoint and prints the sizes."""
    del argv  # the command has no config, so it has no overrides
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
    """Returns the precision that --dtype and --quantize name; refuses what the format lacks."""
    if name in FORMATS:
        return check_precision(name, _DTYPE.value, _QUANTIZE.value)
    if _QUANTIZE.value is not None:
        raise UsageError(
            f"--quantize={_QUANTIZE.value} does not go with --format={name}, which does not "
            f"quantize weights; use --dtype, or --format={', '.join(FORMATS)}."
        )
    return str(_DTYPE.value or "float32")


def _verified(name: str) -> bool:
    """Returns whether to run the export; warns if the runtime is absent and no flag decides."""
    from mobilellm_jax.export.exporting import can_verify

    if _VERIFY.value is False or can_verify(name):
        return _VERIFY.value is not False
    if _VERIFY.value:
        raise UsageError(
            f"--verify runs --format={name} in its runtime, which is not installed; {EXTRA}."
        )
    _log.warning(f"Not verified: the runtime of {name} is not installed ({EXTRA}).")
    return False


def _sharing(config: ModelConfig, layers: int, bits: float) -> str:
    """Describes how shared layers change the size of the export."""
    unshared = dataclasses.replace(config, num_blocks=config.applied_depth, num_repeats=1)
    size = int((parameter_count(unshared) - parameter_count(config)) * bits / 8)
    if layers == config.num_blocks:
        return f"shared blocks stored once: about {size:,} bytes less than one copy per application"
    return (
        f"shared blocks stored once per application, as the format requires: about {size:,} "
        "bytes more than stored once"
    )
