"""The formats for devices: what each one can hold, how exactly, and which function writes it."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from mobilellm_jax.config import near_miss
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.artifact import EXTRA
from mobilellm_jax.export.source import Precision, Source

DTYPES = ("float32", "bfloat16", "float16")


# float32 is sums in another order; the bound is that of the tests against Hugging Face, times two.
EXACT = Precision(32, logits=2e-4, loss=1e-4, tokens=True)
# A weight is off by at most 2^-11 or 2^-8 of itself.
HALF = Precision(16, logits=2e-2, loss=1e-2)
BRAIN = Precision(16, logits=1e-1, loss=3e-2)
# Weights in 8 bits by rows, activations by tokens while running: a trained model of 0.9M parameters
# loses 0.002 nats. Single logits are off by some percent of the largest, which says little.
DYNAMIC_INT8 = Precision(8, logits=None, loss=2e-2)
HUGGINGFACE_PRECISIONS = {"float32": EXACT, "bfloat16": BRAIN, "float16": HALF}


@dataclasses.dataclass(frozen=True)
class Format:
    """A format for devices."""

    write: Callable[[Source, Path, str], int]
    """Writes the model file into a folder that exists; returns how many layers it stores."""
    file: str  # the model's
    packages: tuple[str, ...]  # that writing takes, besides ours
    shares_blocks: bool  # whether a block that is applied several times is stored once
    precisions: Mapping[str, Precision]  # by --dtype or --quantize


# Each function imports its writer late: a writer imports a library that few users install.
def _write_gguf(source: Source, folder: Path, precision: str) -> int:
    from mobilellm_jax.export.gguf import writer

    return writer.write(source, folder, precision)


def _write_onnx(source: Source, folder: Path, precision: str) -> int:
    from mobilellm_jax.export.onnx import writer

    return writer.write(source, folder, precision)


def _write_executorch(source: Source, folder: Path, precision: str) -> int:
    from mobilellm_jax.export.executorch import writer

    return writer.write(source, folder, precision)


def _write_litert(source: Source, folder: Path, precision: str) -> int:
    from mobilellm_jax.export.litert import writer

    return writer.write(source, folder, precision)


def _write_stablehlo(source: Source, folder: Path, precision: str) -> int:
    from mobilellm_jax.export.stablehlo import writer

    return writer.write(source, folder, precision)


FORMATS: dict[str, Format] = {
    "gguf": Format(
        write=_write_gguf,
        file="model.gguf",
        packages=("gguf",),
        shares_blocks=False,
        precisions={
            "float32": EXACT,
            "bfloat16": BRAIN,
            "float16": HALF,
            # Ten times the rise of a trained model of 0.9M parameters; small ones are hit hardest.
            "q8_0": Precision(8.5, logits=None, loss=0.02),
            "q5_1": Precision(6.0, logits=None, loss=0.2),
            "q5_0": Precision(5.5, logits=None, loss=0.2),
            "q4_1": Precision(5.0, logits=None, loss=0.4),
            "q4_0": Precision(4.5, logits=None, loss=0.4),
        },
    ),
    "onnx": Format(
        write=_write_onnx,
        file="model.onnx",
        packages=("onnx",),
        shares_blocks=True,
        precisions={
            "float32": EXACT,
            "bfloat16": BRAIN,
            "float16": HALF,
            # Codes and float32 scales; activations are quantized too. As for gguf, ten times the
            # rise of a trained model of 0.9M parameters: 0.0014 and 0.0144 on the text.
            "int8": Precision(8.5, logits=None, loss=0.02),
            "int4": Precision(5, logits=None, loss=0.2),
        },
    ),
    "executorch": Format(
        write=_write_executorch,
        file="model.pte",
        packages=("executorch", "torchao"),
        shares_blocks=True,
        precisions={
            "float32": EXACT,
            "8da8w": DYNAMIC_INT8,
            # Groups of 32 with scales of 16 bits; as for gguf, ten times the rise of a trained
            # model of 0.9M parameters.
            "8da4w": Precision(4.5, logits=None, loss=0.2),
        },
    ),
    "litert": Format(
        write=_write_litert,
        file="model.tflite",
        packages=("litert_torch", "ai_edge_quantizer"),
        shares_blocks=True,
        precisions={"float32": EXACT, "int8": DYNAMIC_INT8},
    ),
    "stablehlo": Format(
        write=_write_stablehlo,
        file="model.stablehlo",
        packages=("flatbuffers",),  # what jax.export serializes with
        shares_blocks=True,
        precisions={"float32": EXACT, "bfloat16": BRAIN},
    ),
}


def offered(name: str, *, quantized: bool) -> list[str]:
    """Returns the precisions of a format that --quantize, or else --dtype, can ask for."""
    return [p for p in FORMATS[name].precisions if (p not in DTYPES) == quantized]


def check_precision(name: str, dtype: str | None, quantize: str | None) -> str:
    """Returns the precision that --dtype and --quantize ask for; without either, float32.

    Raises:
      UserError: if the format has no such precision, both are given, or what writes the format is
        not installed.
    """
    if dtype is not None and quantize is not None:
        raise UserError(
            f"--dtype={dtype} and --quantize={quantize} both say how weights are stored; give one."
        )
    flag = "dtype" if quantize is None else "quantize"
    asked = quantize or dtype or "float32"
    choices = offered(name, quantized=quantize is not None)
    if asked not in choices:
        raise UserError(
            f"--{flag}={asked} is none of --format={name}; it has {', '.join(choices) or 'none'}."
            f"{near_miss(asked, choices)}"
        )
    if missing := [p for p in FORMATS[name].packages if importlib.util.find_spec(p) is None]:
        raise UserError(f"--format={name} is written with {', '.join(missing)}; {EXTRA}.")
    return asked
