r"""Turns text into token shards; the tokenizer is given or trained.

  mobilellm prepare --source=python_docs --vocab_size=4096 --output=data/python_docs
  mobilellm prepare --source='text:books/**/*.txt' --tokenizer=tokenizer.model --output=data/books
  mobilellm prepare --source='jsonl:web/*.jsonl.zst#content' --source='parquet:wiki/*.parquet' \
      --weight=0.8 --weight=0.2 --vocab_size=32000 --output=data/mix

Kinds of sources:
  python_docs                 the documentation that ships with Python; no download
  tfds:NAME[:SPLIT][#FIELD]   a TensorFlow Datasets dataset with random access
  text:GLOB                   UTF-8 files; each file is one document
  jsonl:GLOB[#FIELD]          lines of JSON objects; each line is one document
  parquet:GLOB[#FIELD]        rows; each row is one document
  tokens:GLOB                 lines of {"token_ids": [...]}, with or without "loss_mask": [...]
FIELD names the field with the text (default: "text"). Files that end in .gz or .zst are
decompressed, except parquet. A GLOB may be an fsspec URL such as gs://bucket/*.jsonl.

If the command is killed, the same command continues. If the folder is finished and the settings are
the same, the command does nothing. The files do not depend on the number of workers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from absl import flags

from mobilellm_jax.cli.shared import new_flags

if TYPE_CHECKING:
    from mobilellm_jax.data.preparation.prepare import BadLinePolicy, Runner

FLAGS = new_flags()
_SOURCE = flags.DEFINE_multi_string(
    "source",
    [],
    "source of documents, see above; may be repeated, and is read in this order",
    FLAGS,
)
_WEIGHT = flags.DEFINE_multi_float(
    "weight",
    None,
    "share of a source in training, once per --source and in the same order; without weights, the "
    "share of a source is its share of the tokens",
    flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string("output", None, "folder to make", FLAGS, required=True)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "SentencePiece *.model or Hugging Face tokenizer.json to use", FLAGS
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    None,
    "size of a tokenizer to train on the text, instead of --tokenizer",
    flag_values=FLAGS,
)
_VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction",
    0.01,
    "share of the documents to hold out; a source with its own validation split uses that split",
    flag_values=FLAGS,
)
_ON_BAD_LINE = flags.DEFINE_enum(
    "on_bad_line",
    "stop",
    ["stop", "skip"],
    "stop at a document that cannot be read, or skip it, list it in the manifest and warn",
    FLAGS,
)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "processes that encode (default: one per core)", flag_values=FLAGS
)
_RUNNER = flags.DEFINE_enum(
    "runner",
    "local",
    ["local", "beam"],
    "beam: Apache Beam, for texts too large for one machine; its workers share the disk of "
    "--output",
    FLAGS,
)
_BEAM_OPTION = flags.DEFINE_multi_string(
    "beam_option",
    [],
    "a flag for Beam, such as --beam_option=--runner=FlinkRunner; may be repeated",
    FLAGS,
)


def main(argv: list[str]) -> int:
    """Prepares the token shards."""
    del argv  # the command has no config, so it has no overrides
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
    )
    return 0
