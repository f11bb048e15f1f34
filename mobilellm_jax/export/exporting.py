"""Writes an export, runs it, compares it with its checkpoint, and then gives it its name.

All files are written in a temporary folder beside the output. The format's own runtime opens them
there. A model card reports the comparison. Folders for devices are also sealed.
"""

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import NamedTuple

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.artifact import RUNTIMES, Artifact, is_installed, seal_artifact
from mobilellm_jax.export.formats import FORMATS, HUGGINGFACE_PRECISIONS
from mobilellm_jax.export.huggingface.config import Layout
from mobilellm_jax.export.huggingface.directory import Dtype, write_huggingface
from mobilellm_jax.export.huggingface.model_card import Training, write_model_card
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime
from mobilellm_jax.export.source import Precision, Source
from mobilellm_jax.export.verify import Verification, VerificationError, verify
from mobilellm_jax.storage.rundir import whole_directory


class Exported(NamedTuple):
    """The result of an export."""

    layers: int  # number of stored layers; a shared block that is stored once counts once
    model_bytes: int  # bytes of the weights and programs, without tokenizer, card and manifest
    verification: Verification | None


def export_for_device(
    source: Source,
    directory: Path,
    *,
    format_name: str,
    precision: str,
    training: Training | None = None,
    verified: bool = True,
) -> Exported:
    """Writes an export, which appears complete and verified or not at all.

    Args:
      source: the model.
      directory: folder to create; an empty folder may exist.
      format_name: a key of FORMATS.
      precision: a precision of the format.
      training: training facts for the model card, if they are known.
      verified: whether to run the export and compare it.

    Raises:
      UserError: if `directory` is not empty, or the format cannot express the model.
      VerificationError: if the export differs from the checkpoint by more than its precision
        allows.
    """
    _refuse_existing(directory)
    form = FORMATS[format_name]
    with whole_directory(directory) as folder:
        shutil.copyfile(source.tokenizer.file, folder / source.tokenizer.file.name)
        layers = form.write(source, folder, precision)
        info = ArtifactInfo(
            format=format_name,
            file=form.file,
            precision=precision,
            model=source.config,
            loss=None,
            origin=source.origin,
        )
        artifact = Artifact(folder, info)
        found = None
        if verified:
            found = _verified(artifact.load(), source, form.precisions[precision])
            info = dataclasses.replace(info, loss=found.loss)
        stored = f"`{form.file}` ({format_name}) in {precision}: {artifact.model_bytes:,} bytes."
        _write_card(folder, source, training, stored, found)
        seal_artifact(folder, info)
        return Exported(layers, artifact.model_bytes, found)


def export_huggingface(
    source: Source,
    directory: Path,
    *,
    layout: Layout,
    dtype: Dtype,
    training: Training | None = None,
    verified: bool = True,
) -> Exported:
    """Writes a Hugging Face directory and, if `verified`, compares it in transformers.

    Raises:
      UserError: as for `write_huggingface`.
      VerificationError: as for `export_for_device`.
    """
    found: Verification | None = None

    def finish(folder: Path) -> None:
        nonlocal found
        if verified:
            from mobilellm_jax.export.huggingface.runtime import HuggingFaceRuntime

            found = _verified(HuggingFaceRuntime(folder), source, HUGGINGFACE_PRECISIONS[dtype])
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        stored = f"A Hugging Face directory ({layout}) in {dtype}: {size:,} bytes of weights."
        _write_card(folder, source, training, stored, found)

    written = write_huggingface(
        *(source.config, source.params, source.tokenizer, directory),
        layout=layout,
        dtype=dtype,
        finish=finish,
    )
    return Exported(written.layers, written.tensor_bytes, found)


def can_verify(format_name: str) -> bool:
    """Returns whether the runtime of a device format or of a Hugging Face layout is installed."""
    if format_name in RUNTIMES:
        return is_installed(format_name)
    return all(importlib.util.find_spec(package) for package in ("torch", "transformers"))


def _refuse_existing(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists; give a new folder, or delete this one first.")


def _verified(runtime: Runtime, source: Source, allowed: Precision) -> Verification:
    found = verify(runtime, source)
    if problems := found.problems(allowed):
        raise VerificationError(
            f"The export is not what the checkpoint is: {'; '.join(problems)}. Nothing was "
            "written.\n" + "\n".join(found.lines())
        )
    return found


def _write_card(
    folder: Path,
    source: Source,
    training: Training | None,
    stored: str,
    found: Verification | None,
) -> None:
    measured = found.lines() if found else ()
    write_model_card(folder, source, training, stored=stored, measured=measured)
