"""Times `prepare` of two revisions on many small files and on large JSON lines, in turns.

    python benchmarks/prepare_inputs.py --base=8853bf4 --files=100000 --megabytes=1000 --rounds=3

The small files are texts of about 1 kB in folders of 1,000 files. The JSON lines are in one file.
Both revisions use one tokenizer, and they take turns at being first. The figures are seconds, the
start of Python included.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from compare_revisions import checkout, run

_WORDS = "river stone light water cloud mountain under over between slowly and the of a in".split()
_FILES_PER_FOLDER = 1_000
_WORDS_PER_TEXT = 180


def main() -> None:
    """Prints a table of both revisions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", required=True, help="the commit to compare with")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--megabytes", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = {
            "base": checkout(options.base, folder / "base"),
            "now": checkout("HEAD", folder / "now"),
        }
        sources = write_sources(folder, options.files, options.megabytes * 1_000_000)
        tokenizer = folder / "tokenizer"
        training = ("--source=python_docs", "--vocab_size=2000", f"--output={tokenizer}")
        run(codes["base"], "prepare", *training)
        print("| input | base: median s (min) | now: median s (min) | now / base |")
        print("|---|---|---|---|")
        for label, spec in sources.items():
            seconds: dict[str, list[float]] = {revision: [] for revision in codes}
            for number in range(options.rounds):
                for revision in list(codes) if number % 2 == 0 else list(codes)[::-1]:
                    output = folder / "output"
                    arguments = (f"--source={spec}", f"--tokenizer={tokenizer}")
                    taken = run(codes[revision], "prepare", *arguments, f"--output={output}")
                    seconds[revision].append(taken)
                    print(number, label, revision, f"{taken:.2f}", file=sys.stderr, flush=True)
                    shutil.rmtree(output)
            base, now = (statistics.median(seconds[revision]) for revision in ("base", "now"))
            print(
                f"| {label} | {base:.2f} ({min(seconds['base']):.2f}) "
                f"| {now:.2f} ({min(seconds['now']):.2f}) | {now / base:.3f} |",
                flush=True,
            )


def write_sources(folder: Path, files: int, size: int) -> dict[str, str]:
    """Writes both inputs; returns the sources by their label."""
    rng = random.Random(0)

    def text() -> str:
        return f"{rng.random()} {' '.join(rng.choices(_WORDS, k=_WORDS_PER_TEXT))}"

    for first in range(0, files, _FILES_PER_FOLDER):
        inner = folder / "small" / f"{first:07d}"
        inner.mkdir(parents=True)
        for number in range(first, min(first + _FILES_PER_FOLDER, files)):
            (inner / f"{number:07d}.txt").write_text(text())
    with (folder / "large.jsonl").open("w") as opened:
        while opened.tell() < size:
            opened.write("".join(json.dumps({"text": text()}) + "\n" for _ in range(100)))
    return {
        f"{files:,} files": f"text:{folder}/small/**/*.txt",
        f"{size // 1_000_000:,} MB of JSON lines": f"jsonl:{folder}/large.jsonl",
    }


if __name__ == "__main__":
    main()
