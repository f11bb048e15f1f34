import pytest

from mobilellm_jax.evaluate.triviaqa import f1, process_results


@pytest.mark.parametrize(
    ("answer", "alias", "expected"),
    [
        ("Paris", "paris", 1.0),
        ("the city of Paris", "Paris", 0.5),  # P 1/3, R 1
        ("Sunset Boulevard", "Sunset Blvd", 0.5),
        ("New York, New York", "New York", 2 / 3),  # repeated tokens count: P 2/4, R 1
        ("New York, New York", "New York New York", 1.0),
        ("The Jackson 5", "Jackson-5", 1.0),
        ("spider_man", "Spider-Man", 1.0),
        ("rock \u2018n\u2019 roll", "rock 'n' roll", 1.0),
        ("Andes", "a", 0.0),
        ("London", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("the", "A", 1.0),
        ("anthem", "them", 0.0),  # an article is a whole word
    ],
)
def test_f1(answer: str, alias: str, expected: float) -> None:
    assert f1(answer, alias) == pytest.approx(expected)
    assert f1(alias, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "exact", "best"),
    [
        ("AB", 1.0, 0.0),  # the harness deletes punctuation
        ("A-B", 1.0, 1.0),
        ("a b", 0.0, 1.0),  # TriviaQA turns punctuation into a space and drops the article "a"
        ("the Beatles", 0.0, 1.0),  # the harness keeps articles
        ("Beatles", 1.0, 1.0),
        ("John Beatles", 0.0, 2 / 3),
    ],
)
def test_both_metrics_over_the_best_alias(answer: str, exact: float, best: float) -> None:
    doc = {"question": "?", "answer": {"value": "x", "aliases": ["A-B", "Beatles"]}}
    found = process_results(doc, [answer])
    assert found["exact_match"] == exact
    assert found["f1"] == pytest.approx(best)
