"""Opens and copies tokenizer files.

A `*.model` file is a SentencePiece model (`sentencepiece.py`). A `tokenizer.json` file belongs to
the Hugging Face library (`huggingface.py`). Both are also recognised under other names. This module
imports each library only when it opens such a file.
"""

import shutil
from pathlib import Path

from mobilellm_jax.data.tokenizers.folder import COMPANIONS, write_convention
from mobilellm_jax.data.tokenizers.tokenizer import SENTENCEPIECE, Convention, Tokenizer
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.storage import file_kind, rundir

# The pieces are the first field of a SentencePiece model, and this byte begins the first piece.
_SENTENCEPIECE = b"\n"


def load_tokenizer(path: Path, *, ours: bool = False) -> Tokenizer:
    """Opens a SentencePiece `*.model`, a `tokenizer.json`, or a folder that contains one of them.

    In a folder with both, the function opens `tokenizer.json`, as transformers does. `ours` says
    that this program wrote the folder; without it, the function looks for signs of this.

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

        return HuggingFaceTokenizer(file, ours=ours)
    if file.suffix == ".model" or first.startswith(_SENTENCEPIECE):
        from mobilellm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(file, ours=ours)
    raise UserError(
        f"tokenizer={str(path)!r} must be a SentencePiece *.model or a Hugging Face tokenizer.json"
        f"{file_kind.explanation(first)}."
    )


def copy_tokenizer(
    tokenizer: Tokenizer, folder: Path, convention: Convention | None = None
) -> Path:
    """Copies a tokenizer and its companions into a folder of this program; returns the file's copy.

    The file gets its usual name. The folder also gets a record of `convention`, by default the
    tokenizer's own.
    """
    copy = copy_files(tokenizer, folder)
    recorded = convention or tokenizer.convention
    bare = Convention(before=(tokenizer.bos_id,), after=(), end_ids=(tokenizer.eos_id,))
    alone = not any((folder / name).exists() for name in COMPANIONS)
    # A lone tokenizer.model without a record means this convention.
    if not (copy.name == rundir.SENTENCEPIECE_MODEL and alone and recorded == bare):
        write_convention(folder, recorded)
    return copy


def copy_files(tokenizer: Tokenizer, folder: Path) -> Path:
    """Copies a tokenizer's file, under its usual name, and its companions; returns the copy."""
    model = tokenizer.kind == SENTENCEPIECE
    copy = folder / (rundir.SENTENCEPIECE_MODEL if model else rundir.TOKENIZER_JSON)
    if not (copy.exists() and copy.samefile(tokenizer.file)):
        shutil.copyfile(tokenizer.file, copy)
    others = COMPANIONS if model else (*COMPANIONS, rundir.SENTENCEPIECE_MODEL)
    for name in others:
        source = tokenizer.file.parent / name
        if file_kind.is_there(source) and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)
    return copy
