"""Opens a tokenizer file, and copies one.

A `*.model` file is a SentencePiece model (`sentencepiece.py`). A `tokenizer.json` file comes from
the Hugging Face library (`huggingface.py`). Each library is imported when such a file is opened.
"""

import shutil
from pathlib import Path

from mobilellm_jax.data.tokenizers.tokenizer import TOKENIZER_CONFIG, Tokenizer
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.storage import rundir


def load_tokenizer(path: Path) -> Tokenizer:
    """Opens a SentencePiece `*.model`, a `tokenizer.json`, or a folder that contains one of them.

    Raises:
      MissingFileError: if there is no such file.
      UserError: if the file is not a tokenizer, or has no BOS or EOS.
    """
    file: Path | None = path
    if path.is_dir():
        file = rundir.tokenizer_file(path)
    if file is None or not file.is_file():
        wanted = f" ({' or '.join(rundir.TOKENIZER_FILES)})" if path.is_dir() else ""
        raise MissingFileError(f"tokenizer={str(path)!r}: no tokenizer file there{wanted}.")
    if file.suffix == ".model":
        from mobilellm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(file)
    if file.suffix == ".json":
        from mobilellm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(file)
    raise UserError(
        f"tokenizer={str(path)!r} must be a SentencePiece *.model or a Hugging Face tokenizer.json."
    )


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Copies the tokenizer into `folder` under its usual name and returns the copy.

    A `tokenizer_config.json` beside a `tokenizer.json` is copied too; it may name BOS and EOS.
    """
    model = tokenizer.file.suffix == ".model"
    copy = folder / (rundir.SENTENCEPIECE_MODEL if model else rundir.TOKENIZER_JSON)
    shutil.copyfile(tokenizer.file, copy)
    config = tokenizer.file.parent / TOKENIZER_CONFIG
    if not model and config.is_file():
        shutil.copyfile(config, folder / TOKENIZER_CONFIG)
    return copy
