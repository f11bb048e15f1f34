"""Small tokenizers of both kinds, trained where a test needs them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n    It did so 1234 times.\n",
    "Sphinx of black quartz,\tjudge my vow!  Pack my box with five dozen liquor jugs.\n",
    "def encode(text: str) -> list[int]:\n    return [ord(c) for c in text]\n",
] * 3


def train_byte_level(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Trains a GPT-2-like tokenizer.json that has truncation and padding turned on."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    model.enable_truncation(5)
    model.enable_padding(length=50)
    file = folder / "tokenizer.json"
    model.save(str(file))
    return load_tokenizer(file)


def write_folder(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    around: str = "$A",
    special: tuple[str, ...] = ("<s>", "</s>"),
    **companions: Any,
) -> Path:
    """Writes a byte-level tokenizer.json and its companions; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    if around != "$A":
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=around, special_tokens=[(text, i) for i, text in enumerate(special)]
        )
    model.save(str(folder / "tokenizer.json"))
    if config is not None:
        companions["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, content in companions.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
