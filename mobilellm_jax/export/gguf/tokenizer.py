"""Describes the run's tokenizer for a GGUF file, so that llama.cpp computes the same ids.

llama.cpp has its own tokenizers. Two of them can give exactly the ids of our tokenizers: `llama`
merges the adjacent pieces with the best score, as SentencePiece does. `gpt2` is byte-level BPE, and
splits text into words by one of a fixed list of rules. The writer refuses a tokenizer that neither
of the two can reproduce.

One difference remains: llama.cpp treats the character U+2581 in a text as a space.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from gguf import TokenType
from sentencepiece import sentencepiece_model_pb2

from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import SENTENCEPIECE, SPACE_MARK, Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.huggingface.tokenizer_files import PROBES, inexpressible
from mobilellm_jax.storage import rundir, strict_json

_proto: Any = sentencepiece_model_pb2  # The library creates its classes at run time.
_REMEDY = (
    "Train the model with a tokenizer from `prepare --vocab_size=N`, or use another format for "
    "devices, which carries the tokenizer's own file."
)

# Maps llama.cpp's name of a rule for splitting text to the same rule in a tokenizer.json.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
WORDS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "use_regex": True},
    ],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}"}},
        {"type": "ByteLevel", "use_regex": False},
    ],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": f"{_CONTRACTIONS}\\p{{N}}{_REST}"}},
        {"type": "ByteLevel", "use_regex": False},
    ],
}
WHOLE_WORDS = ("llama-bpe",)  # With these rules, no merges are applied to a word that is a token.


class Vocabulary(NamedTuple):
    """The description of a tokenizer in a GGUF file."""

    model: str  # llama.cpp's name of the algorithm: llama or gpt2.
    pre: str  # llama.cpp's name of the rule that splits text into words.
    tokens: list[str]
    types: list[TokenType]
    scores: list[float]  # Empty for gpt2.
    merges: list[str]  # Empty for llama.
    space_prefix: bool


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Returns the description of a tokenizer, padded with unused tokens to `vocab_size` tokens."""
    tokenizer = _sentencepiece_beside(tokenizer) or tokenizer
    expressed = _sentencepiece if tokenizer.kind == SENTENCEPIECE else _byte_level
    vocabulary = expressed(tokenizer)
    before = tokenizer.convention.before
    if before not in ((), (tokenizer.bos_id,)):
        problem = f"It puts the tokens {list(before)} before a text, and llama.cpp only BOS."
        raise refused(tokenizer, [problem])
    tokens, types = vocabulary.tokens, vocabulary.types
    for token in range(len(tokens), vocab_size):
        tokens.append(f"[PAD{token}]")
        types.append(TokenType.UNUSED)
        if vocabulary.scores:
            vocabulary.scores.append(0.0)
    if len(set(tokens)) < len(tokens):
        [(twice, _)] = collections.Counter(tokens).most_common(1)
        raise refused(tokenizer, [f"It would have the token {twice!r} twice."])
    if cut := next((text for text in tokens if "\0" in text), None):
        raise refused(tokenizer, [f"llama.cpp would cut its token {cut!r} at the zero."])
    return vocabulary


def _sentencepiece_beside(tokenizer: Tokenizer) -> Tokenizer | None:
    """Returns the SentencePiece model beside a tokenizer.json that gives the same ids, or None."""
    file = tokenizer.file.with_name(rundir.SENTENCEPIECE_MODEL)
    if tokenizer.kind == SENTENCEPIECE or not file.is_file():
        return None
    try:
        other = load_tokenizer(file)
        texts = (*PROBES, *(piece.replace(SPACE_MARK, " ") for piece in other.pieces))
        equal = other.pieces == tokenizer.pieces and all(
            SPACE_MARK in text or other.encode(text) == tokenizer.encode(text) for text in texts
        )
    except UserError:
        return None  # It is a file of tiktoken, or lacks byte fallback.
    return other if equal else None


def _sentencepiece(tokenizer: Tokenizer) -> Vocabulary:
    model = _proto.ModelProto()
    model.ParseFromString(tokenizer.file.read_bytes())
    problems = inexpressible(model)
    if not tokenizer.byte_ids:
        problems.append("Its byte_fallback must be true.")
    if model.normalizer_spec.remove_extra_whitespaces:
        problems.append("Its remove_extra_whitespaces must be false.")
    if problems:
        raise refused(tokenizer, problems)
    kinds = {
        model.SentencePiece.NORMAL: TokenType.NORMAL,
        model.SentencePiece.UNKNOWN: TokenType.UNKNOWN,
        model.SentencePiece.CONTROL: TokenType.CONTROL,
        model.SentencePiece.BYTE: TokenType.BYTE,
    }
    types = [kinds[piece.type] for piece in model.pieces]
    pieces = {piece.piece for piece in model.pieces}
    tokens = []
    for piece, kind in zip(model.pieces, types, strict=True):
        text = piece.piece
        # SentencePiece merges pieces only into normal tokens; llama.cpp uses tokens of every kind.
        if kind is TokenType.BYTE and _reached(text, pieces):
            raise refused(tokenizer, [f"Its pieces would merge to {text}, the name of a byte."])
        while kind is not TokenType.NORMAL and _reached(text, pieces):
            text = f"<{text}>"
        tokens.append(text)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=[piece.score for piece in model.pieces],
        merges=[],
        space_prefix=model.normalizer_spec.add_dummy_prefix,
    )


def _reached(text: str, pieces: set[str]) -> bool:
    """Returns whether a merge can give `text`: it is one character, or two pieces or characters."""

    def whole(part: str) -> bool:
        return len(part) == 1 or part in pieces

    cuts = range(1, len(text))
    return len(text) == 1 or any(whole(text[:cut]) and whole(text[cut:]) for cut in cuts)


def _byte_level(tokenizer: Tokenizer) -> Vocabulary:
    content = strict_json.read(tokenizer.file)
    library = tokenizers.Tokenizer.from_file(str(tokenizer.file))  # Also checks the file's types.
    added = library.get_added_tokens_decoder()
    outer = content.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    rule = _splitting_rule(steps)
    problems = [*_differences(content, steps, rule), *_odd_tokens(added)]
    if rule is None or problems:
        raise refused(tokenizer, problems)
    known = {
        token: (text, TokenType.NORMAL)
        for text, token in library.get_vocab(with_added_tokens=False).items()
    }
    for token, each in added.items():
        kind = TokenType.CONTROL if each.special else TokenType.USER_DEFINED
        known[token] = (each.content, kind)
    everything = [
        known.get(token, (f"[PAD{token}]", TokenType.UNUSED))
        for token in range(tokenizer.vocab_size)
    ]
    merges = content["model"]["merges"]
    return Vocabulary(
        model="gpt2",
        pre=rule,
        tokens=[text for text, _ in everything],
        types=[kind for _, kind in everything],
        scores=[],
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        space_prefix=False,
    )


def _splitting_rule(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns llama.cpp's name of the rule that splits text as `steps` do, or None."""
    for name, wanted in WORDS.items():
        if len(steps) == len(wanted) and all(
            given.get(key, True) == value  # The default of use_regex is true.
            for given, step in zip(steps, wanted, strict=True)
            for key, value in step.items()
        ):
            plain = (step for step in steps if step["type"] == "Split")
            if all(s.get("behavior") == "Isolated" and not s.get("invert") for s in plain):
                return name
    return None


def _differences(
    content: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], rule: str | None
) -> Iterator[str]:
    """Yields a sentence for each setting that llama.cpp's `gpt2` tokenizer lacks."""
    model = content["model"]
    if model.get("type") != "BPE":
        yield f"Its model.type={strict_json.shown(model.get('type'))} must be BPE."
    if rule is None:
        yield (
            "Its pre_tokenizer must be byte-level, and divide words as GPT-2, Llama 3, Qwen 2 or "
            "SmolLM do."
        )
    if content.get("normalizer") is not None:
        yield "It must have no normalizer."
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        yield "Its add_prefix_space must be false."
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            yield f"Its model.{key}={strict_json.shown(model[key])} must not be set."
    whole = rule in WHOLE_WORDS
    if rule is not None and bool(model.get("ignore_merges")) != whole:
        yield f"Its model.ignore_merges must be {str(whole).lower()}, as {rule}'s is."


def _odd_tokens(added: Mapping[int, tokenizers.AddedToken]) -> Iterator[str]:
    for token in added.values():
        flags = [key for key in ("single_word", "lstrip", "rstrip") if getattr(token, key)]
        if flags and not token.special:
            yield f"Its token {strict_json.shown(token.content)} must not be {flags[0]}."


def refused(tokenizer: Tokenizer, problems: Sequence[str]) -> UserError:
    """Returns the error that lists why llama.cpp cannot reproduce a tokenizer."""
    return UserError(
        f"{tokenizer.file} cannot be written into a GGUF file: {' '.join(problems)} {_REMEDY}"
    )
