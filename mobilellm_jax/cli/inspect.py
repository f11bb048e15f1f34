"""Checks token shards, counts their contents and shows windows as a model sees them.

  mobilellm inspect --data=data/python_docs
  mobilellm inspect --data=data/web:0.7,data/code:0.3 --sample=5 --seq_len=512
  mobilellm inspect --data=data/mix --boundaries=document_mask --seed=1

The command reads every file and compares its checksum. It counts documents, tokens, bytes of text,
unknown tokens and byte tokens for each split and source. Then it shows windows from --first_sample
on: windows 0, 1, 2, ... are the first windows of a training run with the same data.seq_len,
data.boundaries and data.seed. Step s trains on train.global_batch windows, the first of which is
window (s - 1) * train.global_batch. If a file is damaged, the command names the file and ends with
exit code 2.
"""

import io
import sys
import typing

from absl import flags

from mobilellm_jax.cli.shared import new_flags
from mobilellm_jax.config import Boundaries, DataConfig

FLAGS = new_flags()
_DATA = flags.DEFINE_string(
    "data",
    None,
    "folder of `mobilellm prepare`, or a mixture of folders: DIR:0.7,DIR:0.3",
    FLAGS,
    required=True,
)
_SAMPLE = flags.DEFINE_integer("sample", 3, "windows to show", lower_bound=0, flag_values=FLAGS)
_FIRST = flags.DEFINE_integer(
    "first_sample",
    0,
    "first window to show; windows count from 0",
    lower_bound=0,
    flag_values=FLAGS,
)
_SEQ_LEN = flags.DEFINE_integer(
    "seq_len", DataConfig.seq_len, "tokens per window", lower_bound=1, flag_values=FLAGS
)
_BOUNDARIES = flags.DEFINE_enum(
    "boundaries",
    DataConfig.boundaries,
    typing.get_args(Boundaries),
    "document_mask: no document sees another document",
    FLAGS,
)
_SEED = flags.DEFINE_integer(
    "seed", DataConfig.seed, "seed of the order of the windows", lower_bound=0, flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Checks and counts the shards and prints windows."""
    del argv  # the command has no config, so it has no overrides
    from mobilellm_jax.data.inspection.inspect import inspect

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that the terminal cannot write are escaped too.
        sys.stdout.reconfigure(errors="backslashreplace")
    data = DataConfig(
        path=_DATA.value,
        seq_len=_SEQ_LEN.value,
        boundaries=typing.cast(Boundaries, _BOUNDARIES.value),
        seed=_SEED.value,
    )
    inspect(data, _SAMPLE.value, print, _FIRST.value)
