import ast
from pathlib import Path

import pytest

from mobilellm_jax.data.sources import python_docs

LONG = "It is explained here at length, for otherwise the module would be too short to keep. " * 3

GAMMA = f'''
"""The gamma module. {LONG}"""
import does_not_exist_and_is_never_imported

class Ray(list, metaclass=type):
    """A ray."""
    def shine(self, *, angle: float = 0.5):
        """Shine at an angle."""
    class Inner:
        def undocumented(self): ...
        async def wait(self):
            """Wait inside."""

class Wave:
    """A wave. {LONG}"""
    def swell(self): "Swell."

class Wave:
    """The same name again. {LONG}"""

def copied():
    """{LONG}"""

try:
    def fast(x): "Quickly."
except ImportError:
    def slow(x, /): "Slowly."
'''


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    def write(name: str, text: str) -> None:
        file = tmp_path / "lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    write("pydoc_data/topics.py", "# date\ntopics = {'while': 'Loops é.', 'assert': 'Checks.'}\n")
    write("gamma.py", GAMMA)
    write("alpha/__init__.py", f'"""The alpha package. {LONG}"""\ndef f(): "{LONG}"\n')
    write("alpha/beta.py", f'"""Beta. {LONG * 2}"""\nx = "\\d"\n')
    write("short.py", '"""Too short."""\n')
    write("test/test_x.py", f'"""{LONG * 4}"""\n')
    write("site-packages/other.py", f'"""{LONG * 5}"""\n')
    return tmp_path / "lib"


def test_documents_of_a_small_library(stdlib: Path) -> None:
    found = list(python_docs.documents(stdlib))
    assert [name for name, _ in found] == [
        *("topic/assert", "topic/while", "module/alpha", "module/alpha.beta", "module/gamma"),
        "class/gamma.Wave",
    ]
    texts = dict(found)
    assert texts["topic/while"] == "Loops é."
    assert texts["module/alpha"] == (
        f"alpha\n\nThe alpha package. {LONG.strip()}\n\nf()\n\n{LONG.strip()}\n"
    )
    # `copied` repeats the docstring of alpha.f, which came first.
    assert texts["module/gamma"] == (
        f"gamma\n\nThe gamma module. {LONG.strip()}\n\n"
        "class Ray(list)\n\nA ray.\n\n"
        "Ray.shine(self, *, angle: float=0.5)\n\nShine at an angle.\n\n"
        "Ray.Inner.wait(self)\n\nWait inside.\n\n"
        f"class Wave()\n\nThe same name again. {LONG.strip()}\n\n"
        "fast(x)\n\nQuickly.\n\n"
        "slow(x, /)\n\nSlowly.\n"
    )
    assert texts["class/gamma.Wave"] == (
        f"class Wave()\n\nA wave. {LONG.strip()}\n\nWave.swell(self)\n\nSwell.\n"
    )


def test_the_dataset_holds_every_document_once_and_writes_nowhere_else(
    stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(python_docs, "standard_library", lambda: stdlib)
    monkeypatch.setattr(python_docs, "VALIDATION_PERCENT", 50)
    builder = python_docs.build(tmp_path / "data")
    splits = {
        name: {r["id"].decode(): r["text"].decode() for r in builder.as_data_source(name)}
        for name in ("train", "validation")
    }
    assert splits["train"].keys().isdisjoint(splits["validation"])
    assert splits["train"] | splits["validation"] == dict(python_docs.documents(stdlib))
    assert all(python_docs.split_of(i) == name for name, rows in splits.items() for i in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"lib", "data"}
    assert not home.exists()
    assert str(builder.info.file_format.value) == "array_record"


def test_the_split_is_fixed() -> None:
    """The split uses the sha256 of the id. No release may change these known values."""
    names = [f"module/{i}" for i in range(1000)]
    held_out = [name for name in names if python_docs.split_of(name) == "validation"]
    assert 30 < len(held_out) < 70  # the expected number is 50, the standard deviation 7
    assert python_docs.split_of("topic/while") == "train"
    assert held_out[:3] == ["module/7", "module/44", "module/68"]  # printf ID | sha256sum


def test_a_python_without_topics_or_sources(stdlib: Path) -> None:
    for file in stdlib.rglob("*.py"):
        if file.name != "topics.py":
            file.unlink()
    with pytest.raises(FileNotFoundError, match="contains no Python sources"):
        list(python_docs.documents(stdlib))
    (stdlib / "pydoc_data" / "topics.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"topics\.py is missing.*libpython3-stdlib"):
        list(python_docs.documents(stdlib))


def test_the_real_topics() -> None:
    """The parsed topics are the topics that Python's own help() shows."""
    from pydoc_data.topics import topics

    found = python_docs.documents(python_docs.standard_library())
    count = len(topics)
    ours = dict(next(found) for _ in range(count))
    assert ours == {f"topic/{name}": text for name, text in topics.items()}
    name, text = next(found)
    assert name.startswith("module/")
    source = python_docs.standard_library().joinpath(*name.removeprefix("module/").split("."))
    file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_bytes()))
    assert docstring is not None and docstring.strip() in text
