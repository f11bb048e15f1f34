"""Translates the words of other tools (nanoGPT, transformers, litgpt) into our settings."""

import re
from collections.abc import Collection

from mobilellm_jax.config.rules import near_miss

_BATCH = "train.global_batch, the sequences of one optimizer step on all devices together"
_LENGTH = "data.seq_len, and model.max_seq_len if the model must support longer sequences"
_STEPS = "train.steps, which counts optimizer steps and not epochs"
_PARTS = "train.accumulation_steps, which splits train.global_batch and does not enlarge it"
_RATIO = "optimizer.min_lr_ratio, the final rate divided by optimizer.peak_lr"

# Each answer names our field for a word, and explains the field if other tools define it otherwise.
_FIELDS: dict[str, str] = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr"), "optimizer.peak_lr"),
    **dict.fromkeys(("min_lr", "final_lr"), _RATIO),
    **dict.fromkeys(("lr_scheduler_type", "lr_schedule", "scheduler"), "optimizer.schedule"),
    **dict.fromkeys(("warmup", "warmup_iters", "num_warmup_steps"), "optimizer.warmup_steps"),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "gradient_clip_val"), "optimizer.clip_norm"),
    **dict.fromkeys(("optim", "optimizer_name"), "optimizer.name"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "global_batch_size"), _BATCH),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "accumulate"), _PARTS),
    **dict.fromkeys(("max_iters", "max_steps", "num_steps", "iterations"), _STEPS),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), _STEPS),
    **dict.fromkeys(("eval_interval", "eval_steps"), "train.eval_every"),
    "eval_iters": "train.eval_batches",
    **dict.fromkeys(("log_interval", "logging_steps"), "train.log_every"),
    **dict.fromkeys(("save_interval", "save_steps"), "train.checkpoint_every"),
    "save_total_limit": "train.keep_checkpoints",
    **dict.fromkeys(("dataset", "data_dir", "train_data"), "data.path"),
    **dict.fromkeys(("block_size", "context_length", "max_seq_length", "n_ctx"), _LENGTH),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers"), "model.num_blocks"),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads"), "model.num_heads"),
    **dict.fromkeys(("n_kv_heads", "n_query_groups", "num_key_value_heads"), "model.num_kv_heads"),
    **dict.fromkeys(("n_embd", "d_model", "dim", "hidden_size"), "model.embed_dim"),
    **dict.fromkeys(("d_ff", "intermediate_size", "hidden_dim"), "model.ffn_dim"),
    **dict.fromkeys(("act", "hidden_act"), "model.activation"),
    **dict.fromkeys(("dtype", "precision", "bf16"), "model.compute_dtype"),
    **dict.fromkeys(("tie_word_embeddings", "share_embedding"), "model.tie_embeddings"),
    **dict.fromkeys(("layer_sharing", "layer_repeats"), "model.num_repeats"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "model.remat"),
    **dict.fromkeys(("attn_implementation", "flash_attention"), "model.attention"),
}
# For each word, the flags that it can mean. The answer names the first flag that the command has.
_FLAGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("out", "out_dir", "output_dir", "save_dir"), ("workdir", "output")),
    **dict.fromkeys(
        ("model", "model_path", "ckpt", "model_name_or_path"), ("checkpoint", "source")
    ),
    **dict.fromkeys(("input", "in", "data", "dataset", "files"), ("source", "data")),
    **dict.fromkeys(("max_tokens", "max_length", "n_predict"), ("max_new_tokens",)),
    "temp": ("temperature",),
    **dict.fromkeys(("file", "text", "text_file"), ("perplexity", "prompt_file")),
    "type": ("dtype", "format"),
}


def field_hint(name: str, known: Collection[str]) -> str:
    """Returns a sentence that suggests one of `known` for the unknown field `name`, or ""."""
    return translated(name, known) or near_miss(name, known)


def translated(name: str, known: Collection[str], *, prefix: str = "") -> str:
    """Returns a sentence that suggests one of `known` for the word of another tool, or "".

    Args:
      name: the word, with or without a group. It may be one of our fields in another group.
      known: our dotted fields.
      prefix: text before each field in the sentence, such as "--config.".
    """
    word = _word(name)
    if answer := _FIELDS.get(word):
        return f" This program calls it {re.sub(r'[a-z]+[.]', lambda m: prefix + m[0], answer)}."
    same = [f"{prefix}{field}" for field in known if word == field.rpartition(".")[2]]
    return f" Did you mean {' or '.join(same)}?" if same else ""


def flag_hint(name: str, flags: Collection[str]) -> str:
    """Returns a sentence that suggests one of `flags` for the unknown flag `name`, or ""."""
    own = [flag for flag in _FLAGS.get(_word(name), ()) if flag in flags]
    return f" This command calls it --{own[0]}." if own else ""


def _word(name: str) -> str:
    return name.rpartition(".")[2].replace("-", "_").lower()
