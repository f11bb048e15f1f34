"""Rebuilds the files of a tokenizer from the metadata of a GGUF file.

`llama` becomes a SentencePiece model, and `gpt2` becomes a tokenizer.json. In both cases,
tokenizer_config.json names the special tokens, says whether BOS and EOS are added to a text, and
keeps the chat template.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf import TokenType
from sentencepiece import sentencepiece_model_pb2

from mobilellm_jax.data.tokenizers.tokenizer import TOKENIZER_CONFIG
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.gguf.container import Container
from mobilellm_jax.export.gguf.tokenizer import WHOLE_WORDS, WORDS
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.storage.strict_json import shown

_proto: Any = sentencepiece_model_pb2  # The library creates its classes at run time.
_PREFIX = "tokenizer.ggml."
# Other names in llama.cpp for rules of `WORDS`.
_ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe"),
    **{"deepseek-r1-qwen": "qwen2", "phi-2": "gpt-2"},
}
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class _Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]  # Values of `TokenType`.
    roles: dict[str, int]  # The id of each role that the file names.
    add_bos: bool
    add_eos: bool

    def of_type(self, kind: TokenType) -> list[int]:
        return [token for token, found in enumerate(self.types) if found == kind]


def write_tokenizer(container: Container, folder: Path, max_length: int) -> None:
    """Writes the tokenizer of a GGUF file into `folder`.

    Raises:
      UserError: if the tokenizer is of another kind, or its description is not whole.
    """
    values = {
        key.removeprefix(_PREFIX): value
        for key, value in container.metadata.items()
        if key.startswith(_PREFIX)
    }
    try:
        model = strict_json.get(values, "model", str)
        if model not in ("llama", "gpt2"):
            raise strict_json.JsonError(f"model={shown(model)} must be llama or gpt2.")
        rule = strict_json.get(values, "pre", str, "default")
        rule = _ALIASES.get(rule, rule)
        # Without these keys, llama.cpp puts BOS before texts for these tokenizers.
        add_bos = model == "llama" or rule == "llama-bpe"
        vocabulary = _vocabulary(values, add_bos=add_bos)
        if model == "llama":
            _write_sentencepiece(values, vocabulary, folder)
        else:
            _write_byte_level(values, vocabulary, rule, folder)
        template = strict_json.get(container.metadata, "tokenizer.chat_template", str, None)
    except strict_json.JsonError as error:
        raise UserError(f"{container.file}: {_PREFIX}{error}") from error
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: vocabulary.tokens[token] for role, token in vocabulary.roles.items()},
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    rundir.write_whole(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2) + "\n")


def _vocabulary(values: Mapping[str, Any], *, add_bos: bool) -> _Vocabulary:
    tokens = strict_json.get(values, "tokens", list[str])
    types = strict_json.get(values, "token_type", list[int], [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise strict_json.JsonError(f"token_type has {len(types)} values, not {len(tokens)}.")
    # The last tokens may only fill up the model's vocabulary.
    while types and types[-1] == TokenType.UNUSED:
        tokens, types = tokens[:-1], types[:-1]
    roles = {}
    for role, key in _ROLES.items():
        token = strict_json.get(values, key, int, None)
        if token is None:
            continue
        if not 0 <= token < len(tokens):
            raise strict_json.JsonError(f"{key}={token} must be less than {len(tokens)}.")
        roles[role] = token
    return _Vocabulary(
        tokens,
        types,
        roles,
        strict_json.get(values, "add_bos_token", bool, add_bos) and "bos_token" in roles,
        strict_json.get(values, "add_eos_token", bool, False) and "eos_token" in roles,
    )


def _write_sentencepiece(values: Mapping[str, Any], vocabulary: _Vocabulary, folder: Path) -> None:
    tokens = vocabulary.tokens
    scores = strict_json.get(values, "scores", list[float])
    if len(scores) < len(tokens):
        raise strict_json.JsonError(f"scores has {len(scores)} values, not {len(tokens)}.")
    model = _proto.ModelProto()
    # The numbers of SentencePiece's types equal those of llama.cpp.
    for text, score, kind in zip(tokens, scores, vocabulary.types, strict=False):
        try:
            model.pieces.add(piece=text, score=score, type=kind)
        except ValueError as error:
            raise strict_json.JsonError(f"token_type holds {kind}, which no piece has.") from error
    unknown = vocabulary.of_type(TokenType.UNKNOWN)
    ids = vocabulary.roles | ({"unk_token": unknown[0]} if unknown else {})
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = _proto.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = bool(vocabulary.of_type(TokenType.BYTE))
    for name, role in (("unk", "unk_token"), ("bos", "bos_token"), ("eos", "eos_token")):
        token = ids.get(role, -1)
        setattr(trainer, f"{name}_id", token)
        if token >= 0:
            setattr(trainer, f"{name}_piece", tokens[token])
    trainer.pad_id = -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = strict_json.get(values, "add_space_prefix", bool, True)
    extra = strict_json.get(values, "remove_extra_whitespaces", bool, False)
    normalizer.remove_extra_whitespaces = extra
    normalizer.escape_whitespaces = True
    rundir.write_whole(folder / rundir.SENTENCEPIECE_MODEL, model.SerializeToString())


def _write_byte_level(
    values: Mapping[str, Any], vocabulary: _Vocabulary, rule: str, folder: Path
) -> None:
    if rule not in WORDS:
        raise strict_json.JsonError(
            f"pre={shown(rule)} divides texts into words by a rule that is not known here, only "
            f"{', '.join(WORDS)}."
        )
    steps = [_complete(step) for step in WORDS[rule]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(vocabulary.tokens[token], token, special=kind != TokenType.USER_DEFINED)
            for token, kind in enumerate(vocabulary.types)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _around(vocabulary),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule in WHOLE_WORDS,
            "vocab": {text: token for token, text in enumerate(vocabulary.tokens)},
            "merges": strict_json.get(values, "merges", list[str]),
        },
    }
    rundir.write_whole(
        folder / rundir.TOKENIZER_JSON, json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    )


def _complete(step: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a step of a pre-tokenizer with all its fields."""
    if step["type"] == "ByteLevel":
        return {"add_prefix_space": False, "trim_offsets": True, **step}
    return (
        {**step, "behavior": "Isolated", "invert": False} if step["type"] == "Split" else {**step}
    )


def _added(text: str, token: int, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, **flags, "special": special}


def _around(vocabulary: _Vocabulary) -> dict[str, Any] | None:
    """Returns the step that puts BOS before a text and EOS after it, if the file asks for it."""
    before = ["bos_token"] * vocabulary.add_bos
    after = ["eos_token"] * vocabulary.add_eos
    if not before and not after:
        return None
    texts = {role: vocabulary.tokens[vocabulary.roles[role]] for role in (*before, *after)}

    def template(names: Sequence[str]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for number, name in enumerate(names):
            parts += [_special(texts[role], number) for role in before]
            parts.append({"Sequence": {"id": name, "type_id": number}})
            parts += [_special(texts[role], number) for role in after]
        return parts

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("AB"),
        "special_tokens": {
            text: {"id": text, "ids": [vocabulary.roles[role]], "tokens": [text]}
            for role, text in texts.items()
        },
    }


def _special(text: str, number: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": number}}
