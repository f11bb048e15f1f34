"""Opens any checkpoint: a run folder, a step of a run, or a Hugging Face directory."""

import dataclasses
import logging
from pathlib import Path

import jax
from etils import epath

from mobilellm_jax.checkpoint import (
    MODEL_PARTS,
    is_step_folder,
    latest_in,
    read_config,
    restore_step,
    step_folder,
    steps,
)
from mobilellm_jax.config import ComputeDtype, ModelConfig, near_miss
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.export.huggingface.directory import CONFIG as HUGGINGFACE_CONFIG
from mobilellm_jax.export.huggingface.directory import check_vocabulary, read_huggingface
from mobilellm_jax.export.huggingface.directory import read_model_config as read_huggingface_config
from mobilellm_jax.generation.loaded import LoadedModel
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.quantize.parameters import bits_per_weight, quantize_model, stored_bytes
from mobilellm_jax.quantize.schemes import Scheme
from mobilellm_jax.storage import file_kind, rundir, sealing
from mobilellm_jax.storage.user_path import user_path

_log = logging.getLogger(__name__)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
_LAYOUTS = (
    f"a run folder ({rundir.CHECKPOINTS}/STEP/ in it), a step folder "
    f"(RUN/{rundir.CHECKPOINTS}/STEP, or a copy of it) or a Hugging Face directory "
    f"({HUGGINGFACE_CONFIG} and weights)"
)


def open_model(ckpt: str | Path, scheme: Scheme | None = None) -> OpenedModel:
    """Opens a checkpoint; for a run folder, the latest step that is complete and undamaged.

    `scheme` quantizes the parameters; without a scheme, they are float32. They are on the default
    device. Devices differ, so `compute_dtype` and `attention` of the result are "auto".

    Raises:
      MissingFileError: if the folder does not exist, or is a run without a complete step.
      UserError: if the folder is not a checkpoint, or its content cannot be used.
      ConfigError: if the embedding and the head are tied, and the scheme quantizes only one.
    """
    opened = _open(user_path("checkpoint", ckpt))
    config = dataclasses.replace(opened.config, compute_dtype="auto", attention="auto")
    opened = dataclasses.replace(opened, config=config)
    if scheme is None:
        return opened
    params = quantize_model(opened.config, opened.params, scheme)
    _log.info(
        f"quantized {scheme}; {stored_bytes(params):,} bytes, "
        f"{bits_per_weight(params):.2f} bits per weight"
    )
    return dataclasses.replace(opened, params=params)


def load(path: str | Path, *, compute_dtype: ComputeDtype = "auto") -> LoadedModel:
    """Opens a checkpoint for a Python program or a notebook.

      model = mobilellm_jax.load("runs/quickstart")
      print(model.generate("Return a list of", temperature=0))
      logits_TV = model.logits("Return a list of")

    Args:
      path: a run folder, a step folder or a Hugging Face directory.
      compute_dtype: data type of the activations; "auto" is bfloat16 where the device has it, and
        float32 on CPUs.

    Raises:
      MissingFileError, UserError: as `open_model` does.
    """
    opened = open_model(path)
    config = dataclasses.replace(opened.config, compute_dtype=compute_dtype)
    return LoadedModel(config, opened.params, opened.tokenizer)


def _open(folder: Path) -> OpenedModel:
    if not folder.is_dir():
        raise _missing(folder)
    if is_step_folder(folder):
        # We resolve the path, because it may be "." or a link to a step, such as "best".
        return _open_step(folder.resolve())
    if (folder / rundir.CHECKPOINTS).is_dir():
        return _open_latest(folder, folder / rundir.CHECKPOINTS)
    if any(is_step_folder(path) for path in folder.glob("[0-9]*")):
        return _open_latest(folder, folder)
    if file_kind.is_there(folder / HUGGINGFACE_CONFIG) and any(
        next(folder.glob(pattern), None) for pattern in _WEIGHTS
    ):
        return _open_huggingface(folder)
    raise _no_checkpoint(folder)


def read_model_config(ckpt: str | Path) -> ModelConfig:
    """Returns the architecture of a checkpoint. The function reads no parameters.

    Raises:
      MissingFileError: if the folder does not exist.
      UserError: if the folder is not a checkpoint, or describes a model that we cannot express.
    """
    folder = user_path("checkpoint", ckpt)
    if not folder.is_dir():
        raise _missing(folder)
    if there := steps(folder):
        return read_config(step_folder(folder, there[-1])).model
    if (folder / sealing.MANIFEST).is_file():
        return read_config(folder).model
    if (
        file_kind.is_there(folder / HUGGINGFACE_CONFIG)
        and not (folder / rundir.CHECKPOINTS).is_dir()
    ):
        return read_huggingface_config(folder)
    raise _no_checkpoint(folder)


def _no_checkpoint(folder: Path) -> UserError:
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    return UserError(
        f"checkpoint={str(folder)!r} must be {_LAYOUTS}; it holds {found or 'nothing'}."
    )


def _open_latest(folder: Path, steps: Path) -> OpenedModel:
    step = latest_in(epath.Path(steps), MODEL_PARTS)
    if step is None:
        raise MissingFileError(
            f"checkpoint='{folder}' is a run with no complete checkpoint yet; let it train until "
            "train.checkpoint_every."
        )
    return _open_step(steps / str(step), verified=True)


def _open_step(folder: Path, *, verified: bool = False) -> OpenedModel:
    opened = restore_step(folder, verified=verified)
    check_vocabulary(opened.tokenizer, opened.config, folder)
    return opened


def _open_huggingface(folder: Path) -> OpenedModel:
    imported = read_huggingface(folder)
    params = jax.device_put(imported.params)
    return OpenedModel(imported.config, params, imported.tokenizer, str(folder))


def _missing(folder: Path) -> MissingFileError:
    """Returns the error for a missing folder, with the existing steps or a similar name."""
    parent = folder.parent
    if parent.name == rundir.CHECKPOINTS and (there := steps(parent.parent)):
        remedy = f" {parent.parent} has the steps {', '.join(map(str, there))}."
    elif parent.is_dir():
        siblings = [path.name for path in parent.iterdir() if path.is_dir()]
        remedy = near_miss(folder.name, siblings) or f" It must be {_LAYOUTS}."
    else:
        remedy = f" {parent} does not exist either."
    what = "is a file, not a folder" if folder.is_file() else "does not exist"
    return MissingFileError(f"checkpoint={str(folder)!r} {what}.{remedy}")
