"""Checks token shards, counts their contents and shows windows as a model reads them.

  mobilellm inspect --data=data/python_docs
  mobilellm inspect --data=data/web:0.7,data/code:0.3 --sample=5 --seq_len=512
  mobilellm inspect --data=data/mix --boundaries=document_mask --seed=1

The command reads every file and checks its checksum. For each split and source, it counts
documents, tokens, bytes of text, unknown tokens and byte tokens. Then it shows --sample windows,
beginning with window --first_sample. The windows are numbered from 0 in the order in which a
training run with the same data.seq_len, data.boundaries and data.seed reads them. Step s (from 1)
of this run trains on train.global_batch windows. Their numbers begin with (s - 1) *
train.global_batch. If a file is damaged, the command names the file and ends with exit code 2.
"""

import dataclasses
import io
import sys

from mobilellm_jax.cli.flags import flag
from mobilellm_jax.config import Boundaries, DataConfig


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    data: str = flag(
        None,
        "folder of `mobilellm prepare`, or a mixture of folders: DIR:0.7,DIR:0.3",
        required=True,
    )
    sample: int = flag(3, "windows to show", lower_bound=0)
    first_sample: int = flag(0, "first window to show; windows count from 0", lower_bound=0)
    seq_len: int = flag(DataConfig.seq_len, "tokens per window", lower_bound=1)
    boundaries: Boundaries = flag(
        DataConfig.boundaries, "document_mask: no document sees another document"
    )
    seed: int = flag(DataConfig.seed, "seed of the order of the windows", lower_bound=0)


def main(flags: Flags) -> None:
    """Checks and counts the shards and prints windows."""
    from mobilellm_jax.data.inspection.inspect import inspect

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that the terminal cannot print are escaped as well.
        sys.stdout.reconfigure(errors="backslashreplace")
    data = DataConfig(
        path=flags.data, seq_len=flags.seq_len, boundaries=flags.boundaries, seed=flags.seed
    )
    inspect(data, flags.sample, print, flags.first_sample)
