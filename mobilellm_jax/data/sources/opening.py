"""Opens a source of documents by its name.

    python_docs                 The text that ships with Python.
    tfds:NAME[:SPLIT][#FIELD]   A TensorFlow dataset, read without TensorFlow.
    text:GLOB                   Files; each is a document.
    jsonl:GLOB[#FIELD]          Files of JSON objects, one per line.
    parquet:GLOB[#FIELD]        Tables; each row is a document.
    tokens:GLOB                 Lines of token ids: {"token_ids": [...], "loss_mask": [...]}.

FIELD names the feature, key or column that contains the text; the default is "text". The text after
the last # is FIELD, so a pattern that contains a # must also give #FIELD. GLOB is a pattern of
local paths, in which `**` matches folders of any depth, or of URLs that fsspec can open (s3://,
gs://, file://). The files of text, jsonl and tokens may be compressed with gzip, bzip2, xz or zstd.

A source imports its library (TFDS, PyArrow, fsspec, zstandard) only when it uses this library. The
start of a worker that reads one piece therefore takes only milliseconds.
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
# The name may contain a version: tfds:lm1b:1.1.0:train[:10%].
_TFDS = re.compile(
    r"(?P<name>[^:#]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(?P<split>[^#]+))?(?:#(?P<field>.+))?"
)


def open_source(spec: str, scratch: Path) -> Source:
    """Returns the source that `spec` names; the source may write files of its own to `scratch`.

    Processes that open the same source use the same `scratch`. One process must call `pieces`
    before other processes use the source, because this call writes the files.

    Raises:
      UserError: if `spec` has an unknown form.
    """
    # These modules are imported here, so that a command that opens no source does not load them.
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
