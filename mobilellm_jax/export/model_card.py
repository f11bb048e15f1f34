"""Writes `model_card.md`, which describes the exported model, its training and its verification.

The card contains only known facts. The run's config names the token folders. The facts about the
data come from the manifests of these folders, if the folders still exist.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mobilellm_jax.data.mixture import split_path
from mobilellm_jax.data.shards import read_manifest
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.storage.rundir import write_whole

FILE = "model_card.md"


def write_model_card(
    folder: Path, source: OpenedModel, *, stored: str, measured: Sequence[str]
) -> None:
    """Writes the card into an exported folder.

    `stored` is a sentence that states the format, the precision and the size in bytes. `measured`
    contains the lines of the verification; it is empty if no verification ran.
    """
    config = source.config
    repeats = f", each applied {config.num_repeats} times ({config.sharing})"
    head = "embeddings shared with the head" if config.tie_embeddings else "a head of its own"
    results = "\n".join(["```", *measured, "```"])
    card = f"""\
# Model card

Exported by mobilellm-jax from `{source.origin}`.

## Architecture

| | |
|---|---|
| parameters | {parameter_count(config):,} |
| depth | {config.num_blocks} blocks{repeats if config.num_repeats > 1 else ""}: \
{config.applied_depth} layers |
| width | {config.embed_dim}, feed-forward {config.ffn_dim} ({config.activation}) |
| attention | {config.num_heads} of {config.head_dim}, {config.num_kv_heads} key-value heads |
| vocabulary | {config.vocab_size:,}, {head} |
| longest sequence | {config.max_seq_len:,} tokens |

## Stored

{stored}

## Training

{_training(source)}

## Measured

{results if measured else "Nothing: the export was not verified."}
"""
    write_whole(folder / FILE, card)


def _training(source: OpenedModel) -> str:
    config, step = source.run_config, source.step
    if config is None or step is None:
        return "Not known: the model came from a Hugging Face directory."
    tokens = step * config.tokens_per_step
    data = "".join(f"\n| data | {line} |" for line in _data(config.data.path))
    return f"""\
| | |
|---|---|
| steps | {step:,} of {config.train.steps:,} |
| tokens | {tokens:,}, in windows of {config.data.seq_len:,} |
| optimizer | {config.optimizer.name}, peak learning rate {config.optimizer.peak_lr:g} |{data}"""


def _data(path: str) -> Iterator[str]:
    for folder, share in split_path(path):
        if not (folder / "manifest.json").is_file():
            yield f"`{folder}` ({float(share):.0%}), which is not there any more"
            continue
        manifest = read_manifest(folder)
        for record in manifest.sources:
            counts = record.splits.get("train")
            size = f"{counts.documents:,} documents, {counts.tokens:,} tokens" if counts else "none"
            yield f"`{record.spec}` ({float(share):.0%} of training): {size}"
