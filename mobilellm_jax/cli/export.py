"""Writes a checkpoint in a format that other programs read, and checks the written files.

  mobilellm export --checkpoint=runs/quickstart --output=exported/hf
  mobilellm export --checkpoint=runs/ls --format=mobilellm --dtype=bfloat16 --output=exported/ls
  mobilellm export --checkpoint=runs/quickstart --format=gguf --quantize=q8_0 --output=exported/q8

--format=hf writes a plain LlamaForCausalLM, which needs no custom code. This format stores a shared
block several times, once per application of the block. --format=mobilellm stores a shared block
only once, and transformers loads it with trust_remote_code=True. It can also store models that a
Llama cannot express: models with a ReLU or GELU feed-forward, or with a width that is not a
multiple of the number of heads. Both formats accept --dtype=float32, bfloat16 or float16.

The check of these two formats needs PyTorch and transformers (pip install 'mobilellm-jax[hf]').

Formats for devices (pip install 'mobilellm-jax[export]') write a folder with the model file, the
tokenizer, model_card.md and a manifest of checksums:

  gguf        Runs in llama.cpp.
  onnx        Runs in ONNX Runtime.
  executorch  Runs in ExecuTorch with XNNPACK.
  litert      Runs in LiteRT.
  stablehlo   Runs in XLA on CPU, GPU and TPU.

If the runtime of the format is installed, the command runs the export in this runtime and compares
it with the checkpoint. It compares the logits of a fixed text, read in one pass and token by token,
the loss of the text, and 64 greedy tokens. The folder --output appears only after this check.
--noverify skips the check.
"""

import dataclasses
import logging
from pathlib import Path

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.flags import flag
from mobilellm_jax.cli.shared import CHECKPOINT_HELP
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.formats import FORMATS, check_precision, offered
from mobilellm_jax.export.source import DTYPES
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.storage.outputs import new_folder

_log = logging.getLogger(__name__)
_QUANTIZATIONS = {name: ", ".join(offered(name, quantized=True)) for name in FORMATS}


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    checkpoint: Path = flag(None, CHECKPOINT_HELP, required=True)
    format: str = flag("hf", "format, see above", enum_values=list(FORMATS))
    output: Path = flag(None, "folder to make", required=True)
    dtype: str | None = flag(
        None,
        "type of the stored weights (default without --quantize: float32)",
        enum_values=list(DTYPES),
    )
    quantize: str | None = flag(
        None,
        "quantization of the weights; "
        + "; ".join(f"{name}: {choices}" for name, choices in _QUANTIZATIONS.items() if choices),
    )
    verify: bool | None = flag(
        None,
        "run the export and compare it with the checkpoint (default: if the runtime is installed)",
    )


def main(flags: Flags) -> None:
    """Exports the checkpoint and prints the sizes."""
    name = flags.format
    precision = check_precision(name, flags.dtype, flags.quantize)
    verified = _verified(flags)

    from mobilellm_jax.export.exporting import export
    from mobilellm_jax.open_model import open_model

    output = flags.output
    new_folder("--output", output)
    model = open_model(flags.checkpoint)
    exported = export(model, output, format_name=name, precision=precision, verified=verified)
    config = model.config
    print(
        f"{output}: {model.origin}",
        f"{parameter_count(config):,} parameters, {exported.layers} layers stored, "
        f"{config.applied_depth} applied",
        f"{exported.model_bytes:,} bytes of weights in {precision}",
        sep="\n  ",
    )
    if config.num_repeats > 1:
        bits = FORMATS[name].precisions[precision].bits
        print(f"  {_sharing(config, exported.layers, bits)}")
    if exported.verification is not None:
        print("  " + "\n  ".join(exported.verification.lines()))


def _verified(flags: Flags) -> bool:
    """Returns whether to check the export; without a flag, warns if the runtime is absent."""
    form = FORMATS[flags.format]
    if flags.verify is False or form.can_run:
        return flags.verify is not False
    packages = " and ".join(form.run_packages)
    if flags.verify:
        raise UsageError(
            f"--verify runs --format={flags.format} in {packages}, which is not installed; "
            f"{form.install}."
        )
    _log.info(
        f"The export will be complete, but it will not be run and compared with the checkpoint. "
        f"The comparison needs {packages} ({form.install})."
    )
    return False


def _sharing(config: ModelConfig, layers: int, bits: float) -> str:
    unshared = dataclasses.replace(config, num_blocks=config.applied_depth, num_repeats=1)
    size = int((parameter_count(unshared) - parameter_count(config)) * bits / 8)
    if layers == config.num_blocks:
        return f"shared blocks stored once: about {size:,} bytes less than one copy per application"
    return (
        f"shared blocks stored once per application, as the format requires: about {size:,} "
        "bytes more than stored once"
    )
