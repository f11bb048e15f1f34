"""Tests of who owns the folder of a preparation, and when a start continues from its content."""

from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax.data.preparation.working_folder import settings_difference, working_folder

SETTINGS: dict[str, Any] = {"sources": ["text:a"], "weights": None, "on_bad_line": "stop"}
EMPTY = {"job.json", "lock", "workers.lock", "output/sources.json"}


def names(work: Path) -> set[str]:
    return {str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()}


def interrupted(work: Path, **settings: Any) -> None:
    """Leaves the folder of a start that was stopped after its first part."""
    with pytest.raises(KeyboardInterrupt), working_folder(work, SETTINGS | settings, ()):
        (work / "parts" / "0.train.tokens").write_bytes(b"12")
        (work / "parts" / ".1.train.tokens.4711").write_bytes(b"1")
        raise KeyboardInterrupt


def test_a_part_is_gone_on_from_and_a_part_of_a_part_is_not(
    tmp_path: Path, log_lines: list[str]
) -> None:
    work = tmp_path / ".data.preparing"
    interrupted(work)
    with working_folder(work, SETTINGS, ()):
        assert names(work) == EMPTY | {"parts/0.train.tokens"}
    assert log_lines == [f"Going on with the interrupted preparation in {work}."]


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    work = tmp_path / ".data.preparing"
    interrupted(work)
    with (
        pytest.raises(ValueError, match=r"other settings \(weights: there None, asked for \[1\]\)"),
        working_folder(work, SETTINGS | {"weights": [1]}, ()),
    ):
        pytest.fail("the folder of other settings was taken")
    assert "parts/0.train.tokens" in names(work)
    # A part that was read without a bad line is the same with --on_bad_line=skip.
    with working_folder(work, SETTINGS | {"on_bad_line": "skip"}, ()):
        assert "parts/0.train.tokens" in names(work)


def test_without_a_part_nothing_of_an_earlier_start_counts(tmp_path: Path) -> None:
    work = tmp_path / ".data.preparing"
    with pytest.raises(KeyboardInterrupt), working_folder(work, SETTINGS, ()):
        raise KeyboardInterrupt
    assert not work.exists()
    for folder in ("sources", "output"):
        (work / folder).mkdir(parents=True)
    for file in ("job.json", "pieces.sha256", "sources/0", "output/tokenizer.model"):
        (work / file).write_text("of other settings")
    with working_folder(work, SETTINGS, ()):
        assert names(work) == EMPTY


def test_one_process_at_a_time(tmp_path: Path) -> None:
    work = tmp_path / "deep" / ".data.preparing"
    with working_folder(work, SETTINGS, ()):
        with (
            pytest.raises(ValueError, match=r"by another prepare \(process \d+ on .*wait for it"),
            working_folder(work, SETTINGS, ()),
        ):
            pytest.fail("two had it at once")
        # the error of the second start does not delete the folder
        assert work.is_dir()


def test_a_setting_that_was_not_known_then_is_a_difference() -> None:
    assert settings_difference({}, {"shard_tokens": 5}) == "shard_tokens: there None, asked for 5"
    assert settings_difference({"on_bad_line": "skip"}, {"on_bad_line": "stop"})
    assert not settings_difference({"on_bad_line": "stop"}, {"on_bad_line": "skip"})
