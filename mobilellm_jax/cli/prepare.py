r"""Turns text into token shards, with a given tokenizer or a newly trained one.

  mobilellm prepare --source=python_docs --vocab_size=4096 --output=data/python_docs
  mobilellm prepare --source='text:books/**/*.txt' --tokenizer=tokenizer.model --output=data/books
  mobilellm prepare --source='jsonl:web/*.jsonl.zst#content' --source='parquet:wiki/*.parquet' \
      --weight=0.8 --weight=0.2 --vocab_size=32000 --output=data/mix

Kinds of sources:
  python_docs                 The documentation that ships with Python; needs no download.
  tfds:NAME[:SPLIT][#FIELD]   A TensorFlow Datasets dataset with random access.
  text:GLOB                   UTF-8 files; each file is one document.
  jsonl:GLOB[#FIELD]          Lines of JSON objects; each line is one document.
  parquet:GLOB[#FIELD]        Rows; each row is one document.
  tokens:GLOB                 Lines of {"token_ids": [...]}, with or without "loss_mask": [...].
FIELD is the name of the field with the text (default: "text"). Files that are compressed with gzip,
bzip2, xz or zstd are decompressed, except parquet files. A GLOB may be an fsspec URL such as
gs://bucket/*.jsonl.

If the command is killed, the same command continues the work. If the folder --output is finished
and the settings are the same, the command does nothing. The number of workers does not change the
files.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from mobilellm_jax.cli.flags import flag


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    source: list[str] = flag(
        [], "source of documents, see above; may be repeated, and is read in this order"
    )
    weight: list[float] | None = flag(
        None,
        "share of a source in training, once per --source and in the same order; without weights, "
        "the share of a source is its share of the tokens",
    )
    output: Path = flag(None, "folder to make", required=True)
    tokenizer: Path | None = flag(
        None, "SentencePiece *.model or Hugging Face tokenizer.json to use"
    )
    vocab_size: int | None = flag(
        None, "size of a tokenizer to train on the text, instead of --tokenizer"
    )
    validation_fraction: float = flag(
        0.01,
        "share of the documents to hold out; a source with its own validation split uses that "
        "split",
    )
    on_bad_line: Literal["stop", "skip"] = flag(
        "stop",
        "stop at a document that cannot be read, or skip it, list it in the manifest and warn",
    )
    workers: int | None = flag(None, "processes that encode (default: one per core)")
    runner: Literal["local", "beam"] = flag(
        "local",
        "beam: Apache Beam, for texts too large for one machine; its workers share the disk of "
        "--output",
    )
    beam_option: list[str] = flag(
        [], "a flag for Beam, such as --beam_option=--runner=FlinkRunner; may be repeated"
    )


def main(flags: Flags) -> None:
    """Prepares the token shards."""
    from mobilellm_jax.data.preparation.prepare import prepare

    prepare(
        flags.source,
        flags.output,
        weights=flags.weight,
        tokenizer=flags.tokenizer,
        vocab_size=flags.vocab_size,
        validation_fraction=flags.validation_fraction,
        on_bad_line=flags.on_bad_line,
        workers=flags.workers,
        runner=flags.runner,
        beam_options=flags.beam_option,
    )
