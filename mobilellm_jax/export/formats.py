"""The table of formats, with the writer, the runtime and the precisions of each format."""

import dataclasses
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mobilellm_jax.config import near_miss
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime
from mobilellm_jax.export.source import DTYPES
from mobilellm_jax.model.opened import OpenedModel


@dataclasses.dataclass(frozen=True)
class Precision:
    """A way to store weights, and the largest differences that the verification allows."""

    bits: float  # Bits per weight of a matrix, including the scales.
    logits: float | None  # Largest error / max(1, largest logit); None: not compared.
    loss: float  # Largest increase of the loss on the verification text, in nats per token.
    tokens: bool = False  # Whether all greedy tokens must be equal.


# In float32, only the order of floating-point additions differs. The bound for logits is twice the
# bound in the tests that compare our model with Hugging Face's.
EXACT = Precision(32, logits=2e-4, loss=1e-4, tokens=True)
# The relative rounding error of a weight is at most 2^-11 in float16 and 2^-8 in bfloat16.
HALF = Precision(16, logits=2e-2, loss=1e-2)
BRAIN = Precision(16, logits=1e-1, loss=3e-2)
_OF_DTYPES = {"float32": EXACT, "bfloat16": BRAIN, "float16": HALF}
# Weights are int8 with a scale per row, and activations are int8 with a scale per token. The loss
# of a trained model of 0.9M parameters increases by 0.002 nats. Single logits change by several
# percent of the largest logit, so only the loss is compared.
_DYNAMIC_INT8 = Precision(8, logits=None, loss=2e-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A format; its writer and runtime are imported when used, because their packages are optional.

    `writer` and `runtime` are names relative to `mobilellm_jax.export`, as `gguf.writer:write` is.
    The writer returns the number of layers in the files.
    """

    file: str  # Name of the model file; "" for Hugging Face directories, which have no manifest.
    writer: str
    runtime: str
    write_packages: tuple[str, ...] = ()  # Packages that the writer imports.
    run_packages: tuple[str, ...]  # Packages that the runtime imports.
    precisions: Mapping[str, Precision]  # The keys are values of --dtype or --quantize.
    extra: str = "export"  # The extra of `setup.py` that installs the packages.

    def write(self, source: OpenedModel, folder: Path, precision: str) -> int:
        write: Callable[[OpenedModel, Path, str], int]
        write = pkgutil.resolve_name(f"{__package__}.{self.writer}")
        return write(source, folder, precision)

    def load(self, folder: Path, info: ArtifactInfo) -> Runtime:
        load: Callable[[Path, ArtifactInfo], Runtime]
        load = pkgutil.resolve_name(f"{__package__}.{self.runtime}")
        return load(folder / self.file, info)

    @property
    def install(self) -> str:
        """The command that installs the packages."""
        return f"pip install 'mobilellm-jax[{self.extra}]'"

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
        extra="hf",
    ),
    "mobilellm": Format(
        file="",
        writer="huggingface.directory:write_mobilellm",
        runtime="huggingface.runtime:HuggingFaceRuntime",
        run_packages=("torch", "transformers"),
        precisions=_OF_DTYPES,
        extra="hf",
    ),
    "gguf": Format(
        file="model.gguf",
        writer="gguf.writer:write",
        runtime="gguf.runtime:LlamaCppRuntime",
        write_packages=("gguf",),
        run_packages=("llama_cpp", "gguf"),
        precisions={
            **_OF_DTYPES,
            # Each bound is about ten times the increase of the loss for a trained model of 0.9M
            # parameters. Quantization increases the loss of small models most.
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
            # Blocks of weights share a float32 scale, and activations are quantized too. Each bound
            # is at least ten times the increase of the loss for a trained model of 0.9M parameters,
            # which is 0.0014 nats for int8 and 0.0144 nats for int4.
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
            # Groups of 32 weights share a scale of 16 bits. The bound is about ten times the
            # increase of the loss for a trained model of 0.9M parameters.
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
        write_packages=("flatbuffers",),  # `jax.export` serializes with flatbuffers.
        run_packages=("flatbuffers",),
        precisions={"float32": EXACT, "bfloat16": BRAIN},
    ),
}


def offered(name: str, *, quantized: bool) -> list[str]:
    """Returns the values that --quantize (if `quantized`) or --dtype accepts for a format."""
    return [p for p in FORMATS[name].precisions if (p not in DTYPES) == quantized]


def check_precision(name: str, dtype: str | None, quantize: str | None) -> str:
    """Returns the precision that --dtype or --quantize names, by default float32.

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
    form = FORMATS[name]
    if missing := _not_installed(form.write_packages):
        raise UserError(
            f"--format={name} needs {', '.join(missing)} to write a file; {form.install}."
        )
    return asked


def _not_installed(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]
