"""The formats: what each format can hold, how exactly, and what writes and runs it."""

import dataclasses
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mobilellm_jax.config import near_miss
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime
from mobilellm_jax.export.source import DTYPES, Source

EXTRA = "pip install 'mobilellm-jax[export]'"


@dataclasses.dataclass(frozen=True)
class Precision:
    """A way to store weights, and the differences that verification allows."""

    bits: float  # bits per weight of a matrix, scales included
    logits: float | None  # as a share of max(1, largest logit); None: logits are not compared
    loss: float  # largest rise of the loss on the verification's text, in nats per token
    tokens: bool = False  # whether greedy tokens must be equal


# In float32, only the order of sums differs. The bound is twice the bound of the tests against
# Hugging Face.
EXACT = Precision(32, logits=2e-4, loss=1e-4, tokens=True)
# Rounding changes a weight by at most 2^-11 (float16) or 2^-8 (bfloat16) of its value.
HALF = Precision(16, logits=2e-2, loss=1e-2)
BRAIN = Precision(16, logits=1e-1, loss=3e-2)
_OF_DTYPES = {"float32": EXACT, "bfloat16": BRAIN, "float16": HALF}
# Weights have 8 bits per row, and activations have 8 bits per token at run time. A trained model of
# 0.9M parameters loses 0.002 nats. Single logits change by some percent of the largest logit, so
# logits are not compared.
_DYNAMIC_INT8 = Precision(8, logits=None, loss=2e-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A format. Its writer and runtime are imported late, because few users install their packages.

    `writer` and `runtime` are names relative to this room. The writer returns how many layers it
    stored.
    """

    file: str  # the model's; "" for Hugging Face directories, which have no manifest
    writer: str
    runtime: str
    write_packages: tuple[str, ...] = ()  # packages that the writer imports
    run_packages: tuple[str, ...]  # packages that the runtime imports
    precisions: Mapping[str, Precision]  # keys are values of --dtype or --quantize

    def write(self, source: Source, folder: Path, precision: str) -> int:
        write: Callable[[Source, Path, str], int]
        write = pkgutil.resolve_name(f"{__package__}.{self.writer}")
        return write(source, folder, precision)

    def load(self, folder: Path, info: ArtifactInfo) -> Runtime:
        load: Callable[[Path, ArtifactInfo], Runtime]
        load = pkgutil.resolve_name(f"{__package__}.{self.runtime}")
        return load(folder / self.file, info)

    @property
    def can_run(self) -> bool:
        return not _not_installed(self.run_packages)


FORMATS: dict[str, Format] = {
    "hf": Format(
        file="",
        writer="huggingface.directory:write_llama",
        runtime="huggingface.runtime:HuggingFaceRuntime",
        run_packages=("torch", "transformers"),
        precisions=_OF_DTYPES,
    ),
    "mobilellm": Format(
        file="",
        writer="huggingface.directory:write_mobilellm",
        runtime="huggingface.runtime:HuggingFaceRuntime",
        run_packages=("torch", "transformers"),
        precisions=_OF_DTYPES,
    ),
    "gguf": Format(
        file="model.gguf",
        writer="gguf.writer:write",
        runtime="gguf.runtime:LlamaCppRuntime",
        write_packages=("gguf",),
        run_packages=("llama_cpp", "gguf"),
        precisions={
            **_OF_DTYPES,
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
        file="model.onnx",
        writer="onnx.writer:write",
        runtime="onnx.runtime:OnnxRuntime",
        write_packages=("onnx",),
        run_packages=("onnxruntime",),
        precisions={
            **_OF_DTYPES,
            # A weight is stored as a code and a float32 scale, and activations are quantized too.
            # The bounds are ten times the rise for a trained model of 0.9M parameters: 0.0014 and
            # 0.0144 nats on the text.
            "int8": Precision(8.5, logits=None, loss=0.02),
            "int4": Precision(5, logits=None, loss=0.2),
        },
    ),
    "executorch": Format(
        file="model.pte",
        writer="executorch.writer:write",
        runtime="executorch.runtime:ExecutorchRuntime",
        write_packages=("executorch", "torchao"),
        run_packages=("executorch",),
        precisions={
            "float32": EXACT,
            "8da8w": _DYNAMIC_INT8,
            # Groups of 32 weights share a scale of 16 bits. The bound is ten times the rise for a
            # trained model of 0.9M parameters.
            "8da4w": Precision(4.5, logits=None, loss=0.2),
        },
    ),
    "litert": Format(
        file="model.tflite",
        writer="litert.writer:write",
        runtime="litert.runtime:LitertRuntime",
        write_packages=("litert_torch", "ai_edge_quantizer"),
        run_packages=("ai_edge_litert",),
        precisions={"float32": EXACT, "int8": _DYNAMIC_INT8},
    ),
    "stablehlo": Format(
        file="model.stablehlo",
        writer="stablehlo.writer:write",
        runtime="stablehlo.runtime:StableHloRuntime",
        write_packages=("flatbuffers",),  # jax.export serializes with flatbuffers
        run_packages=("flatbuffers",),
        precisions={"float32": EXACT, "bfloat16": BRAIN},
    ),
}


def offered(name: str, *, quantized: bool) -> list[str]:
    """Returns the precisions of a format that --quantize or --dtype can name."""
    return [p for p in FORMATS[name].precisions if (p not in DTYPES) == quantized]


def check_precision(name: str, dtype: str | None, quantize: str | None) -> str:
    """Returns the precision that --dtype or --quantize names; the default is float32.

    Raises:
      UserError: if both flags are given, or the precision or a package of the writer is missing.
    """
    if dtype is not None and quantize is not None:
        raise UserError(
            f"--dtype={dtype} and --quantize={quantize} both say how weights are stored; give one."
        )
    flag = "dtype" if quantize is None else "quantize"
    asked = quantize or dtype or "float32"
    choices = offered(name, quantized=quantize is not None)
    if asked not in choices:
        others = [each for each in FORMATS if asked in FORMATS[each].precisions]
        remedy = f" --format={' or '.join(others)} has it." if others else near_miss(asked, choices)
        raise UserError(
            f"--{flag}={asked} must be a precision of --format={name}, which has "
            f"{', '.join(choices) or 'none'} for --{flag}.{remedy}"
        )
    if missing := _not_installed(FORMATS[name].write_packages):
        raise UserError(f"--format={name} needs {', '.join(missing)} to write a file; {EXTRA}.")
    return asked


def _not_installed(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]
