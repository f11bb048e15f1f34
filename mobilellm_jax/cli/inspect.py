"""Checks token shards, counts what is in them and shows windows as a model sees them.

  mobilellm inspect --data=data/python_docs
  mobilellm inspect --data=data/web:0.7,data/code:0.3 --sample=5 --seq_len=512
  mobilellm inspect --data=data/mix --boundaries=document_mask --seed=1

It reads every file, compares its checksum and counts documents, tokens, bytes of text, unknown and
byte tokens for each split and source. The windows shown are the first of a training run with the
same data.seq_len, data.boundaries and data.seed, or those from --first_sample on: step s takes
train.global_batch samples from (s - 1) * train.global_batch on. A damaged file is named, and ends
it with 2.
"""

import io
import sys
import typing

from absl import flags

from mobilellm_jax.config import Boundaries, DataConfig

_DATA = flags.DEFINE_string(
    "data", None, "folder that prepare wrote, or a mixture: DIR:0.7,DIR:0.3", required=True
)
_SAMPLE = flags.DEFINE_integer("sample", 3, "windows to show", lower_bound=0)
_FIRST = flags.DEFINE_integer("first_sample", 0, "sample to begin at, from 0", lower_bound=0)
_SEQ_LEN = flags.DEFINE_integer("seq_len", DataConfig.seq_len, "tokens per window", lower_bound=1)
_BOUNDARIES = flags.DEFINE_enum(
    "boundaries",
    DataConfig.boundaries,
    typing.get_args(Boundaries),
    "document_mask: no document sees another one",
)
_SEED = flags.DEFINE_integer("seed", DataConfig.seed, "which windows are first", lower_bound=0)


def main(argv: list[str]) -> None:
    """Inspects."""
    del argv  # no config, no overrides
    from mobilellm_jax.data.inspection.inspect import inspect

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Whatever the terminal cannot write is escaped too.
        sys.stdout.reconfigure(errors="backslashreplace")
    data = DataConfig(
        path=_DATA.value,
        seq_len=_SEQ_LEN.value,
        boundaries=typing.cast(Boundaries, _BOUNDARIES.value),
        seed=_SEED.value,
    )
    inspect(data, _SAMPLE.value, print, _FIRST.value)
