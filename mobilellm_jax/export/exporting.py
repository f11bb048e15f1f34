"""Writes an export to a temporary folder, verifies the export, and then renames the folder."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from mobilellm_jax.data.tokenizers.opening import copy_tokenizer
from mobilellm_jax.export.artifact import model_bytes, seal_artifact
from mobilellm_jax.export.formats import FORMATS
from mobilellm_jax.export.model_card import write_model_card
from mobilellm_jax.export.runtime import ArtifactInfo
from mobilellm_jax.export.verify import Verification, VerificationError, verify
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.storage.outputs import whole_directory


class Exported(NamedTuple):
    """The result of an export."""

    layers: int  # Number of stored layers. A shared block counts once if it is stored once.
    model_bytes: int  # Bytes of the weights and programs, without tokenizer, card and manifest.
    verification: Verification | None


def export(
    source: OpenedModel,
    directory: Path,
    *,
    format_name: str,
    precision: str = "float32",
    verified: bool = True,
) -> Exported:
    """Writes an export; `directory` appears only after all steps have succeeded.

    `directory` must be new or empty.

    Raises:
      UserError: if `directory` is not empty, or the format cannot express the model or tokenizer.
      VerificationError: if the export differs from the checkpoint by more than allowed.
    """
    form = FORMATS[format_name]
    with whole_directory("--output", directory) as folder:
        if form.file:
            copy_tokenizer(source.tokenizer, folder)
        layers = form.write(source, folder, precision)
        info = ArtifactInfo(
            format=format_name,
            file=form.file,
            precision=precision,
            model=source.config,
            loss=None,
            origin=source.origin,
        )
        found = None
        if verified:
            found = verify(form.load(folder, info), source)
            if problems := found.problems(form.precisions[precision]):
                raise VerificationError(
                    f"The export differs from the checkpoint: {'; '.join(problems)}. Nothing "
                    "was written.\n" + "\n".join(found.lines())
                )
            info = dataclasses.replace(info, loss=found.loss)
        size = model_bytes(folder)
        what = f"`{form.file}`" if form.file else "A Hugging Face directory"
        stored = f"{what} ({format_name}) in {precision}: {size:,} bytes."
        measured = found.lines() if found else ()
        write_model_card(folder, source, stored=stored, measured=measured)
        if form.file:
            seal_artifact(folder, info)
    return Exported(layers, size, found)
