"""A file of the package imports only from rooms on lower floors."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobilellm_jax.cli.main import COMMANDS
from tools.house import (
    LONG_LINES,
    PACKAGE,
    ROOT,
    circles,
    files_of,
    import_graph,
    long_functions,
    module_name,
    room_graph,
    room_of,
)
from tools.house import imports as imports_of

# A room is a file or a folder at the root of the package.
FLOORS = {
    "errors": 0,
    "storage": 1,
    "config": 2,
    "processes": 3,
    "sharding": 3,
    "startup": 3,
    "data": 4,
    "model": 5,
    "generation": 6,
    "paper": 6,
    "quantize": 6,
    "train": 7,
    "checkpoint": 8,
    "export": 8,
    "plan": 8,
    "evaluate": 9,
    "announce": 10,
    "open_model": 10,
    "run_record": 10,
    "preflight": 11,
    "benchmark": 12,
    "pretrain": 12,
    "report": 13,
    "sweep": 13,
    "cli": 14,
    "__main__": 15,
}
FILES = files_of(ROOT)


def imports(file: Path, source: str) -> Iterator[str]:
    """Yields every name that `source`, the text of `file`, imports."""
    package = ".".join(file.relative_to(ROOT).parts[:-1])
    return imports_of(package, source)


def wrong_imports(file: Path, source: str) -> list[str]:
    """Returns the imports from rooms other than the file's own and those on lower floors."""
    room = room_of(module_name(file))
    return [
        module
        for module in imports(file, source)
        if module.split(".")[0] == PACKAGE
        and room_of(module) not in ("", room)
        and (not room or FLOORS[room_of(module)] >= FLOORS[room])
    ]


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
        "def late():\n    from mobilellm_jax.generation.generate import generate",
        "from mobilellm_jax.data.loader import batches\nimport mobilellm_jax.cli.main",
    ],
)
def test_upward_import_is_found(source: str) -> None:
    assert len(wrong_imports(ROOT / PACKAGE / "model" / "block.py", source)) == 1


def test_same_floor_is_another_room() -> None:
    source = "from mobilellm_jax.startup import xla_flags"
    assert wrong_imports(ROOT / PACKAGE / "sharding.py", source)
    assert not wrong_imports(ROOT / PACKAGE / "startup" / "host_memory.py", source)


def test_no_files_import_each_other_in_a_circle() -> None:
    sources = {module_name(file): file.read_text() for file in FILES}
    packages = {module_name(file) for file in FILES if file.name == "__init__.py"}
    graph = import_graph(sources, packages)
    assert sum(map(len, graph.values())) > 300  # the graph is not empty
    assert circles(graph) == []
    assert circles(room_graph(graph)) == []


def test_a_circle_inside_a_room_is_found() -> None:
    room = f"{PACKAGE}.data"
    sources = {
        f"{room}.a": f"from {room} import b",
        f"{room}.b": f"from {room}.c import name",
        f"{room}.c": f"def late():\n    import {room}.a",
        f"{room}.d": f"from {room}.a import name",
        f"{room}.e": f"if TYPE_CHECKING:\n    from {room}.f import name",
        f"{room}.f": "from .e import name",
    }
    assert circles(import_graph(sources, set())) == [[f"{room}.a", f"{room}.b", f"{room}.c"]]


def test_a_long_function_is_found() -> None:
    source = "def short():\n    pass\n\ndef long():\n" + "    pass\n" * LONG_LINES
    assert long_functions({"m": source}) == [f"m.long ({LONG_LINES + 1} lines)"]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_the_command_line_knows_absl(file: Path) -> None:
    libraries = {module.split(".")[0] for module in imports(file, file.read_text())}
    assert "absl" not in libraries or room_of(module_name(file)) == "cli"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_the_edge_knows_config_dict(file: Path) -> None:
    libraries = {module.split(".")[0] for module in imports(file, file.read_text())}
    edge = {f"{PACKAGE}.{name}" for name in ("config", "config.recipe", "cli.config_files")}
    assert "ml_collections" not in libraries or module_name(file) in edge


@pytest.mark.parametrize("file", [f for f in FILES if "train" in f.parts], ids=module_name)
def test_training_is_handed_its_data_and_its_saving(file: Path) -> None:
    rooms = {room_of(m) for m in imports(file, file.read_text()) if m.startswith(PACKAGE)}
    assert rooms.isdisjoint({"data", "checkpoint"})


def needs_an_extra(file: Path) -> bool:
    """Tells whether a file is for PyTorch's users, needs the harness, or is a device format's."""
    libraries = {module.split(".")[0] for module in imports(file, file.read_text())}
    extras = {"torch", "lm_eval", "onnx", "onnxruntime", "ai_edge_litert", "gguf", "llama_cpp"}
    return not libraries.isdisjoint(extras)


def test_importing_starts_no_backend() -> None:
    # The platform does not exist, so code that starts a backend fails.
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
