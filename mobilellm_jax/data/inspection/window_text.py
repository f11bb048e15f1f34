"""Shows training windows as text: the decoded inputs, with the borders of documents.

The text is escaped for a terminal, so that no character moves the cursor or reverses the text.
"""

import dataclasses
import itertools
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, common_prefix, document_start
from mobilellm_jax.data.windows import Batch

LEGEND = (
    "⟨BOS⟩ and ⟨EOS⟩ are tokens, tokens in ⟦ ⟧ are not targets; \\n, \\\\ and the like are escapes."
)

_OUR_MARKS = "⟨⟩⟦⟧"
_INDENT = "  "
_NEWLINE = r"\n"
# A tokenizer drops a space at the start of what it decodes. So if a document begins before the
# window, the tokens of this word are put in front of the document's tokens.
_CONTEXT = "a"


def window_lines(
    mixture: Mixture,
    tokenizer: Tokenizer,
    data: DataConfig,
    count: int,
    columns: int,
    first_sample: int = 0,
) -> Iterator[str]:
    """Yields lines that show `count` windows that training with `data.seed` reads.

    The windows are the global samples from `first_sample` on. Training step s reads
    `train.global_batch` samples, from sample (s - 1) * `train.global_batch` on.

    Before each document, a line shows the positions of its tokens. Under `document_mask`, positions
    count from 0 in each document. The lines do not show whether the first token of a window is a
    target.
    """
    batch = _windows(mixture, data, first_sample, count)
    # Only `document_mask` gives segments. They separate the documents here, even if training does
    # not use them.
    apart = dataclasses.replace(data, boundaries="document_mask")
    masked = _windows(mixture, apart, first_sample, count)
    component_B, _ = mixture.place(first_sample + np.arange(count), data.seed)
    for row, component in enumerate(component_B.tolist()):
        name = "".join(escaped(mixture.components[component].name))
        inputs = int(np.count_nonzero(masked["segments"][row]))
        targets = int(np.count_nonzero(batch["weights"][row]))
        sample = f" (sample {first_sample + row})" if first_sample else ""
        yield (
            f"Window {row + 1} of {count}{sample}, {name}: {inputs:,} tokens, {targets:,} targets"
        )
        for start, stop in _documents(masked["segments"][row]):
            tokens = batch["tokens"][row, start:stop].tolist()
            first = start if data.boundaries == "concat" else 0
            yield _heading(tokens, first, tokenizer, columns)
            is_target = np.concatenate([[True], batch["weights"][row] > 0])[start:stop]
            for line in wrapped(_shown(tokens, is_target, tokenizer), columns - len(_INDENT)):
                yield _INDENT + line
        if inputs < data.seq_len:
            yield f"-- padding: {data.seq_len - inputs:,} positions".ljust(columns, "-")
        yield ""


def _windows(mixture: Mixture, data: DataConfig, first_sample: int, count: int) -> Batch:
    return next(
        train_batches(mixture, data, global_batch=count, first_sample=first_sample, num_batches=1)
    )


def _documents(segments_T: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Yields the start and the end of each document in a window."""
    borders = np.flatnonzero(np.diff(segments_T, prepend=0, append=0)).tolist()
    return itertools.pairwise(borders)


def _heading(tokens: list[int], first: int, tokenizer: Tokenizer, columns: int) -> str:
    positions = f"-- positions {first:,} to {first + len(tokens) - 1:,}"
    start = document_start(tokenizer)  # If it is empty, no token tells where a document begins.
    begun = "" if tokens[0] in start or not start else ", begun before"
    ends = "" if tokens[-1] == tokenizer.eos_id else ", to be continued"
    return f"{positions}{begun}{ends} ".ljust(columns, "-")


def _shown(tokens: list[int], is_target: NDArray[np.bool_], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of a document in a window, in pieces that must each stay on one line."""
    special = {tokenizer.bos_id: "⟨BOS⟩", tokenizer.eos_id: "⟨EOS⟩"}
    context = [] if tokens[0] in special else tokenizer.encode(_CONTEXT)
    text = tokenizer.decode(context)
    at = 0
    for target, run in itertools.groupby(is_target.tolist()):
        stop = at + len(list(run))
        yield from [] if target else "⟦"
        while at < stop:
            if tokens[at] in special:
                yield special[tokens[at]]
                at += 1
                continue
            end = next((i for i in range(at, stop) if tokens[i] in special), stop)
            # The preceding tokens are decoded too, because the text of a token depends on them.
            longer = tokenizer.decode([*context, *tokens[:end]])
            yield from escaped(longer[common_prefix(text, longer) :], _OUR_MARKS)
            text, at = longer, end
        yield from [] if target else "⟧"


def escaped(text: str, also: str = "") -> Iterator[str]:
    r"""Yields the characters of `text`, and escapes some of them as Python does: \n, \x1b, \u202e.

    The function escapes control and format characters, separators except the space, unassigned
    characters, the backslash, and the characters of `also`.
    """
    for character in text:
        if character == "\\" or character in also or not character.isprintable():
            yield character.encode("unicode_escape").decode("ascii")
        else:
            yield character


def wrapped(parts: Iterable[str], columns: int) -> Iterator[str]:
    """Joins parts into lines of at most `columns` columns; an escaped newline also ends a line."""
    line, width = "", 0
    for part in parts:
        added = sum(map(_columns, part))
        if line and width + added > columns:
            yield line
            line, width = "", 0
        line, width = line + part, width + added
        if part == _NEWLINE:
            yield line
            line, width = "", 0
    if line:
        yield line


def _columns(character: str) -> int:
    """Returns how many terminal columns a character takes; an upper bound for joined emoji."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
