"""Scores a TriviaQA answer by the paper's F1 and by lm-evaluation-harness' exact match.

F1 = 2 P R / (P + R). P is the share of the answer's tokens that the alias also has, and R the share
of the alias' tokens that the answer also has; repeated tokens count. Both texts are first
normalised as in TriviaQA (Joshi et al. 2017, arXiv:1705.03551): lower case, spaces for punctuation,
no articles. The alias with the highest score counts. The paper only names the metric (Liu et al.
2024, arXiv:2402.14905, Table 4).
"""

import collections
import string
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = string.punctuation + "\u2018\u2019\u00b4`"  # with the quotes that people type
_TO_SPACES = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_DELETED = str.maketrans("", "", string.punctuation)


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of one question; lm-evaluation-harness calls this function.

    `doc` has the layout of `rc.nocontext`. `results` is the model's answer up to the first stop
    string, without outer blanks.
    """
    [answer] = results
    aliases = doc["answer"]["aliases"]
    return {
        "exact_match": float(any(_harness_form(answer) == _harness_form(a) for a in aliases)),
        "f1": max(f1(answer, alias) for alias in aliases),
    }


def f1(answer: str, alias: str) -> float:
    """Returns the F1 of the tokens of two texts; two texts without tokens score 1."""
    ours, theirs = _tokens(answer), _tokens(alias)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _tokens(text: str) -> list[str]:
    return [word for word in text.lower().translate(_TO_SPACES).split() if word not in _ARTICLES]


def _harness_form(text: str) -> str:
    """Normalises as the harness does: it keeps articles, inner blanks and typed quotes."""
    return text.lower().translate(_DELETED)
