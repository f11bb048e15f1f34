"""Measures the package: entries at its root, lines, import circles, long functions, suite time.

    python tools/house.py                      # the files as they are now
    python tools/house.py --revision=86b40cc   # another commit
    python tools/house.py --suite              # also runs `bash launch/test.sh` and times it

`tests/test_imports.py` uses the same functions, so that the script and the test agree.
"""

import argparse
import ast
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "mobilellm_jax"
ROOT = Path(__file__).parent.parent
LONG_LINES = 60  # a function of more lines does not fit on a screen


def files_of(root: Path) -> list[Path]:
    """Returns the Python files of the package in the checkout `root`."""
    return sorted((root / PACKAGE).rglob("*.py"))


def module_name(file: Path, root: Path = ROOT) -> str:
    """Returns the dotted name under which Python imports `file`."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Returns the entry at the package root that holds `module`, or "" for the package itself."""
    first = module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]
    return "" if first.startswith("__") and first != "__main__" else first


def imports(package: str, source: str) -> Iterator[str]:
    """Yields every name that `source` imports, as a full dotted name.

    Imports inside functions count, and imports under `if TYPE_CHECKING` do not, because they never
    run. `from a import b` yields "a.b", which may be a module or a name in the module a.

    Args:
      package: the package of the file, which relative imports start from.
      source: the text of the file.
    """
    tree = ast.parse(source)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    above = package.split(".")
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = above[: len(above) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def import_graph(sources: dict[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Returns the modules of `sources` that each module imports.

    Args:
      sources: text of each file, by the name of its module.
      packages: the modules that are `__init__` files.
    """
    graph = {}
    for module, source in sources.items():
        package = module if module in packages else module.rpartition(".")[0]
        names = imports(package, source)
        found = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = (found & set(sources)) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of nodes that reach one another."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        reached[start] = seen
    groups = {
        tuple(sorted(node for node in reached[start] if start in reached.get(node, ())))
        for start in graph
        if start in reached[start]
    }
    return [list(group) for group in sorted(groups)]


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns the rooms that each room imports from."""
    rooms: dict[str, set[str]] = {}
    for module, imported in graph.items():
        others = {room_of(name) for name in imported} - {room_of(module), ""}
        rooms.setdefault(room_of(module), set()).update(others)
    return rooms


def long_functions(sources: dict[str, str]) -> list[str]:
    """Returns the functions of more than `LONG_LINES` lines, the decorators not counted."""
    return [
        f"{module}.{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONG_LINES
    ]


def measure(root: Path) -> list[str]:
    """Returns the figures of the checkout `root`, a line each."""
    files = files_of(root)
    sources = {module_name(file, root): file.read_text(encoding="utf-8") for file in files}
    packages = {module_name(file, root) for file in files if file.name == "__init__.py"}
    graph = import_graph(sources, packages)
    entries = {room_of(module) for module in sources} - {""}
    tests = sorted((root / "tests").rglob("*.py"))
    of_files, of_rooms = circles(graph), circles(room_graph(graph))
    long = long_functions(sources)
    return [
        f"entries at the root      {len(entries)}",
        f"lines of the package     {sum(len(text.splitlines()) for text in sources.values()):,}",
        f"lines of the tests       {sum(len(f.read_text().splitlines()) for f in tests):,}",
        f"import circles of files  {len(of_files)}",
        f"import circles of rooms  {len(of_rooms)}",
        f"functions past {LONG_LINES} lines  {len(long)}",
        *(f"  {' '.join(circle)}" for circle in [*of_files, *of_rooms]),
        *(f"  {function}" for function in long),
    ]


def _checkout(revision: str, folder: Path) -> None:
    archive = folder / "archive.tar"
    command = ["git", "-C", str(ROOT), "archive", "-o", str(archive), revision]
    subprocess.run(command, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def main() -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--revision", help="commit to measure instead of the files as they are")
    parser.add_argument("--suite", action="store_true", help="also time bash launch/test.sh")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = ROOT
        if options.revision:
            root = Path(folder)
            _checkout(options.revision, root)
        print("\n".join(measure(root)), flush=True)
        if options.suite:
            start = time.monotonic()
            code = subprocess.run(["bash", "launch/test.sh"], cwd=root).returncode
            print(f"launch/test.sh  {time.monotonic() - start:.0f} s, exit code {code}")
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
