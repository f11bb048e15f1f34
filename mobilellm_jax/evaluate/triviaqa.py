"""Scores of a TriviaQA answer: the paper's F1 beside lm-evaluation-harness' exact match.

F1 = 2 P R / (P + R), with P and R the shares of the answer's and of the alias' tokens that the two
have in common, counted with repeats, after TriviaQA's own normalisation (Joshi et al. 2017,
arXiv:1705.03551): lower case, punctuation to spaces, no articles. The best alias counts. The paper
names the metric and nothing else (Liu et al. 2024, arXiv:2402.14905, Table 4).
"""

import collections
import string
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = string.punctuation + "\u2018\u2019\u00b4`"  # and the quotes that people type
_TO_SPACES = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_DELETED = str.maketrans("", "", string.punctuation)


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of one question, as lm-evaluation-harness asks for them.

    Args:
      doc: a row in the layout of `rc.nocontext`.
      results: the model's answer, up to the first stop string and without outer blanks.
    """
    [answer] = results
    aliases = doc["answer"]["aliases"]
    return {
        "exact_match": float(any(_harness_form(answer) == _harness_form(a) for a in aliases)),
        "f1": max(f1(answer, alias) for alias in aliases),
    }


def f1(answer: str, alias: str) -> float:
    """Returns the F1 of the tokens of two texts; of two texts without tokens, 1."""
    ours, theirs = _tokens(answer), _tokens(alias)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _tokens(text: str) -> list[str]:
    return [word for word in text.lower().translate(_TO_SPACES).split() if word not in _ARTICLES]


def _harness_form(text: str) -> str:
    """What the harness compares: articles and inner blanks stay, other quotes stay."""
    return text.lower().translate(_DELETED)
