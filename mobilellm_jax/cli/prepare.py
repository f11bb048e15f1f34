"""Turns text into token shards, with a tokenizer given or trained.

  mobilellm prepare --source=python_docs --vocab_size=4096 --output=data/python_docs
  mobilellm prepare --source='text:books/**/*.txt' --tokenizer=tokenizer.model --output=data/books
  mobilellm prepare --source=tfds:lm1b --source='text:notes/*' --vocab_size=32000 --output=data/mix

A source is python_docs (the documentation that ships with Python; no download), tfds:NAME[:SPLIT]
(a TensorFlow Datasets dataset with a 'text' feature) or text:GLOB (every file one document, UTF-8).
Called again with the same settings it finds the finished folder and leaves it.
"""

from pathlib import Path

from absl import flags

_SOURCE = flags.DEFINE_multi_string(
    "source", [], "python_docs, tfds:NAME[:SPLIT] or text:GLOB; repeatable, read in this order"
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


def main(argv: list[str]) -> int:
    """Prepares."""
    del argv  # no config, no overrides
    from mobilellm_jax.data.prepare import prepare

    prepare(
        _SOURCE.value,
        Path(_OUTPUT.value),
        tokenizer=Path(_TOKENIZER.value) if _TOKENIZER.value else None,
        vocab_size=_VOCAB_SIZE.value,
        validation_fraction=_VALIDATION_FRACTION.value,
        report=print,
    )
    return 0
