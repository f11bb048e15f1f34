"""Helpers that write parts and shards from lists of ids, with only NumPy."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mobilellm_jax.data import shards
from mobilellm_jax.data.loader import required_streams
from mobilellm_jax.data.mixture import Mixture, mixture_of
from mobilellm_jax.data.preparation import assembly
from mobilellm_jax.data.preparation.parts import Job, Part
from mobilellm_jax.data.token_stream import FileRecord, Shard
from mobilellm_jax.data.windows import count_windows

Documents = Sequence[Sequence[int]]


def write_part(
    folder: Path,
    number: int,
    splits: Mapping[str, Documents],
    dtype: str = "<u2",
    loss_masks: Mapping[str, Documents] | None = None,
) -> Part:
    """Writes a part with only NumPy. Every token stands for three bytes of text."""
    folder.mkdir(parents=True, exist_ok=True)
    written, loss_masks = {}, loss_masks or {}
    for split, documents in splits.items():
        lengths = np.array([len(d) for d in documents], np.int64)
        arrays = {
            "tokens": np.array(list(itertools.chain(*documents)), dtype),
            "offsets": (np.cumsum(lengths) - lengths).astype("<u8"),
        }
        if split in loss_masks:
            arrays["loss_mask"] = np.array(list(itertools.chain(*loss_masks[split])), np.uint8)
        name, tokens = f"{number:08d}.{split}", int(lengths.sum())
        files = {}
        for suffix, array in arrays.items():
            array.tofile(folder / f"{name}.{suffix}")
            files[suffix] = FileRecord(bytes=array.nbytes, sha256="not read")
        shard = Shard(name=name, documents=len(documents), tokens=tokens, files=files)
        written[split] = shards.Split(
            documents=len(documents),
            tokens=tokens,
            text_bytes=3 * tokens,
            shards=(shard,) if documents else (),
        )
    return Part(
        number=number,
        source=0,
        splits=written,
        empty_documents=0,
        bad_lines=(),
    )


def join_job(work: Path, dtype: str, shard_tokens: int) -> Job:
    """Returns a job whose parts are already in `work`, for functions that join them."""
    (work / "shards").mkdir(parents=True, exist_ok=True)
    return Job(
        sources=(),
        work=work,
        tokenizer=work / "not opened",
        dtype=np.dtype(dtype),
        skip_bad_lines=False,
        shard_tokens=shard_tokens,
    )


def assemble_all(job: Job, folder: Path, split: str, records: Sequence[Part]) -> list[Shard]:
    """Joins parts into shards with their final names in `folder`."""
    planner = assembly.Planner(job, split)
    plans = [plan for part in records for plan in planner.add(part)] + list(planner.end())
    made = [assembly.assemble(job, plan) for plan in plans]
    return assembly.give_final_names(job, folder, split, made)


def windows_per_epoch(tokens: shards.Dataset | Mixture, split: str, seq_len: int) -> int:
    """Returns the number of windows of all components, the padded last windows included."""
    mixture = tokens if isinstance(tokens, Mixture) else mixture_of(tokens)
    return sum(count_windows(stream, seq_len) for stream in required_streams(mixture, split))
