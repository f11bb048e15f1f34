"""Helpers that write parts and shards from lists of ids, with only NumPy."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mobilellm_jax.data import shards
from mobilellm_jax.data.preparation import assembly
from mobilellm_jax.data.preparation.parts import Part, part_file

Documents = Sequence[Sequence[int]]


def write_part(
    folder: Path,
    number: int,
    splits: Mapping[str, Documents],
    dtype: str = "<u2",
    loss_masks: Mapping[str, Documents] | None = None,
) -> Part:
    """Writes a part with only NumPy. Every token stands for three bytes of text."""
    folder.mkdir(exist_ok=True)
    counts, loss_masks = {}, loss_masks or {}
    for split, documents in splits.items():
        lengths = np.array([len(d) for d in documents], np.int64)
        arrays = {
            "tokens": np.array(list(itertools.chain(*documents)), dtype),
            "offsets": (np.cumsum(lengths) - lengths).astype("<u8"),
        }
        if split in loss_masks:
            arrays["loss_mask"] = np.array(list(itertools.chain(*loss_masks[split])), np.uint8)
        for suffix, array in arrays.items():
            array.tofile(part_file(folder, number, split, suffix))
        tokens = int(lengths.sum())
        counts[split] = shards.Counts(
            documents=len(documents), tokens=tokens, text_bytes=3 * tokens
        )
    return Part(
        number=number,
        source=0,
        splits=counts,
        masked=tuple(loss_masks),
        empty_documents=0,
        bad_lines=(),
    )


def assemble_all(
    parts: Path, folder: Path, split: str, records: Sequence[Part], dtype: str, shard_tokens: int
) -> list[shards.Shard]:
    """Joins parts into shards with their final names in `folder`."""
    planner = assembly.Planner(parts, split, shard_tokens, 0, (0, 0))
    plans = [plan for part in records for plan in planner.add(part)] + list(planner.end())
    made = [assembly.assemble(parts, parts, plan, np.dtype(dtype)) for plan in plans]
    return assembly.give_final_names(parts, folder, split, made)
