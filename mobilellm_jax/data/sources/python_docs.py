"""The TFDS dataset `python_docs`: the English documentation that ships with every CPython.

The documents are the language-reference topics of `pydoc_data`, and the docstrings of each module
and each class of the standard library. Headings as in `pydoc` separate the docstrings. The builder
parses the source files and never imports them. It downloads nothing. If a docstring occurs several
times, only its first occurrence is kept. The text depends on the Python release, so the line of
`identity` contains the release.
"""

import ast
import contextlib
import hashlib
import io
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mobilellm_jax.errors import MissingFileError

_VERSION = "1.0.0"
VALIDATION_PERCENT = 5

# These folders contain no documentation of the library, or contain code of other projects.
_SKIPPED_FOLDERS = frozenset(
    "__phello__ __pycache__ dist-packages ensurepip idlelib lib2to3 pydoc_data site-packages test "
    "tests turtledemo".split()
)
# Modules with less text contain only boilerplate; for example, the docstrings of the 120
# character-map codecs differ in one word. A class with less text has no document of its own; its
# text is part of the module's document.
_MIN_CHARACTERS = 200

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.Module | _Definition


class PythonDocs(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]  # TFDS has no types
    """The topics of the language reference, and the docstrings of the running Python's library."""

    VERSION = tfds.core.Version(_VERSION)
    RELEASE_NOTES = {_VERSION: "First release."}  # noqa: RUF012  # TFDS declares it as a plain dict

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {"id": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            homepage="https://docs.python.org",
            license="PSF-2.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # There is nothing to download.
        found = list(documents(standard_library()))
        return {
            split: self._generate_examples([d for d in found if split_of(d[0]) == split])
            for split in ("train", "validation")
        }

    def _generate_examples(self, found: list[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
        for name, text in found:
            yield name, {"id": name, "text": text}


def build(data_dir: Path) -> Any:
    """Returns the builder; writes array_record files under `data_dir` if they are missing."""
    builder = PythonDocs(data_dir=str(data_dir), file_format="array_record")
    tfds.disable_progress_bar()
    try:
        # Otherwise, TFDS would print a message about a download of unknown size.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    finally:
        tfds.enable_progress_bar()
    return builder


def identity() -> str:
    """Returns a line with the versions of this dataset and of Python, which determine the text."""
    return (
        f"python_docs {_VERSION} of {platform.python_implementation()} {platform.python_version()}"
    )


def standard_library() -> Path:
    """Returns the folder of the standard library's sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(name: str) -> str:
    """Returns 'train' or 'validation' for a document, depending on a hash of its id."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "validation" if percent < VALIDATION_PERCENT else "train"


def documents(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of the topics, and then of each module and its classes, sorted by name.

    Each class is a separate document, so there are enough documents to choose validation documents
    from all parts of the library. If each of the 450 modules and topics were one document, only 23
    of these documents would be held out.

    Raises:
      MissingFileError: if the topics or the library's sources are not installed.
    """
    topics = stdlib / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise MissingFileError(
            f"{topics} is missing: this Python was installed without its documentation topics, "
            "which python_docs needs. Install the full standard library (Debian and Ubuntu: "
            "libpython3-stdlib) or name other text with --source=text:GLOB."
        )
    for name, text in sorted(_topics(topics).items()):
        yield f"topic/{name}", text
    sources = sorted(
        (_module_name(path.relative_to(stdlib)), path)
        for path in stdlib.rglob("*.py")
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(stdlib).parts)
    )
    if not sources:
        raise MissingFileError(
            f"{stdlib} contains no Python sources: this Python was installed with compiled files "
            "only. Use a Python with the sources of its standard library, or --source=text:GLOB."
        )
    seen: set[str] = set()
    for name, path in sources:
        found = _module_documents(name, path, seen)
        if sum(map(len, found.values())) >= _MIN_CHARACTERS:
            yield from found.items()


def _topics(path: Path) -> dict[str, str]:
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            return dict(ast.literal_eval(node.value))
    raise MissingFileError(f"{path} defines no `topics`; reinstall this Python's library.")


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _module_documents(name: str, path: Path, seen: set[str]) -> dict[str, str]:
    """Returns {id: text} of the module's docstrings that are not in `seen`; adds them to `seen`."""
    with warnings.catch_warnings():
        # String literals of the library may contain invalid escapes, which cause warnings.
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes())

    def sections(documented: Iterable[tuple[str, _Documented]]) -> Iterator[str]:
        for heading, node in documented:
            docstring = ast.get_docstring(node)
            if docstring and docstring not in seen:
                seen.add(docstring)
                yield f"{heading}\n\n{docstring.strip()}\n"

    module_id = f"module/{name}"
    module = list(sections([(name, tree)]))
    classes: dict[str, str] = {}
    for child in _definitions(tree):
        own = list(sections(_documented(child, "")))
        text, class_id = "\n".join(own), f"class/{name}.{child.name}"
        alone = isinstance(child, ast.ClassDef) and len(text) >= _MIN_CHARACTERS
        if alone and class_id not in classes:
            classes[class_id] = text
        else:
            module += own
    return {module_id: "\n".join(module), **classes} if module else classes


def _documented(node: _Definition, prefix: str) -> Iterator[tuple[str, _Documented]]:
    """Yields (heading, node) of a class or function, and then of each definition in a class."""
    name = prefix + node.name
    if not isinstance(node, ast.ClassDef):
        yield f"{name}({ast.unparse(node.args)})", node
        return
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"class {name}({bases})", node
    for child in _definitions(node):
        yield from _documented(child, f"{name}.")


def _definitions(node: ast.AST) -> Iterator[_Definition]:
    """Yields the classes and functions of a body, also those inside `if`, `try` and `with`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(child)
