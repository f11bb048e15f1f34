"""Turns a Hugging Face directory into a run folder, which train.init_from accepts.

  mobilellm import --source=downloads/MobileLLM-125M --output=runs/mobilellm_125m
  mobilellm import --source=exported/ls --output=runs/ls

The directory contains config.json, the weights (safetensors or pytorch_model.bin), and
tokenizer.model or tokenizer.json. The model is a LlamaForCausalLM, a MobileLLM in the layout of the
paper's code, or the output of `mobilellm export`. The command refuses other models and names the
reason. It runs no code from the directory: it does not read modelling files, and it reads
pytorch_model.bin without unpickling.
"""

import dataclasses
from pathlib import Path

from mobilellm_jax.cli.flags import flag


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    source: Path = flag(None, "Hugging Face directory", required=True)
    output: Path = flag(None, "run folder to make", required=True)


def main(flags: Flags) -> None:
    """Imports the model and prints its size."""
    from mobilellm_jax.checkpoint import save_model
    from mobilellm_jax.config import Config, DataConfig
    from mobilellm_jax.export.huggingface.directory import read_huggingface
    from mobilellm_jax.model.size import parameter_count
    from mobilellm_jax.startup.messages import counted
    from mobilellm_jax.storage.outputs import whole_directory

    source, output = flags.source, flags.output
    with whole_directory("--output", output) as folder:
        imported = read_huggingface(source)
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
