"""The rooms of the package and the floors they lie on: imports go downwards only."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobilellm_jax.cli.main import COMMANDS

PACKAGE = "mobilellm_jax"
ROOT = Path(__file__).parent.parent

# A room is a file or a folder directly under the package.
FLOORS = {
    "exit_codes": 0,
    "strict_json": 0,
    "compile_cache": 1,
    "config": 1,
    "early_stop": 1,
    "host_memory": 1,
    "rundir": 1,
    "source_digest": 1,
    "sealing": 2,
    "architectures": 2,
    "cluster": 2,
    "data": 2,
    "peers": 2,
    "plots": 2,
    "run_lock": 2,
    "sharding": 2,
    "xla_flags": 2,
    "distributed": 3,
    "model": 3,
    "sampling": 3,
    "generate": 4,
    "grids": 4,
    "quantize": 4,
    "runtimes": 4,
    "text_stream": 5,
    "train": 5,
    "checkpoint": 6,
    "evaluate": 6,
    "plan": 6,
    "export": 7,
    "announce": 8,
    "open_model": 8,
    "preflight": 8,
    "benchmark": 9,
    "finetune": 9,
    "pretrain": 9,
    "report": 10,
    "sweep": 10,
    "cli": 11,
    "__main__": 12,
}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, source: str) -> Iterator[str]:
    """Every module that `source` imports anywhere, relative imports resolved."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from mobilellm_jax import rundir` imports the module rundir.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(file: Path, source: str) -> list[str]:
    """The imports from a room that is neither the file's own nor on a lower floor."""
    room = room_of(module_name(file))
    return [
        module
        for module in imports(file, source)
        if module.split(".")[0] == PACKAGE
        and room_of(module) not in ("", room)
        and (not room or FLOORS[room_of(module)] >= FLOORS[room])
    ]


def room_of(module: str) -> str:
    """The room of a module of the package; "" for the package's own __init__ and its names."""
    first = module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]
    return "" if first.startswith("__") and first != "__main__" else first


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_file_has_a_floor(file: Path) -> None:
    assert room_of(module_name(file)) in {"", *FLOORS}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_downwards(file: Path) -> None:
    assert wrong_imports(file, file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import mobilellm_jax.train.loop",
        "from mobilellm_jax import checkpoint",
        "from mobilellm_jax.train import loop",
        "from ..train.loop import train_loop",
        "from .. import pretrain",
        "def late():\n    from mobilellm_jax.generate import generate",
        "from mobilellm_jax.data.loader import batches\nimport mobilellm_jax.cli.main",
    ],
)
def test_upward_import_is_found(source: str) -> None:
    assert len(wrong_imports(ROOT / PACKAGE / "model" / "block.py", source)) == 1


def test_same_floor_is_another_room() -> None:
    source = "from mobilellm_jax.plots import plot_losses"
    assert wrong_imports(ROOT / PACKAGE / "sharding.py", source)
    assert not wrong_imports(ROOT / PACKAGE / "plots.py", source)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_the_command_line_knows_absl(file: Path) -> None:
    libraries = {module.split(".")[0] for module in imports(file, file.read_text())}
    assert "absl" not in libraries or room_of(module_name(file)) == "cli"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_the_edge_knows_config_dict(file: Path) -> None:
    libraries = {module.split(".")[0] for module in imports(file, file.read_text())}
    edge = {f"{PACKAGE}.config", f"{PACKAGE}.cli.config_flags"}
    assert "ml_collections" not in libraries or module_name(file) in edge


@pytest.mark.parametrize("file", [f for f in FILES if "train" in f.parts], ids=module_name)
def test_training_is_handed_its_data_and_its_saving(file: Path) -> None:
    rooms = {room_of(m) for m in imports(file, file.read_text()) if m.startswith(PACKAGE)}
    assert rooms.isdisjoint({"data", "checkpoint"})


def needs_an_extra(file: Path) -> bool:
    """Whether it is for PyTorch's users, needs the harness, or is a device format's."""
    libraries = {module.split(".")[0] for module in imports(file, file.read_text())}
    extras = {"torch", "lm_eval", "onnx", "onnxruntime", "ai_edge_litert", "gguf", "llama_cpp"}
    return not libraries.isdisjoint(extras)


def test_importing_starts_no_backend() -> None:
    # A platform that does not exist: whatever starts a backend fails.
    commands = [f"{PACKAGE}.cli.{name}" for name in (*COMMANDS, "import_")]
    modules = [module_name(file) for file in FILES if not needs_an_extra(file)]
    script = "\n".join(
        [
            "from mobilellm_jax.cli.main import COMMANDS, import_command",
            *(f"import {module}" for module in modules if module not in commands),
            "for command in COMMANDS: import_command(command)",
        ]
    )
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_backend_would_have_been_noticed() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "none_such" in result.stderr
