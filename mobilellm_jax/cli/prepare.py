r"""Turns text into token shards, with a tokenizer given or trained.

  mobilellm prepare --source=python_docs --vocab_size=4096 --output=data/python_docs
  mobilellm prepare --source='text:books/**/*.txt' --tokenizer=tokenizer.model --output=data/books
  mobilellm prepare --source='jsonl:web/*.jsonl.zst#content' --source='parquet:wiki/*.parquet' \
      --weight=0.8 --weight=0.2 --vocab_size=32000 --output=data/mix

A source is one of
  python_docs                 the documentation that ships with Python; no download
  tfds:NAME[:SPLIT][#FIELD]   a TensorFlow Datasets dataset with random access
  text:GLOB                   every file one document, UTF-8
  jsonl:GLOB[#FIELD]          a JSON object a line
  parquet:GLOB[#FIELD]        a row a document
  tokens:GLOB                 lines of {"token_ids": [...]}, perhaps with "loss_mask": [...]
FIELD is where the text is, "text" if not given. Files ending in .gz and .zst are decompressed
(not parquet); a GLOB may be an fsspec URL such as gs://bucket/*.jsonl.

Killed and called again it goes on; called again with the same settings it finds the finished folder
and leaves it. The files do not depend on the number of workers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from absl import flags

if TYPE_CHECKING:
    from mobilellm_jax.data.preparation.prepare import BadLinePolicy, Runner

_SOURCE = flags.DEFINE_multi_string(
    "source", [], "where documents come from, see above; repeatable, read in this order"
)
_WEIGHT = flags.DEFINE_multi_float(
    "weight",
    None,
    "share of a source in training, once per --source in the same order; without, a source counts "
    "by its tokens",
)
_OUTPUT = flags.DEFINE_string("output", None, "folder to make", required=True)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "SentencePiece *.model or Hugging Face tokenizer.json to use"
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "size of a tokenizer to train on the text, instead of --tokenizer"
)
_VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction",
    0.01,
    "share of the documents held out, of sources that have no validation split of their own",
)
_ON_BAD_LINE = flags.DEFINE_enum(
    "on_bad_line",
    "stop",
    ["stop", "skip"],
    "what to do with a document that cannot be read: stop there, or leave it out, list it in the "
    "manifest and warn",
)
_WORKERS = flags.DEFINE_integer("workers", None, "processes that encode; all cores by default")
_RUNNER = flags.DEFINE_enum(
    "runner",
    "local",
    ["local", "beam"],
    "beam: Apache Beam, for corpora past one machine; its workers share the disk of --output",
)
_BEAM_OPTION = flags.DEFINE_multi_string(
    "beam_option", [], "a flag for Beam, such as --beam_option=--runner=FlinkRunner; repeatable"
)


def main(argv: list[str]) -> int:
    """Prepares."""
    del argv  # no config, no overrides
    from mobilellm_jax.data.preparation.prepare import prepare

    prepare(
        _SOURCE.value,
        Path(_OUTPUT.value),
        weights=_WEIGHT.value,
        tokenizer=Path(_TOKENIZER.value) if _TOKENIZER.value else None,
        vocab_size=_VOCAB_SIZE.value,
        validation_fraction=_VALIDATION_FRACTION.value,
        on_bad_line=cast("BadLinePolicy", _ON_BAD_LINE.value),
        workers=_WORKERS.value,
        runner=cast("Runner", _RUNNER.value),
        beam_options=_BEAM_OPTION.value,
        report=print,
    )
    return 0
