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
    "errors": 0,
    "storage": 1,
    "config": 2,
    "data": 3,
    "processes": 3,
    "sharding": 3,
    "startup": 3,
    "model": 4,
    "generation": 5,
    "paper": 5,
    "quantize": 5,
    "train": 6,
    "checkpoint": 7,
    "export": 7,
    "plan": 7,
    "evaluate": 8,
    "announce": 9,
    "open_model": 9,
    "preflight": 9,
    "benchmark": 10,
    "pretrain": 10,
    "report": 11,
    "sweep": 11,
    "cli": 12,
    "__main__": 13,
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


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Returns, for each module, the modules of `sources` that it imports, in functions too.

    Imports under `if TYPE_CHECKING` do not count, because they never run.
    """
    graph = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = [ast.Pass()]
        file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        found = set()
        for name in imports(file, ast.unparse(tree)):
            parent = name.rpartition(".")[0]
            found.add(name if name in sources else parent)
        graph[module] = found & set(sources) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import one another, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph[module]
        reached[start] = seen
    groups = {
        tuple(sorted(m for m in reached[start] if start in reached[m]))
        for start in graph
        if start in reached[start]
    }
    return [list(group) for group in sorted(groups)]


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = import_graph({module_name(file): file.read_text() for file in FILES})
    assert sum(map(len, graph.values())) > 300  # the graph is not empty
    assert circles(graph) == []


def test_a_circle_inside_a_room_is_found() -> None:
    room = f"{PACKAGE}.data"
    sources = {
        f"{room}.a": f"from {room} import b",
        f"{room}.b": f"from {room}.c import name",
        f"{room}.c": f"import {room}.a",
        f"{room}.d": f"from {room}.a import name",
        f"{room}.e": f"if TYPE_CHECKING:\n    from {room}.f import name",
        f"{room}.f": f"def late():\n    from {room}.e import name",
    }
    assert circles(import_graph(sources)) == [[f"{room}.a", f"{room}.b", f"{room}.c"]]


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
