"""The formats for devices: what each format can hold, how exactly, and which function writes it."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from mobilellm_jax.config import near_miss
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.artifact import EXTRA
from mobilellm_jax.export.source import Precision, Source

DTYPES = ("float32", "bfloat16", "float16")


# In float32, only the order of sums differs. The bound is twice the bound of the tests against
# Hugging Face.
EXACT = Precision(32, logits=2e-4, loss=1e-4, tokens=True)
# Rounding changes a weight by at most 2^-11 (float16) or 2^-8 (bfloat16) of its value.
HALF = Precision(16, logits=2e-2, loss=1e-2)
BRAIN = Precision(16, logits=1e-1, loss=3e-2)
# Weights have 8 bits per row, and activations have 8 bits per token at run time. A trained model of
# 0.9M parameters loses 0.002 nats. Single logits change by some percent of the largest logit, so
# logits are not compared.
DYNAMIC_INT8 = Precision(8, logits=None, loss=2e-2)
HUGGINGFACE_PRECISIONS = {"float32": EXACT, "bfloat16": BRAIN, "float16": HALF}


@dataclasses.dataclass(frozen=True)
class Format:
    """A format for devices."""

    write: Callable[[Source, Path, str], int]
    """Writes the model file into a folder that exists; returns how many layers it stores."""
    file: str  # the model's
    packages: tuple[str, ...]  # packages that the writer imports
    shares_blocks: bool  # whether the file contains a shared block once
    precisions: Mapping[str, Precision]  # keys are values of --dtype or --quantize


# Each function imports its writer late, because a writer imports a library that few users install.
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
            # The bounds are ten times the rise for a trained model of 0.9M parameters. Quantization
            # hurts small models most.
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
            # A weight is stored as a code and a float32 scale, and activations are quantized too.
            # The bounds are ten times the rise for a trained model of 0.9M parameters: 0.0014 and
            # 0.0144 nats on the text.
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
            # Groups of 32 weights share a scale of 16 bits. The bound is ten times the rise for a
            # trained model of 0.9M parameters.
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
        packages=("flatbuffers",),  # jax.export serializes with flatbuffers
        shares_blocks=True,
        precisions={"float32": EXACT, "bfloat16": BRAIN},
    ),
}


def offered(name: str, *, quantized: bool) -> list[str]:
    """Returns the precisions of a format that --quantize or --dtype can name."""
    return [p for p in FORMATS[name].precisions if (p not in DTYPES) == quantized]


def check_precision(name: str, dtype: str | None, quantize: str | None) -> str:
    """Returns the precision that --dtype or --quantize names; the default is float32.

    Raises:
      UserError: if the format lacks this precision, if both flags are given, or if a package of the
        writer is not installed.
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
