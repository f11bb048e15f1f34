"""Compares our loader with a torch DataLoader over a memory map and with Hugging Face `datasets`.

    pip install torch datasets
    python benchmarks/loader.py --rounds=7

All contenders read windows of --seq_len tokens in random order, in batches of --batch, from files
in the page cache. They take turns in one process. The script prints medians in million tokens/s,
the spread, and our ratios to the others.

    ours      two folders mixed 0.7 to 0.3, one with a loss mask; tokens, targets, weights, segments
              and positions, documents of --document_tokens on average (document_mask)
    plain     one folder; tokens, targets and weights (concat)
    torch     DataLoader(shuffle=True) over windows of an np.memmap as in nanoGPT: tokens and
              targets as int64 and no other channel; in this process
    torch+N   the same with N worker processes (--torch_workers)
    datasets  rows of --seq_len tokens from an Arrow file, shuffled, with_format("numpy"): tokens
              only
"""

import argparse
import hashlib
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data import shards, token_stream
from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.data.mixture import open_mixture

_VOCAB_SIZE = 32_000
_SHARDS = 4
_PEERS = {"torch": "torch", "datasets": "datasets"}


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--document_tokens", type=int, default=300)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=100, help="per contender and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch_workers", type=int, default=2)
    arguments = parser.parse_args()
    missing = [module for module in _PEERS.values() if not importlib.util.find_spec(module)]
    for module in missing:
        print(f"WARNING: {module} is not installed and is left out; pip install it")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, NumPy {np.__version__}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_tokens(folder / "one", arguments.tokens, arguments.document_tokens, seed=0)
        _write_tokens(
            folder / "two", arguments.tokens // 2, arguments.document_tokens, seed=1, masked=True
        )
        contenders: dict[str, Iterator[int]] = {
            "ours": _ours(
                f"{folder}/one:0.7,{folder}/two:0.3", arguments, boundaries="document_mask"
            ),
            "plain": _ours(str(folder / "one"), arguments, boundaries="concat"),
        }
        if "torch" not in missing:
            # nanoGPT also uses a single file, so the dataset does not search for the shard.
            whole = folder / "whole.bin"
            np.concatenate(
                [np.fromfile(file, "<u2") for file in sorted((folder / "one").glob("*.tokens"))]
            ).tofile(whole)
            contenders["torch"] = _torch(whole, arguments, workers=0)
            workers = arguments.torch_workers
            contenders[f"torch+{workers}"] = _torch(whole, arguments, workers)
        if "datasets" not in missing:
            contenders["datasets"] = _datasets(folder, arguments)
        _compare(contenders, arguments)


def _ours(path: str, arguments: argparse.Namespace, boundaries: Any) -> Iterator[int]:
    data = DataConfig(path=path, seq_len=arguments.seq_len, boundaries=boundaries)
    for batch in train_batches(
        open_mixture(path), data, global_batch=arguments.batch, first_sample=0
    ):
        yield batch["tokens"].size


def _torch(file: Path, arguments: argparse.Namespace, workers: int) -> Iterator[int]:
    import torch

    # By default torch uses all cores for copies of a few kilobytes, which is slower.
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        _MemmapWindows(file, arguments.seq_len),
        batch_size=arguments.batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for tokens, targets in loader:
            assert tokens.shape == targets.shape
            yield tokens.numel()


class _MemmapWindows:
    """Windows as in nanoGPT: int64 copies of the inputs and of the targets."""

    def __init__(self, file: Path, seq_len: int) -> None:
        self._data = np.memmap(file, np.uint16, mode="r")
        self._seq_len = seq_len

    def __len__(self) -> int:
        return (len(self._data) - 1) // self._seq_len

    def __getitem__(self, window: int) -> tuple[Any, Any]:
        import torch

        start = window * self._seq_len
        tokens = self._data[start : start + self._seq_len].astype(np.int64)
        targets = self._data[start + 1 : start + 1 + self._seq_len].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(targets)


def _datasets(folder: Path, arguments: argparse.Namespace) -> Iterator[int]:
    import datasets
    import pyarrow as pa

    seq_len = arguments.seq_len
    file = folder / "rows.arrow"
    table = pa.schema([("input_ids", pa.list_(pa.int32(), seq_len))])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table) as writer:
        for shard in sorted((folder / "one").glob("*.tokens")):
            tokens = np.fromfile(shard, "<u2").astype(np.int32)
            whole = tokens[: len(tokens) // seq_len * seq_len]
            rows = pa.FixedSizeListArray.from_arrays(pa.array(whole), seq_len)
            # The library itself writes chunks of this size.
            writer.write_table(pa.table([rows], schema=table), max_chunksize=1000)
    saved = datasets.Dataset.from_file(str(file))
    for epoch in range(1 << 30):
        shuffled = saved.shuffle(seed=epoch).with_format("numpy")
        for batch in shuffled.iter(arguments.batch, drop_last_batch=True):
            assert batch["input_ids"].shape == (arguments.batch, seq_len)
            yield batch["input_ids"].size


def _compare(contenders: dict[str, Iterator[int]], arguments: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for batches in contenders.values():
        _rate(batches, arguments.batches)  # starts threads and processes, fills the page cache
    for index in range(arguments.rounds):
        for name, batches in contenders.items():
            rates[name].append(_rate(batches, arguments.batches))
        shown = "  ".join(f"{name} {r[-1] / 1e6:.1f}" for name, r in rates.items())
        print(f"round {index + 1}: million tokens/s  {shown}", flush=True)
    median = {name: statistics.median(r) for name, r in rates.items()}
    for name, value in median.items():
        spread = f"{min(rates[name]) / 1e6:.1f} to {max(rates[name]) / 1e6:.1f}"
        rounds = arguments.rounds
        print(f"{name:8} {value / 1e6:7.1f} million tokens/s (median of {rounds}; {spread})")
    print("ours / goal of 10 million tokens/s " + f"{median['ours'] / 1e7:.2f}")
    for peer in [name for name in median if name not in ("ours", "plain")]:
        for name in ("ours", "plain"):
            print(f"{name} / {peer} {median[name] / median[peer]:.2f}")


def _rate(batches: Iterator[int], count: int) -> float:
    """Returns tokens/s of the next `count` batches, after the batches that were read ahead."""
    for _ in range(_READ_AHEAD):
        next(batches)
    began = time.perf_counter()
    tokens = sum(next(batches) for _ in range(count))
    return tokens / (time.perf_counter() - began)


# While others run, Grain's buffer fills, and a DataLoader reads 2 batches per worker ahead.
_READ_AHEAD = 16


def _write_tokens(
    folder: Path, tokens: int, document_tokens: int, *, seed: int, masked: bool = False
) -> None:
    """Writes a token folder of random ids with exponential document lengths."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    found = []
    for index in range(_SHARDS):
        count = tokens // _SHARDS
        lengths = (
            rng.exponential(document_tokens, 2 * count // document_tokens).astype(np.int64) + 2
        )
        starts = np.cumsum(lengths) - lengths
        arrays = {
            token_stream.TOKENS: rng.integers(3, _VOCAB_SIZE, count, dtype=np.uint16),
            token_stream.OFFSETS: starts[starts < count].astype("<u8"),
        }
        if masked:
            arrays[token_stream.LOSS_MASK] = rng.integers(0, 2, count, dtype=np.uint8)
        name = f"train-{index:05d}-of-{_SHARDS:05d}"
        files = {suffix: _write(folder / f"{name}.{suffix}", a) for suffix, a in arrays.items()}
        documents = len(arrays[token_stream.OFFSETS])
        found.append(token_stream.Shard(name=name, documents=documents, tokens=count, files=files))
    counts = {
        "documents": sum(shard.documents for shard in found),
        "tokens": sum(shard.tokens for shard in found),
        "text_bytes": 0,
    }
    tokenizer = _write(folder / "tokenizer.model", np.zeros(1, np.uint8))
    source = shards.SourceRecord(
        spec="random",
        weight=None,
        splits={"train": shards.Counts(**counts)},
        empty_documents=0,
        bad_lines=(),
    )
    manifest = shards.Manifest(
        format_version=shards.FORMAT_VERSION,
        tokenizer="tokenizer.model",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=_VOCAB_SIZE,
        bos_id=1,
        eos_id=2,
        dtype="uint16",
        splits={"train": shards.Split(**counts, shards=tuple(found))},
        sources=(source,),
        settings={},
    )
    shards.write_manifest(folder, manifest)


def _write(file: Path, array: np.ndarray) -> token_stream.FileRecord:
    content = array.tobytes()
    file.write_bytes(content)
    return token_stream.FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


if __name__ == "__main__":
    main()
