"""Compares the peak memory of `prepare` on a small and on a ten times larger synthetic corpus.

    python benchmarks/prepare_memory.py --megabytes=100 --factor=10 --workers=2

Memory is the proportional set size of the process and its workers, summed and sampled ten times a
second. Shared pages count once, and files in the kernel's cache do not count.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WORDS = "river stone light water cloud mountain under over between slowly and the of a in".split()


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peaks = []
        for factor in (1, arguments.factor):
            megabytes = arguments.megabytes * factor
            _write_corpus(folder / "corpus.jsonl", megabytes * 1_000_000)
            began = time.monotonic()
            peak = _peak_of_prepare(folder, arguments.workers)
            print(
                f"{megabytes:6,} MB of text: peak {peak / 1e6:,.0f} MB in "
                f"{time.monotonic() - began:,.0f} s",
                flush=True,
            )
            peaks.append(peak)
            shutil.rmtree(folder / "output")
        print(f"ratio {peaks[1] / peaks[0]:.3f}   (goal: at most 1.10)")


def _write_corpus(file: Path, size: int) -> None:
    """Writes a corpus of different documents of up to 10 kB of words and numbers."""
    rng = random.Random(0)
    with file.open("w", encoding="utf-8") as opened:
        while opened.tell() < size:
            for _ in range(100):
                words = rng.choices(_WORDS, k=rng.randrange(1, 1_500))
                text = f"{rng.random()} {' '.join(words)} {rng.random()}"
                opened.write(json.dumps({"text": text}) + "\n")


def _peak_of_prepare(folder: Path, workers: int) -> int:
    command = [sys.executable, "-m", "mobilellm_jax", "prepare"]
    command += [f"--source=jsonl:{folder}/corpus.jsonl", f"--output={folder}/output"]
    command += ["--vocab_size=380", f"--workers={workers}"]
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_proportional_bytes(pid) for pid in _family(process.pid)))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"prepare ended with {process.returncode}")
    return peak


def _family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended
    return found


def _proportional_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # the process has ended
    line = next((line for line in text.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
