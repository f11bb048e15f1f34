"""Writes and reads the weight files of Hugging Face directories without torch.

Weights are written as `model.safetensors`, or from 5 GB on as numbered shards with an index. This
module reads both, and also `pytorch_model.bin` (`torch_files.py`).
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.export.huggingface.torch_files import StoredTensor, open_torch
from mobilellm_jax.export.source import DTYPES
from mobilellm_jax.storage import file_kind, strict_json
from mobilellm_jax.storage.rundir import write_whole
from mobilellm_jax.storage.strict_json import plain

SHARD_BYTES = 5_000_000_000
_SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
# The number is limited because each shard stays open.
_MOST_SHARDS = 256
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def write_tensors(
    tensors: Iterable[tuple[str, np.ndarray]], directory: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the tensors; only one shard at a time is in memory."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        # Every version of transformers first checks that the format is "pt".
        save_file(pending, directory / f"{len(shards)}.shard", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        # `save_file` writes bytes in memory order, so the array must be contiguous.
        pending[name] = np.ascontiguousarray(tensor)
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.shard").rename(directory / _SAFETENSORS)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{i}.shard").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_whole(directory / f"{_SAFETENSORS}.index.json", json.dumps(index, indent=2) + "\n")


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a directory by name; safetensors are preferred to torch files.

    Raises:
      MissingFileError: if the directory has no weights, or a shard is missing.
      UserError: if a dtype is not in `DTYPES`, or a file is damaged or does not fit the index.
    """
    for name, open_file in ((_SAFETENSORS, _open_safetensors), (_PICKLE, open_torch)):
        if file_kind.is_there(directory / name):
            return open_file(directory / name)
        if file_kind.is_there(directory / f"{name}.index.json"):
            return _open_shards(directory / f"{name}.index.json", open_file)
    raise MissingFileError(
        f"{directory} holds no weights; expected {_SAFETENSORS}, {_SAFETENSORS}.index.json, "
        f"{_PICKLE} or {_PICKLE}.index.json."
    )


def spare_pickle(directory: Path) -> str:
    """Returns the name of a torch file that is ignored because of safetensors, or ''."""
    safe = any((directory / f"{_SAFETENSORS}{end}").is_file() for end in ("", ".index.json"))
    spare = [n for n in (_PICKLE, f"{_PICKLE}.index.json") if (directory / n).is_file()]
    return spare[0] if safe and spare else ""


def _open_shards(
    index: Path, open_file: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = strict_json.get(
            strict_json.parse(strict_json.content_of(index)), "weight_map", dict[str, str]
        )
    except strict_json.JsonError as error:
        raise UserError(f"{index}: {error} Fetch the file again.") from error
    files = sorted(set(weight_map.values()))
    if len(files) > _MOST_SHARDS:
        raise UserError(f"{index} names {len(files)} shards; at most {_MOST_SHARDS} are allowed.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        # A name with a slash could refer to a file outside of the folder.
        if not _SHARD_NAME.fullmatch(file):
            raise UserError(f"{index}: weight_map names {plain(file)}, which is not a file name.")
        if not file_kind.is_there(index.parent / file):
            raise MissingFileError(f"{index} names the shard {file}, which is not in the folder.")
        found = open_file(index.parent / file)
        for name in found:
            if name in tensors or weight_map.get(name, file) != file:
                raise UserError(f"{index}: {plain(name)} is in {file} and in another shard too.")
        tensors.update(found)
    missing = weight_map.keys() - tensors.keys()
    if missing:
        name = min(missing)
        raise UserError(f"{index} says that {plain(name)} is in {weight_map[name]}, but it is not.")
    return tensors


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        opened: Any = safetensors.safe_open(file, framework="np")
    except safetensors.SafetensorError as error:
        kind = file_kind.explanation(file_kind.first_bytes(file))
        raise UserError(f"{file} is not a whole safetensors file: {error}{kind}") from error
    tensors = {}
    for name in opened.keys():
        part = opened.get_slice(name)
        dtype = _STORED_DTYPES.get(part.get_dtype())
        if dtype is None:
            raise UserError(
                f"{file}: {plain(name)} has dtype {part.get_dtype()}; only {', '.join(DTYPES)} can "
                "be read (quantised weights cannot)."
            )
        read = functools.partial(opened.get_tensor, name)
        tensors[name] = StoredTensor(tuple(part.get_shape()), dtype, read)
    return tensors
