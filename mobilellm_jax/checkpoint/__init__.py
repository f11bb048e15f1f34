"""Checkpoints: what a run needs to go on, and what anything else needs to use the model.

`RUN/checkpoints/STEP/` holds

- `params/`: the float32 parameters, written by Orbax,
- `optimizer/`: optimizer state, step, PRNG key, counts of bad steps, written by Orbax,
- `tokenizer/`: the tokenizer's file,
- `manifest.json`, written last: format version, resolved config, data state (which data, and the
  next sample of it), type and shape of every array, size and SHA-256 of every file,

so a step folder stands alone, and evaluating or exporting reads the parameters only. A step is
complete with its manifest, and good while its files are those of the manifest: `latest_step` and
`restore_model` read them all before anything is believed.
"""

from mobilellm_jax.checkpoint.folders import latest_step, steps, whole_steps
from mobilellm_jax.checkpoint.layout import (
    DATA_STATE_VERSION,
    FORMAT_VERSION,
    MODEL_PARTS,
    CheckpointError,
    DataState,
    step_folder,
)
from mobilellm_jax.checkpoint.restoring import (
    RestoredModel,
    can_resume,
    read_config,
    read_data_state,
    restore_model,
    restore_state,
)
from mobilellm_jax.checkpoint.saving import CheckpointWriter, SaveError, save_model
from mobilellm_jax.storage.sealing import DamagedError

__all__ = [
    "DATA_STATE_VERSION",
    "FORMAT_VERSION",
    "MODEL_PARTS",
    "CheckpointError",
    "CheckpointWriter",
    "DamagedError",
    "DataState",
    "RestoredModel",
    "SaveError",
    "can_resume",
    "latest_step",
    "read_config",
    "read_data_state",
    "restore_model",
    "restore_state",
    "save_model",
    "step_folder",
    "steps",
    "whole_steps",
]
