"""Turns a Hugging Face directory or a GGUF file into a run folder, which train.init_from accepts.

  mobilellm import --source=downloads/MobileLLM-125M --output=runs/mobilellm_125m
  mobilellm import --source=exported/ls --output=runs/ls
  mobilellm import --source=downloads/SmolLM2-135M-Instruct.Q4_1.gguf --output=runs/smollm2

The directory contains config.json, the weights (safetensors or pytorch_model.bin), and
tokenizer.model or tokenizer.json. The model is a LlamaForCausalLM, a MistralForCausalLM whose
window covers its context, a MobileLLM in the layout of the paper's code, or the output of
`mobilellm export`. The command refuses other models and names the reason. It runs no code from the
directory: it does not read modelling files, and it reads pytorch_model.bin without unpickling.

A GGUF file (pip install 'mobilellm-jax[gguf]') has llama.cpp's architecture `llama`. Quantized
weights become the float32 numbers with which llama.cpp computes. The run gets the file's tokenizer
and chat template.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm_jax.cli.flags import flag
from mobilellm_jax.errors import require

if TYPE_CHECKING:
    from mobilellm_jax.export.huggingface.directory import Imported


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    source: Path = flag(None, "Hugging Face directory or GGUF file", required=True)
    output: Path = flag(None, "run folder to make", required=True)


def main(flags: Flags) -> None:
    """Imports the model and prints its size."""
    from mobilellm_jax.checkpoint import save_model
    from mobilellm_jax.config import Config, DataConfig
    from mobilellm_jax.model.size import parameter_count
    from mobilellm_jax.startup.messages import counted
    from mobilellm_jax.storage.outputs import whole_directory

    source, output = flags.source, flags.output
    with whole_directory("--output", output) as folder, tempfile.TemporaryDirectory() as files:
        imported = _read(source, Path(files))
        model = imported.config
        seq_len = min(DataConfig().seq_len, model.max_seq_len)
        config = Config(model=model, data=DataConfig(seq_len=seq_len))
        save_model(folder, config, imported.params, imported.tokenizer)
    repeats = ""
    if model.num_repeats > 1:
        repeats = f", each applied {model.num_repeats} times ({model.sharing})"
    print(
        f"{output}: step 0",
        f"{parameter_count(model):,} parameters, {counted(model.num_blocks, 'block')}{repeats}",
        f"the weights were {imported.dtype}: export --dtype={imported.dtype} gives the same bits",
        sep="\n  ",
    )


def _read(source: Path, files: Path) -> "Imported":
    """Reads a model; a GGUF file's tokenizer is written into the folder `files`."""
    if source.is_file() or source.suffix == ".gguf":
        require("gguf", "gguf", f"--source={source}")
        from mobilellm_jax.export.gguf.reader import read_gguf

        return read_gguf(source, files)
    from mobilellm_jax.export.huggingface.directory import read_huggingface

    return read_huggingface(source)
