"""The files of a tokenizer, and what they say about its tokens and its texts.

A tokenizer is a folder: beside `tokenizer.json` or `tokenizer.model`, other files name the tokens
with a role (BOS, EOS) and hold the chat template. These files belong together, and they are copied
together.

Tokenizers differ in what they put before a text. The post-processor of a tokenizer.json decides
this, as in transformers; for a SentencePiece model, `add_bos_token` does, and BOS is the default.
Our own folders record the decision in `tokenizer_convention.json`. Folders that older versions of
this program wrote have no such file, and their texts begin with BOS. The same applies to a bare
tokenizer.json that decides nothing: a model made with it is made here.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm_jax.data.tokenizers.tokenizer import TOKENIZER_CONFIG, Convention
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import file_kind, rundir, sealing, strict_json

CONVENTION = "tokenizer_convention.json"
GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
COMPANIONS = (
    *(TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS, CHAT_TEMPLATE, "chat_template.json"),
    GENERATION_CONFIG,
)
"""The files that belong to the tokenizer in their folder."""

_VERSION = 1
_MODEL_CONFIG = "config.json"  # A Hugging Face directory has this file.


class Folder:
    """The companions of a tokenizer's file; `ours` says that this program wrote the folder."""

    def __init__(self, file: Path, *, ours: bool = False) -> None:
        self.path = file.parent
        self.ours = ours or _is_ours(self.path)
        self.facts = self._read(TOKENIZER_CONFIG)
        self._special = self._read(SPECIAL_TOKENS_MAP)
        self._generation = self._read(GENERATION_CONFIG)
        # The config.json of a run is not the config of a Hugging Face model.
        self._model = {} if self.ours else self._read(_MODEL_CONFIG)

    @property
    def decides(self) -> bool:
        """Whether transformers would open this folder, so that its files decide everything."""
        there = (TOKENIZER_CONFIG, _MODEL_CONFIG)
        return not self.ours and any(file_kind.is_there(self.path / name) for name in there)

    def token(self, role: str) -> str:
        """Returns the text of the token with a role, such as `eos_token`; "" if none is named."""
        for name, holder in ((TOKENIZER_CONFIG, self.facts), (SPECIAL_TOKENS_MAP, self._special)):
            try:
                if role in holder:
                    return _text(holder, role)
            except strict_json.JsonError as error:
                raise UserError(f"{self.path / name}: {error}") from error
        return ""

    def names_no(self, role: str) -> bool:
        """Returns whether the folder says that no token has this role (null or an empty text)."""
        return (role in self.facts or role in self._special) and not self.token(role)

    def stated_ids(self, role: str) -> tuple[int, ...]:
        """Returns the ids that generation_config.json or config.json gives to a role."""
        for holder in (self._generation, self._model):
            value = holder.get(role)
            ids = value if isinstance(value, list) else [value]
            if value is not None and all(type(each) is int and each >= 0 for each in ids):
                return tuple(dict.fromkeys(ids))
        return ()

    def added_tokens(self) -> dict[int, Mapping[str, Any]]:
        """Returns the tokens that only added_tokens_decoder or added_tokens.json may add, by id."""
        found: dict[int, Mapping[str, Any]] = {}
        try:
            texts = strict_json.as_type(self._read(ADDED_TOKENS), dict[str, int], ADDED_TOKENS)
            found = {token: {"content": text, "special": False} for text, token in texts.items()}
            decoder = strict_json.get(self.facts, "added_tokens_decoder", dict[str, Any], {})
            for token, fields in decoder.items():
                if not token.isdecimal():
                    raise strict_json.JsonError(
                        f"added_tokens_decoder has the key {strict_json.shown(token)}, which is "
                        "no token id."
                    )
                strict_json.get(fields, "content", str, name=f"added_tokens_decoder.{token}")
                found[int(token)] = fields
        except strict_json.JsonError as error:
            raise UserError(f"{self.path / TOKENIZER_CONFIG}: {error}") from error
        return dict(sorted(found.items()))

    def convention(self, eos_id: int, stated: Convention, default: Convention) -> Convention:
        """Returns the recorded convention of our folders, and `stated` for other folders.

        `default` applies to our folders without a record, and to a file that states nothing.
        """
        record = self.path / CONVENTION
        if file_kind.is_there(record):
            return _recorded(record)
        ends = self.stated_ids("eos_token_id") or (eos_id,)
        if self.ours:
            return dataclasses.replace(default, end_ids=tuple({*default.end_ids, *ends}))
        silent = not self.decides and not stated.before and not stated.after
        return dataclasses.replace(default if silent else stated, end_ids=ends)

    def chat_template(self) -> Any:
        """Returns the chat template as the folder states it, or None."""
        file = self.path / CHAT_TEMPLATE
        if file_kind.is_there(file):
            return file.read_text("utf-8", errors="replace")
        return self.facts.get("chat_template")

    def _read(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file_kind.is_there(file):
            return {}
        found: dict[str, Any] = strict_json.as_type(
            strict_json.read(file), dict[str, Any], str(file)
        )
        return found


def write_convention(folder: Path, convention: Convention) -> None:
    """Records the convention in a folder of this program."""
    values = {"version": _VERSION, **dataclasses.asdict(convention)}
    rundir.write_whole(folder / CONVENTION, json.dumps(values, indent=2) + "\n")


def identity(file_sha256: str, facts: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a tokenizer: of its file, and of the facts that its folder states.

    If the folder states no more than the file, this is the SHA-256 of the file.
    """
    if facts == default:
        return file_sha256
    content = json.dumps([file_sha256, facts], sort_keys=True, default=list)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _recorded(file: Path) -> Convention:
    values = strict_json.read(file)
    try:
        version = strict_json.get(values, "version", int)
        if version != _VERSION:
            raise strict_json.JsonError(
                f"has version {version}, and this program reads {_VERSION}; use the release that "
                "wrote it."
            )
        fields = {name: value for name, value in values.items() if name != "version"}
        found: Convention = strict_json.as_type(fields, Convention)
    except strict_json.JsonError as error:
        raise UserError(f"{file}: {error}") from error
    return found


def _is_ours(folder: Path) -> bool:
    """Returns whether this program wrote a folder: token shards, an export, a run or its step."""
    if (folder / CONVENTION).is_file():
        return True
    if (folder / rundir.CONFIG).is_file():
        return rundir.is_run(folder)
    of_step = folder.name == "tokenizer" and (folder.parent / sealing.MANIFEST).is_file()
    return of_step or (folder / sealing.MANIFEST).is_file()


def _text(holder: Mapping[str, Any], key: str) -> str:
    """Returns the text of a token, which `holder` has as a string or as an object."""
    token = holder[key]
    if isinstance(token, dict):
        return str(strict_json.get(token, "content", str, name=key))
    return str(strict_json.get(holder, key, str, ""))
