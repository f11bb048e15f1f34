"""Compares `prepare` with Hugging Face `datasets.map` and with SentencePiece alone, in tokens/s.

    pip install datasets
    python benchmarks/prepare.py --workers=2 --megabytes=200 --rounds=5

All three use the same jsonl file, SentencePiece model and number of processes, one after the other
in each round. The script prints the medians and our ratios.

    raw     every process encodes its share of the strings, which are already in memory
    map     datasets.map(batched=True, num_proc=N) over the loaded dataset, written to its cache
    ours    prepare, from the jsonl file to the finished folder, with the start of the processes

Without --corpus, the text is the documentation that ships with Python, repeated.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import Document, stop
from mobilellm_jax.data.tokenizers.training import train_tokenizer

_VOCAB_SIZE = 8_000
_MAP_BATCH = 1_000  # the default of datasets.map


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--corpus", default="python_docs", help="a source as of `prepare --source`")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    try:
        import datasets
    except ModuleNotFoundError:
        raise SystemExit("datasets is not installed; pip install datasets") from None
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = _texts(arguments.corpus, arguments.megabytes * 1_000_000, folder)
        model = folder / "tokenizer.model"
        train_tokenizer(texts[:2_000], _VOCAB_SIZE, model)
        jsonl = folder / "corpus.jsonl"
        with jsonl.open("w", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
        loaded = datasets.load_dataset(
            "json", data_files=str(jsonl), split="train", cache_dir=str(folder / "cache")
        )
        # Processes that measure are not forked from a process with threads or a tokenizer.
        context = multiprocessing.get_context("spawn")
        with context.Pool(
            arguments.workers, _hold, (model, texts, arguments.workers, context.Value("i", 0))
        ) as pool:
            pool.map(_ready, range(4 * arguments.workers))

            def raw() -> int:
                return sum(pool.map(_encode_held, range(arguments.workers), chunksize=1))

            def peer() -> int:
                encoded = loaded.map(
                    _MapEncoder(model),
                    batched=True,
                    batch_size=_MAP_BATCH,
                    num_proc=arguments.workers,
                    remove_columns=loaded.column_names,
                    load_from_cache_file=False,
                )
                tokens = sum(encoded.with_format("numpy")["length"])
                encoded.cleanup_cache_files()
                return int(tokens)

            def ours() -> int:
                manifest = prepare(
                    [f"jsonl:{jsonl}"],
                    folder / "output",
                    tokenizer=model,
                    workers=arguments.workers,
                    validation_fraction=0.001,
                )
                shutil.rmtree(folder / "output")
                documents = sum(split.documents for split in manifest.splits.values())
                return sum(s.tokens for s in manifest.splits.values()) - 2 * documents

            _compare({"raw": raw, "map": peer, "ours": ours}, arguments.rounds)


def _compare(runs: dict[str, Callable[[], int]], rounds: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in runs}
    counts = set()
    for index in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            tokens = run()
            rates[name].append(tokens / (time.perf_counter() - began))
            counts.add(tokens)
        shown = "  ".join(f"{name} {r[-1] / 1e6:.2f}" for name, r in rates.items())
        print(f"round {index + 1}: million tokens/s  {shown}", flush=True)
    assert len(counts) == 1, f"the three disagree on the number of tokens: {counts}"
    median = {name: statistics.median(r) for name, r in rates.items()}
    for name, value in median.items():
        spread = f"{min(rates[name]) / 1e6:.2f} to {max(rates[name]) / 1e6:.2f}"
        print(f"{name:5} {value / 1e6:6.2f} million tokens/s (median of {rounds}; {spread})")
    print(f"ours / raw {median['ours'] / median['raw']:.3f}   (goal 0.85)")
    print(f"ours / map {median['ours'] / median['map']:.3f}   (goal 1.25)")


def _texts(spec: str, size: int, folder: Path) -> list[str]:
    """Returns documents of about `size` bytes: the source's documents, shuffled and repeated."""
    source = open_source(spec, folder / "source")
    own = [
        document.text
        for piece in source.pieces("train")
        for document in source.documents(piece, stop)
        if isinstance(document, Document) and document.text
    ]
    rng = random.Random(0)
    texts: list[str] = []
    total = 0
    while total < size:
        for text in rng.sample(own, len(own)):
            texts.append(text)
            total += len(text.encode())
            if total >= size:
                break
    return texts


class _MapEncoder:
    """Encodes a batch; datasets.map calls it in its processes, which open the model once."""

    def __init__(self, model: Path) -> None:
        self._file = str(model)
        self._model: sentencepiece.SentencePieceProcessor | None = None

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[object]]:
        if self._model is None:
            self._model = sentencepiece.SentencePieceProcessor(model_file=self._file)
        ids = self._model.encode(batch["text"], out_type=int, num_threads=1)
        return {"ids": ids, "length": [len(row) for row in ids]}

    def __getstate__(self) -> dict[str, object]:
        return {"_file": self._file, "_model": None}


_held: tuple[sentencepiece.SentencePieceProcessor, list[str]]


def _hold(model: Path, texts: list[str], workers: int, counter: object) -> None:
    global _held
    with counter.get_lock():  # type: ignore[attr-defined]
        index = counter.value  # type: ignore[attr-defined]
        counter.value += 1  # type: ignore[attr-defined]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    _held = processor, texts[index::workers]


def _ready(_: int) -> None:
    time.sleep(0.05)


def _encode_held(_: int) -> int:
    processor, texts = _held
    return sum(len(row) for row in processor.encode(texts, out_type=int, num_threads=1))


if __name__ == "__main__":
    main()
