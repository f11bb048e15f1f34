"""Runs the programs in docs/on_device.md as a reader would run them."""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "on_device.md"
# A device has nothing of this package, so the program must run without the package.
ALONE = "import sys\nsys.modules['mobilellm_jax'] = None\n"


def run_example(section: str, folder: Path) -> list[int]:
    """Runs a section's Python in an exported folder, and returns the tokens that it prints."""
    text = DOCS.read_text("utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    command = [sys.executable, "-I", "-c", ALONE + program]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]
