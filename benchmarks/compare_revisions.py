"""Times the commands of two revisions of this repository side by side, in turns.

    python benchmarks/compare_revisions.py --base=86b40cc --rounds=5

Each round runs `prepare`, `train`, `generate` and `evaluate` once per revision, each command in a
new process. The revisions take turns at being first. The figures are medians and minima:

| command | figure |
|---|---|
| prepare | seconds for `python_docs` with a new tokenizer, the start of Python included |
| train | seconds per step of the quickstart's model, the median after the compilation |
| generate | seconds for 200 tokens of the trained model, the start of Python included |
| evaluate | seconds for the perplexity of a text of 300 kB, the start of Python included |
| start | seconds of `mobilellm --help` |
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT_BYTES = 300_000


def checkout(revision: str, folder: Path) -> Path:
    """Extracts a commit into `folder` and returns it."""
    folder.mkdir()
    archive = folder / "archive.tar"
    subprocess.run(["git", "-C", ROOT, "archive", "-o", archive, revision], check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def run(code: Path, *arguments: str) -> float:
    """Runs `mobilellm ARGUMENTS` with the code in `code` and returns its seconds."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "mobilellm_jax", *arguments],
        cwd=code,
        env={**os.environ, "PYTHONPATH": str(code)},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


def measure(code: Path, work: Path, steps: int, text: Path) -> dict[str, float]:
    """Returns the figures of one round for one revision."""
    data, workdir = str(work / "data"), work / "run"
    config = str(code / "configs" / "quickstart.py")
    found = {"start": run(code, "--help")}
    found["prepare"] = run(
        code, "prepare", "--source=python_docs", "--vocab_size=4096", f"--output={data}"
    )
    run(
        code,
        "train",
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        f"--config.train.steps={steps}",
        "--config.train.log_every=1",
        "--config.train.eval_every=0",
        f"--config.train.checkpoint_every={steps}",
    )
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [r["train/tokens_per_sec"] for r in records if "train/tokens_per_sec" in r]
    found["train"] = 8 * 256 / statistics.median(rates[3:])
    found["generate"] = run(
        code,
        "generate",
        f"--checkpoint={workdir}",
        "--prompt=Return",
        "--max_new_tokens=200",
        "--temperature=0",
    )
    found["evaluate"] = run(code, "evaluate", f"--checkpoint={workdir}", f"--perplexity={text}")
    return found


def main() -> None:
    """Prints a table of both revisions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="training steps of a round")
    options = parser.parse_args()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        codes = {
            "base": checkout(options.base, place / "base"),
            "now": checkout("HEAD", place / "now"),
        }
        text = place / "text.txt"
        documentation = sorted(Path(os.__file__).parent.glob("*.py"))
        content = b"".join(file.read_bytes() for file in documentation)[:TEXT_BYTES]
        text.write_bytes(content.decode("utf-8", "ignore").encode())
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
        for number in range(options.rounds):
            order = list(codes) if number % 2 == 0 else list(codes)[::-1]
            for name in order:
                work = place / f"{name}-{number}"
                work.mkdir()
                figures[name].append(measure(codes[name], work, options.steps, text))
                print(number, name, figures[name][-1], file=sys.stderr, flush=True)
    print("| command | base: median s (min) | now: median s (min) | now / base |")
    print("|---|---|---|---|")
    for command in figures["now"][0]:
        base, now = ([f[command] for f in figures[name]] for name in ("base", "now"))
        medians = statistics.median(base), statistics.median(now)
        print(
            f"| {command} | {medians[0]:.3f} ({min(base):.3f}) "
            f"| {medians[1]:.3f} ({min(now):.3f}) | {medians[1] / medians[0]:.2f} |"
        )


if __name__ == "__main__":
    main()
