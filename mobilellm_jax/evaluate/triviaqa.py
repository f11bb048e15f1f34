"""Scores a TriviaQA answer with the paper's metric, F1, and the harness' exact match.

F1 = 2 P R / (P + R). P is the share of the answer's tokens that the alias (an accepted answer) also
has. R is the share of the alias' tokens that the answer also has. A token that occurs twice counts
twice. Before the comparison, both texts are normalised as in TriviaQA (Joshi et al. 2017,
arXiv:1705.03551): they are lower-cased, punctuation becomes spaces, and articles are removed. The
answer gets its highest F1 over all aliases. The paper (Liu et al. 2024, arXiv:2402.14905, Table 4)
names its metric F1, but does not define it.
"""

import collections
import string
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = string.punctuation + "\u2018\u2019\u00b4`"  # As in TriviaQA's own script.
_TO_SPACES = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_DELETED = str.maketrans("", "", string.punctuation)


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of one question; lm-evaluation-harness calls this function.

    `doc` is a row of TriviaQA's `rc.nocontext`. `results` holds the model's answer up to the first
    stop string, without spaces at its ends.
    """
    [answer] = results
    aliases = doc["answer"]["aliases"]
    return {
        "exact_match": float(any(_harness_form(answer) == _harness_form(a) for a in aliases)),
        "f1": max(f1(answer, alias) for alias in aliases),
    }


def f1(answer: str, alias: str) -> float:
    """Returns the F1 of two texts over their tokens; it is 1 if neither text has tokens."""
    ours, theirs = _tokens(answer), _tokens(alias)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _tokens(text: str) -> list[str]:
    return [word for word in text.lower().translate(_TO_SPACES).split() if word not in _ARTICLES]


def _harness_form(text: str) -> str:
    """Normalises a text as the harness does, which keeps articles, spaces and curly quotes."""
    return text.lower().translate(_DELETED)
