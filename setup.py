"""Metadata and requirements of mobilellm-jax; `constraints/` pins exact versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

RUNTIME = [
    "jax>=0.10",  # arrays, compilation, gradients, meshes
    "flax>=0.12",  # the model: linen modules and the scan over blocks
    "optax>=0.2.8",  # AdamW, schedules, clipping
    "orbax-checkpoint>=0.12",  # asynchronous checkpoints of sharded trees
    "tensorflow-datasets>=4.9.10",  # the python_docs builder and tfds: sources
    "importlib_resources>=7",  # tensorflow-datasets imports it without requiring it
    "grain>=0.2.18",  # data loading that can start at any sample
    "ml_collections>=1.1",  # the editable form of the configuration
    "absl-py>=2.3",  # command-line flags
    "numpy>=2.1",  # host-side arrays and token shards
    "sentencepiece>=0.2.2",  # *.model tokenizers; 0.2.2 is the first that encodes to arrays
    "protobuf>=6",  # sentencepiece imports it without requiring it
    "tokenizers>=0.22",  # tokenizer.json, read and written
    "safetensors>=0.8",  # weights of Hugging Face directories, bfloat16 included
    "tqdm>=4.67",  # the progress bar
    "jaxtyping>=0.3.3",  # array annotations, executed in tests
]

# launch/test.sh installs PyTorch first and by exactly this spelling. pip then finds the CPU build,
# and no later requirement brings CUDA libraries along.
TORCH = "torch==2.13.0"
HF = [
    TORCH,
    "transformers>=5.0",  # runs Hugging Face directories
]
EVAL = "lm-eval>=0.4.13"  # lm-evaluation-harness: prompts, examples and metrics of tasks

GGUF = "gguf>=0.19"  # reads and writes GGUF

DATA = [
    "pyarrow>=20",  # parquet: sources
    "fsspec>=2025.3",  # sources behind a URL: s3://, gs://, ...
    "zstandard>=0.23",  # *.zst files
]
REPORT = [
    "matplotlib>=3.10",  # pictures
    "scipy>=1.13",  # confidence intervals
    "jinja2>=3.1",  # the page
]
TENSORBOARD = "tensorboard>=2.20"

EXTRAS = {
    "gpu": ["jax[cuda13]>=0.10"],  # CUDA 13 libraries, from pip
    "tpu": ["jax[tpu]>=0.10"],  # libtpu
    "tokamax": ["tokamax>=0.0.12,!=0.1.0"],  # Hopper attention that keeps documents apart
    "data": DATA,  # parquet: sources, sources behind a URL, *.zst files
    "report": REPORT,  # mobilellm report, and loss.png of a run
    "tensorboard": [TENSORBOARD],  # event files of a run
    "beam": ["apache-beam>=2.70"],  # prepare --runner=beam; in an environment of its own
    "eval": [EVAL],  # evaluate --tasks
    "gguf": [GGUF],  # import --source=FILE.gguf
    "hf": HF,  # export --format=hf: the check of the exported directory
    "export": [  # formats for devices: writers and runtimes
        *HF,  # ExecuTorch and LiteRT files are lowered from a PyTorch module
        GGUF,
        "llama-cpp-python>=0.3.36",  # runs GGUF; pip builds it
        "onnx>=1.23",  # writes ONNX
        "onnxruntime>=1.32",  # runs ONNX
        "flatbuffers>=25",  # jax.export (StableHLO) imports it without requiring it
        "executorch>=1.5.1",  # writes and runs ExecuTorch's .pte
        "torchao>=0.18",  # quantizes for ExecuTorch
        "litert-torch>=0.10",  # writes LiteRT's .tflite
        "ai-edge-quantizer>=0.10",  # quantizes .tflite
        "ai-edge-litert>=2.3",  # runs .tflite
    ],
    "test": [
        *DATA,
        *REPORT,
        TENSORBOARD,
        EVAL,
        *HF,  # the independent implementation, and Hugging Face Llama
        "accelerate>=1.10",  # transformers loads weights with it
        "pytest>=9.0",
        "hypothesis>=6.150",  # hostile files for every parser, tests/fuzz
        "pytest-xdist>=3.8",  # runs the suite on both cores
        "pytest-random-order>=1.2",  # --random-order: no test depends on another one
        "beartype>=0.22",  # executes the array annotations
    ],
    "dev": [
        "ruff>=0.14",  # format and lint
        "mypy>=1.18",  # strict types
        "pre-commit>=4.3",  # runs ruff and mypy before a commit
        "types-tqdm>=4.67",
    ],
}

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mobilellm_jax/__init__.py").read_text())

setup(
    name="mobilellm-jax",
    version=VERSION[1],
    description="Train sub-billion-parameter language models (MobileLLM, arXiv:2402.14905) in JAX.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The wheel contains the recipes of configs/, so `--config=NAME` works without a checkout.
    packages=[
        *find_packages(include=["mobilellm_jax", "mobilellm_jax.*"]),
        *("mobilellm_jax.configs", "mobilellm_jax.configs.quantize"),
    ],
    package_dir={"mobilellm_jax.configs": "configs"},
    package_data={"mobilellm_jax": ["py.typed"]},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mobilellm = mobilellm_jax.cli.main:run"]},
)
