"""Where documents come from, and how a corpus is divided into pieces that any process can read.

    python_docs                 the text that ships with Python
    tfds:NAME[:SPLIT][#FIELD]   a TensorFlow dataset, read without TensorFlow
    text:GLOB                   files; each is a document
    jsonl:GLOB[#FIELD]          files of JSON objects, one a line
    parquet:GLOB[#FIELD]        tables; each row is a document
    tokens:GLOB                 jsonl of token ids: {"token_ids": [...], "loss_mask": [...]}

FIELD is the feature, key or column that holds the text, "text" if it is not named; it begins behind
the last #, so that a pattern with a # of its own must name it. GLOB is a local pattern, whose `**`
matches folders of any depth, or a URL that fsspec knows (s3://, gs://, file://). Files of text,
jsonl and tokens may end in .gz or .zst.

A worker that reads one piece starts in milliseconds: what a kind of source needs (TFDS, PyArrow,
fsspec, zstandard) is imported where it is used.
"""

import re
from pathlib import Path

from mobilellm_jax import config
from mobilellm_jax.data.sources.source import Source
from mobilellm_jax.errors import UserError

_FORMS = (
    "python_docs",
    "tfds:NAME[:SPLIT][#FIELD]",
    "text:GLOB",
    "jsonl:GLOB[#FIELD]",
    "parquet:GLOB[#FIELD]",
    "tokens:GLOB",
)
_FIELD = "text"
_WITH_FIELD = re.compile(r"(?P<name>[^#](?:.*?[^#])?)(?:#(?P<field>[^#]+))?")
# A version belongs to the name: tfds:lm1b:1.1.0:train[:10%].
_TFDS = re.compile(
    r"(?P<name>[^:#]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(?P<split>[^#]+))?(?:#(?P<field>.+))?"
)


def open_source(spec: str, scratch: Path) -> Source:
    """Returns the source that `spec` names; what it must build for itself goes under `scratch`.

    Processes that share a source share `scratch` too, and the first one asks for its pieces before
    the others start.

    Raises:
      UserError: for an unknown form.
    """
    # Imported here, so that a command loads only the libraries of the sources that it reads.
    from mobilellm_jax.data.sources import lines, parquet, tfds

    scheme, _, rest = spec.partition(":")
    if spec == "python_docs":
        return tfds.PythonDocsSource(spec, scratch)
    if scheme == "tfds" and (match := _TFDS.fullmatch(rest)):
        return tfds.TfdsSource(spec, match["name"], match["split"], match["field"] or _FIELD)
    if scheme == "text" and rest:
        return lines.TextSource(spec, rest)
    if scheme == "tokens" and rest:
        return lines.TokensSource(spec, rest)
    if scheme in ("jsonl", "parquet") and (match := _WITH_FIELD.fullmatch(rest)):
        field = match["field"] or _FIELD
        if scheme == "jsonl":
            return lines.JsonlSource(spec, match["name"], field)
        return parquet.ParquetSource(spec, match["name"], field)
    forms = {form.partition(":")[0]: form for form in _FORMS}
    if scheme in forms:
        rule = f"must have the form {forms[scheme]}"
    else:
        rule = f"must be one of {', '.join(_FORMS)}"
    hint = "" if scheme in forms else config.near_miss(scheme, forms)
    raise UserError(f"source={spec!r} {rule}.{hint}")
