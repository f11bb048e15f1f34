"""Runs the launch scripts with stand-ins for Python. One line names whatever is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("basename", "bash", "cat", "cksum", "dirname", "env", "mkdir", "cp", "chmod")

FAILS = "#!/bin/sh\nexit 1\n"
# This stand-in runs the real check on an interpreter that reports an older version.
TOO_OLD = f"""#!/bin/sh
exec {sys.executable} -c "import sys; sys.version_info = (3, 10, 14); exec(sys.argv[1])" "$2"
"""
# This stand-in accepts every `-c`, makes an environment with itself as python, and has the given
# pip.
SUITABLE = """#!/bin/sh
case "$*" in
  *version_info*1\\]*) echo {minor} ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip"*) echo "pip $* with $PIP_CONSTRAINT" >>pip.calls; {pip} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Returns a folder of the scripts and their inputs, and a PATH with no Python in `bin`."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path is not None, f"{tool} is needed"
        (tmp_path / "bin" / tool).symlink_to(path)
    return tmp_path


def put(checkout: Path, name: str, script: str) -> None:
    file = checkout / "bin" / name
    file.write_text(script)
    file.chmod(0o755)


def run(checkout: Path, command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(checkout / "bin"), "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", *command.split()], cwd=checkout, env=environment, capture_output=True, text=True
    )


def install(checkout: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail\nsource launch/common.sh\ninstall {arguments}\necho installed\n"
    (checkout / "install.sh").write_text(script)
    return run(checkout, "install.sh")


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
@pytest.mark.parametrize("names", [(), ("python3.12", "python3")])
def test_no_suitable_python(script: str, names: tuple[str, ...], checkout: Path) -> None:
    for name in names:
        put(checkout, name, TOO_OLD)
    result = run(checkout, script)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"{script}: no Python >= 3.11 with its venv module among ")
    assert len(result.stderr.splitlines()) == 1


def test_a_python_that_fails_is_passed_over(checkout: Path) -> None:
    put(checkout, "python3.12", FAILS)
    put(checkout, "python3.11", SUITABLE.format(minor=11, pip=":"))
    result = install(checkout, "test torch==2.13.0")
    assert (result.returncode, result.stderr) == (0, "")
    assert (checkout / "pip.calls").read_text().splitlines() == [
        "pip -m pip install torch==2.13.0 with constraints/py311.txt",
        "pip -m pip install --editable .[test] with constraints/py311.txt",
    ]


@pytest.mark.parametrize(("minor", "file"), [(11, "py311"), (12, "py312"), (14, "py312")])
def test_constraints_follow_the_python(minor: int, file: str, checkout: Path) -> None:
    put(checkout, "python3", SUITABLE.format(minor=minor, pip=":"))
    assert install(checkout, '""').returncode == 0
    calls = (checkout / "pip.calls").read_text()
    assert calls == f"pip -m pip install --editable . with constraints/{file}.txt\n"


def test_installs_again_only_after_a_change(checkout: Path) -> None:
    put(checkout, "python3", SUITABLE.format(minor=12, pip=":"))
    calls = checkout / "pip.calls"

    def count() -> int:
        assert install(checkout, '""').returncode == 0
        return len(calls.read_text().splitlines())

    assert [count(), count()] == [1, 1]
    with (checkout / "constraints" / "py312.txt").open("a") as file:
        file.write("# changed\n")
    assert [count(), count()] == [2, 2]
    with (checkout / "setup.py").open("a") as file:
        file.write("# changed\n")
    assert [count(), count()] == [3, 3]


def test_failing_pip_is_one_line_that_names_the_log(checkout: Path) -> None:
    put(checkout, "python3", SUITABLE.format(minor=12, pip="echo no network >&2; exit 1"))
    result = install(checkout, "test torch==2.13.0")
    assert result.returncode == 1
    assert result.stderr == (
        "install.sh: pip could not install torch==2.13.0; its output is in .venv/install.log.\n"
    )
    assert (checkout / ".venv" / "install.log").read_text() == "no network\n"
    assert "installed" not in result.stdout


def test_failing_venv_is_one_line(checkout: Path) -> None:
    script = SUITABLE.format(minor=12, pip=":").replace(
        "mkdir -p .venv/bin &&", "(echo two lines; echo disk full) >&2; exit 1;"
    )
    put(checkout, "python3", script)
    result = install(checkout, '""')
    assert result.returncode == 1
    assert result.stderr == (
        "install.sh: python3 could not make the virtual environment .venv: disk full\n"
    )
