"""Writes tokenizer files with which transformers gives the token ids of the run, BOS included.

With only a SentencePiece `tokenizer.model`, transformers gives other ids: it adds no BOS, or drops
a leading space. This module therefore also writes the SentencePiece model as a `tokenizer.json`. It
compares the ids of both on probe texts and on every piece of the vocabulary, and a difference is an
error.

SentencePiece first merges the adjacent pieces that form the piece with the best score. `tokenizers`
first merges the pair of pieces with the lowest rank. If two pieces join to a third piece, this
module ranks the pair by the third piece's score. Both then give equal ids.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

from mobilellm_jax.data.tokenizers.huggingface import around_texts
from mobilellm_jax.data.tokenizers.opening import copy_files
from mobilellm_jax.data.tokenizers.tokenizer import SPACE_MARK, TOKENIZER_CONFIG, Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import rundir, strict_json

_ALL = 1_000_000
_proto: Any = sentencepiece_model_pb2  # The library creates its classes at run time.
_Piece = _proto.ModelProto.SentencePiece
_REMEDY = (
    "Train the model with a tokenizer from `prepare --vocab_size=N`, or give `prepare` a "
    "tokenizer.json, which is exported as it is."
)

PROBES = (
    *("", " ", "  ", "a", " a", "  a", "a ", "a  ", "a b", "a  b", "a   b    c", "\n", "\n\n"),
    *(" \n ", "a\nb", "a\r\nb", "\t", "\ta\t\tb", "    return x\n", "\x00", "a\x00b", "\x01\x7f"),
    *("\ufeffa", "\u00a0a\u00a0", "\u200b", "\u2028", "\u2581", "a\u2581b", "\U0010ffff"),
    *("<s>", "a<s>b", "</s>", "<unk>", "<s> </s>", "<0x0A>", "Straße", "e\u0301", "日本語"),
    *("مرحبا", "नमस्ते", "\uff21 \ufb01 \u2460", "🙂", "🙂🙂 a", "👩\u200d👧 a", "123 4567"),
    *("(x[0] += 1.5e-3);", "aaaaaaaaaaaaaaa", "abababababab", "------====____", "THE the The"),
    *("don't", "https://a.b/c?d=e&f"),
)


def write_tokenizer_files(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Writes the files that `AutoTokenizer.from_pretrained(directory)` reads.

    The files of the run's tokenizer are copied. If tokenizer.json would not put the tokens around a
    text that the model was trained with, it gets another post-processor. A new
    tokenizer_config.json contains `max_length`. `convert_sentencepiece` may raise its errors.
    """
    copy = copy_files(tokenizer, directory)
    file = directory / TOKENIZER_CONFIG
    given = strict_json.read(file) if file.is_file() else {}
    if copy.name == rundir.SENTENCEPIECE_MODEL:
        fast = convert_sentencepiece(tokenizer.file)
        _put_around_texts(fast, tokenizer)
        rundir.write_whole(directory / rundir.TOKENIZER_JSON, fast.to_str(pretty=True))
    else:
        fast = tokenizers.Tokenizer.from_file(str(copy))
        wanted = tokenizer.convention
        found = around_texts(fast)
        if (found.before, found.after) != (wanted.before, wanted.after):
            _put_around_texts(fast, tokenizer)
            rundir.write_whole(copy, fast.to_str(pretty=True))
        if given:
            return
    config: dict[str, Any] = {
        # With a class such as LlamaTokenizer, transformers would not use tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": fast.id_to_token(tokenizer.eos_id),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # A literal "<s>" in a text is not the BOS token.
        "split_special_tokens": True,
    }
    if tokenizer.has_bos:
        config["bos_token"] = fast.id_to_token(tokenizer.bos_id)
    unknown = getattr(fast.model, "unk_token", None)
    if unknown is not None:
        config["unk_token"] = unknown
    rundir.write_whole(file, json.dumps(given | config, indent=2) + "\n")


def _put_around_texts(fast: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Makes the library put the tokens around a text that the tokenizer's convention names."""
    convention = tokenizer.convention
    names = {token: str(fast.id_to_token(token)) for token in convention.before + convention.after}

    def around(sequence: str, number: int) -> list[str]:
        outer = ([names[token] for token in ids] for ids in (convention.before, convention.after))
        before, after = outer
        return [f"{name}:{number}" for name in (*before, sequence, *after)]

    template: Any = processors.TemplateProcessing
    fast.post_processor = template(
        single=around("$A", 0),
        pair=[*around("$A", 0), *around("$B", 1)],
        special_tokens=[(name, token) for token, name in names.items()],
    )


def convert_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """Converts the SentencePiece BPE model `file` into a tokenizer of the `tokenizers` library.

    Raises:
      UserError: if the library would give other ids; the message names the difference.
    """
    proto = _proto.ModelProto()
    proto.ParseFromString(file.read_bytes())
    problems = inexpressible(proto)
    if problems:
        raise UserError(
            f"{file} cannot be written as tokenizer.json: {' '.join(problems)} {_REMEDY}"
        )
    pieces = [piece.piece for piece in proto.pieces]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    unknown = next((p.piece for p in proto.pieces if p.type == _Piece.UNKNOWN), None)
    fast = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=_merges(proto),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    steps: list[Any] = []
    if normalizer.remove_extra_whitespaces:
        # These steps come before spaces become U+2581, because a text may contain U+2581 itself.
        steps.append(normalizers.Replace(Regex("^ +|(?<= ) +"), ""))
        steps.append(normalizers.Replace(Regex(f"[ {SPACE_MARK}]+$"), ""))
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    fast.normalizer = normalizers.Sequence(steps)
    leading = _ALL if normalizer.remove_extra_whitespaces else int(normalizer.add_dummy_prefix)
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", leading, 0),
        ]
    )
    special = [p.piece for p in proto.pieces if p.type in (_Piece.UNKNOWN, _Piece.CONTROL)]
    fast.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    _compare(file, fast)
    return fast


def inexpressible(proto: Any) -> list[str]:
    """Returns a sentence for each setting that the `tokenizers` library cannot reproduce."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problems = []
    if trainer.model_type != _proto.TrainerSpec.BPE:
        kind = _proto.TrainerSpec.ModelType.Name(trainer.model_type).lower()
        problems.append(f"Its model_type={kind} must be bpe.")
    if normalizer.precompiled_charsmap:
        problems.append(f"Its normalisation {normalizer.name!r} must be identity.")
    if not normalizer.escape_whitespaces:
        problems.append("Its escape_whitespaces must be true.")
    if trainer.treat_whitespace_as_suffix:
        problems.append("Its treat_whitespace_as_suffix must be false.")
    for kind, name in ((_Piece.USER_DEFINED, "user-defined"), (_Piece.UNUSED, "unused")):
        found = [piece.piece for piece in proto.pieces if piece.type == kind]
        if found:
            problems.append(f"It has {len(found)} {name} pieces such as {found[0]!r}.")
    normal = [p.piece for p in proto.pieces if p.type == _Piece.NORMAL]
    lone = set("".join(normal)).difference(normal)
    if lone:
        problems.append(f"{min(lone)!r} occurs in its pieces but is not a piece itself.")
    return problems


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Returns all pairs of pieces that form a piece, in the order of their ranks.

    Pairs that form the same piece have the same score. Among equal scores, SentencePiece merges the
    leftmost pair in the text, but `tokenizers` needs a fixed order. Here the pair with the longest
    left part comes first. For 600 random vocabularies with 200 texts each, both gave the same ids.
    """
    normal = {p.piece: p.score for p in proto.pieces if p.type == _Piece.NORMAL}
    ordered = sorted(normal, key=lambda piece: -normal[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ordered
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _compare(file: Path, fast: tokenizers.Tokenizer) -> None:
    model: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
    surfaces = [
        model.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(model.get_piece_size())
    ]
    texts = [*PROBES, *surfaces]
    fast.encode_special_tokens = True
    expected: Sequence[Sequence[int]] = model.encode(texts)
    found = [encoding.ids for encoding in fast.encode_batch(texts)]
    for text, ids, fast_ids in zip(texts, expected, found, strict=True):
        if ids != fast_ids:
            raise UserError(
                f"{file} cannot be written as tokenizer.json: {text!r} is {list(ids)} in "
                f"SentencePiece, but would be {fast_ids}. {_REMEDY}"
            )
    fast.encode_special_tokens = False
