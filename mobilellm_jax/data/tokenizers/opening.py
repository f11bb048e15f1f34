"""Opens and copies tokenizer files.

A `*.model` file is a SentencePiece model (`sentencepiece.py`). A `tokenizer.json` file belongs to
the Hugging Face library (`huggingface.py`). Both are also recognised under other names. This module
imports each library only when it opens such a file.
"""

import shutil
from pathlib import Path

from mobilellm_jax.data.tokenizers.tokenizer import SENTENCEPIECE, TOKENIZER_CONFIG, Tokenizer
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.storage import file_kind, rundir

# The pieces are the first field of a SentencePiece model, and this byte begins the first piece.
_SENTENCEPIECE = b"\n"


def load_tokenizer(path: Path) -> Tokenizer:
    """Opens a SentencePiece `*.model`, a `tokenizer.json`, or a folder that contains one of them.

    Raises:
      MissingFileError: if there is no such file.
      UserError: if the file is not a tokenizer, or has no BOS or EOS.
    """
    file = rundir.tokenizer_file(path) if path.is_dir() else path
    if file is None or not file_kind.is_there(file):
        wanted = f" ({' or '.join(rundir.TOKENIZER_FILES)})" if path.is_dir() else ""
        raise MissingFileError(f"tokenizer={str(path)!r}: no tokenizer file there{wanted}.")
    first = file_kind.first_bytes(file)
    if file.suffix == ".json" or first.lstrip().startswith(b"{"):
        from mobilellm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(file)
    if file.suffix == ".model" or first.startswith(_SENTENCEPIECE):
        from mobilellm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(file)
    raise UserError(
        f"tokenizer={str(path)!r} must be a SentencePiece *.model or a Hugging Face tokenizer.json"
        f"{file_kind.explanation(first)}."
    )


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Copies the tokenizer file into `folder` under the usual file name, and returns the copy.

    If the folder also has a `tokenizer_config.json`, it is copied too, because it may name
    BOS and EOS.
    """
    model = tokenizer.kind == SENTENCEPIECE
    copy = folder / (rundir.SENTENCEPIECE_MODEL if model else rundir.TOKENIZER_JSON)
    shutil.copyfile(tokenizer.file, copy)
    config = tokenizer.file.parent / TOKENIZER_CONFIG
    if not model and file_kind.is_there(config):
        shutil.copyfile(config, folder / TOKENIZER_CONFIG)
    return copy
