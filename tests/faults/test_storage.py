"""Tests checkpoints on a disk that is full, damaged, gone, without renames, or taken over."""

import contextlib
import dataclasses
import errno
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from mobilellm_jax import checkpoint
from mobilellm_jax.checkpoint import folders, saving
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.processes.run_lock import LockLostError
from mobilellm_jax.storage import sealing
from tests.checkpoint.test_checkpoint import CONFIG, DATA, abstract, filled, tokenizer

__all__ = ["tokenizer"]  # a fixture
FIRST, SECOND = filled(CONFIG, seed=1), filled(CONFIG, seed=2)


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Collects the log messages of the package."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mobilellm_jax")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def said() -> Iterator[list[str]]:
    with logged() as messages:
        yield messages


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats failed saves without a wait."""
    monkeypatch.setattr(saving, "RETRY_SEC", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def two_steps(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        writer.save(1, FIRST, DATA)
        writer.save(2, SECOND, DATA)
    return run


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    """A copy of a run with the steps 1 and 2, for the test to damage."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def files_of(run: Path, step: int) -> list[Path]:
    return sorted(p for p in (run / "checkpoints" / str(step)).rglob("*") if p.is_file())


def same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def flip(file: Path, seed: int) -> None:
    content = bytearray(file.read_bytes())
    place = random.Random(seed).randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


def truncate(file: Path, seed: int) -> None:
    os.truncate(file, random.Random(seed).randrange(file.stat().st_size))


def remove(file: Path, seed: int) -> None:
    del seed
    file.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_damage_to_any_file_of_the_newest_is_named_and_the_previous_one_used(
    damage: Any, run: Path, tokenizer: Tokenizer, said: list[str]
) -> None:
    files = files_of(run, 2)
    assert len(files) > 15
    for seed, file in enumerate(files):
        content = file.read_bytes()
        damage(file, seed)
        said.clear()
        assert checkpoint.latest_step(run) == 1
        first, second = said
        assert first.startswith(f"Skipped: {run}/checkpoints/2 is ") and file.name in first
        assert second == "Step 1 is used instead."
        file.write_bytes(content)
    assert checkpoint.latest_step(run) == 2
    damage(files[-1], 0)
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        same(FIRST, writer.restore(1, abstract(CONFIG)))


def test_without_a_usable_checkpoint_the_run_does_not_start_again(run: Path) -> None:
    for step in (1, 2):
        flip(files_of(run, step)[0], step)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.latest_step(run)
    for part in ("checkpoints/1 is damaged", "checkpoints/2 is damaged", "start a new run"):
        assert part in str(error.value)


def test_a_damaged_checkpoint_does_not_count_and_stays(run: Path, tokenizer: Tokenizer) -> None:
    os.truncate(files_of(run, 2)[0], 1)
    before = [file.read_bytes() for file in files_of(run, 2)]
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        for step in (3, 5):  # keep_checkpoints=2, keep_every=4
            writer.save(step, FIRST, DATA)
    assert [file.read_bytes() for file in files_of(run, 2)] == before
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"2", "3", "5"}


def test_a_damaged_step_is_renamed_when_it_is_saved_again(
    run: Path, tokenizer: Tokenizer, said: list[str]
) -> None:
    (run / "checkpoints" / "2.damaged-1").mkdir()
    file = files_of(run, 2)[3]
    flip(file, 0)
    damaged = file.read_bytes()
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        writer.save(2, FIRST, DATA)
    assert checkpoint.latest_step(run) == 2
    same(FIRST.params, checkpoint.restore_model(run, 2).params)
    moved = run / "checkpoints" / "2.damaged-2" / file.relative_to(run / "checkpoints" / "2")
    assert moved.read_bytes() == damaged
    assert len(said) == 1 and "Renamed to 2.damaged-2" in said[0] and file.name in said[0]


def test_a_save_that_was_cut_off_is_named_and_replaced(
    run: Path, tokenizer: Tokenizer, said: list[str]
) -> None:
    (run / "checkpoints" / "2").rename(run / "checkpoints" / "2.saving-1")
    (run / "checkpoints" / "9.deleted").mkdir()
    assert checkpoint.latest_step(run) == 1 and not said
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        (line,) = said
        assert "2.saving-1 is incomplete" in line
        writer.save(2, FIRST, DATA)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"1", "2"}
    same(FIRST.params, checkpoint.restore_model(run, 2).params)


def test_other_arrays_are_listed_in_three_lists(run: Path, tokenizer: Tokenizer) -> None:
    other = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, activation="relu", ffn_dim=32)
    )
    with checkpoint.CheckpointWriter(run, other, tokenizer) as writer:
        with pytest.raises(checkpoint.CheckpointError) as error:
            writer.restore(2, abstract(other))
    lines = str(error.value).splitlines()
    there, here, different = (
        lines.index("only in the checkpoint:"),
        lines.index("only in this program: none"),
        lines.index("different:"),
    )
    assert "  params/blocks/feed_forward/gate" in lines[there:here]
    up = "  params/blocks/feed_forward/up: float32[2,16,24] there, float32[2,16,32] here"
    assert up in lines[different:]


# These tests run in a separate process, because TensorStore calls a closed event loop later.
FULL = """
import sys
from pathlib import Path
from tests.faults import test_storage
getattr(test_storage, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
"""


def fails_to_save(run: Path, tokenizer_file: Path, fault: Callable[[], None]) -> None:
    """Fails to save step 3 twice, on the disk that `fault` has changed."""
    tokenizer = load_tokenizer(tokenizer_file)
    with (
        logged() as said,
        pytest.raises(checkpoint.SaveError, match="could not be saved in 2 attempts"),
        checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer,
    ):
        fault()
        writer.save(3, FIRST, DATA)
        writer.wait()
    assert len([line for line in said if "Step 3 was not saved" in line]) == 2, said
    # Threads of a failed attempt may write to its folder after the folder was deleted.
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert {name for name in names if ".saving-" not in name} == {"1", "2"}, said


def still_sound(run: Path) -> None:
    assert checkpoint.latest_step(run) == 2
    same(SECOND.params, checkpoint.restore_model(run, 2).params)


def limit_files(run: Path, tokenizer_file: Path, every: int) -> None:
    """Limits the size of files, to a value that makes another file fail first each time."""
    saving.RETRY_SEC = (0.0,)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    without = resource.RLIM_INFINITY
    # Orbax divides the arrays differently among the files in d/ in every save.
    all_sizes = {file.stat().st_size - 1 for file in files_of(run, 2) if file.parent.name != "d"}
    sizes = sorted(all_sizes)[::every]
    for limit in sizes:

        def fault(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, without))

        fails_to_save(run, tokenizer_file, fault)
        resource.setrlimit(resource.RLIMIT_FSIZE, (without, without))
        still_sound(run)
    print(f"{len(sizes)} points")


def fill_disk(run: Path, tokenizer_file: Path, every: int) -> None:
    """Leaves a few blocks of 4 KiB free, fewer than a step has files."""
    saving.RETRY_SEC = (0.0,)
    filler = run / "filler"
    free = shutil.disk_usage(run).free
    points = range(0, 24, 2 * every)
    for blocks in points:
        size = free - 4096 * blocks
        fails_to_save(run, tokenizer_file, lambda size=size: filler.write_bytes(b"\0" * size))
        still_sound(run)
        filler.unlink()
    with checkpoint.CheckpointWriter(run, CONFIG, load_tokenizer(tokenizer_file)) as writer:
        writer.save(3, FIRST, DATA)
    assert checkpoint.latest_step(run) == 3
    print(f"{len(points)} points")


def in_another_process(name: str, run: Path, tokenizer: Tokenizer, every: int) -> int:
    """Runs a function of this file; returns the number of points at which a save failed."""
    result = subprocess.run(
        [sys.executable, "-c", FULL, name, str(run), str(tokenizer.file), str(every)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.split()[0])


# The quick test takes every fourth point of failure, the long test takes all.
EVERY_POINT = [(4, 1 / 4), pytest.param(1, 1, marks=pytest.mark.soak)]


@pytest.mark.parametrize(("every", "share"), EVERY_POINT)
def test_a_disk_that_refuses_any_file_of_a_save_leaves_the_previous_step(
    every: int, share: float, run: Path, tokenizer: Tokenizer
) -> None:
    assert in_another_process("limit_files", run, tokenizer, every) > 10 * share


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """Mounts a file system of 1.5 MB."""
    folder = Path(tempfile.mkdtemp(prefix="mobilellm-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("mounting a small disk takes more rights than this process has")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


@pytest.mark.parametrize(("every", "share"), EVERY_POINT)
def test_a_full_disk_at_any_point_of_a_save_leaves_the_previous_step(
    every: int, share: float, small_disk: Path, two_steps: Path, tokenizer: Tokenizer
) -> None:
    run = Path(shutil.copytree(two_steps, small_disk / "run"))
    assert in_another_process("fill_disk", run, tokenizer, every) == 12 * share


@pytest.mark.usefixtures("at_once")
def test_a_failed_save_is_repeated_with_the_newest_state(
    run: Path, tokenizer: Tokenizer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, failures = sealing.seal, [errno.ENOSPC, errno.EIO]

    def fail_twice(*args: Any) -> None:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        seal(*args)

    monkeypatch.setattr(sealing, "seal", fail_twice)
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        writer.save(5, FIRST, DATA)
        until(writer.retry_is_due)
        writer.save(6, FIRST, DATA)
        writer.save(7, SECOND, DATA)
        writer.wait()
        assert not writer.retry_is_due()
    assert [line.split(" (")[0] for line in said] == [
        "Step 5 was not saved",
        "Step 6 was not saved",
    ]
    assert "No space left on device" in said[0] and "the next attempt follows in 0 s" in said[0]
    assert checkpoint.steps(run)[-1] == 7
    same(SECOND.params, checkpoint.restore_model(run, 7).params)


def test_a_repeated_save_is_not_repeated_again_while_it_runs(
    run: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "RETRY_SEC", (0.0, 0.0, 0.0))
    seal, failures = sealing.seal, [OSError(errno.ENOSPC, "No space left on device")]

    def fail_once(*args: Any) -> None:
        if failures:
            raise failures.pop()
        seal(*args)

    monkeypatch.setattr(sealing, "seal", fail_once)
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        writer.save(5, FIRST, DATA)
        until(writer.retry_is_due)
        writer.save(6, FIRST, DATA)
        assert not writer.retry_is_due()
    assert checkpoint.steps(run)[-1] == 6


def test_the_last_attempt_fails_the_run_and_hides_no_other_error(
    run: Path, tokenizer: Tokenizer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(sealing, "seal", fail)
    monkeypatch.setattr(saving, "RETRY_SEC", (1e6,))
    with pytest.raises(checkpoint.SaveError, match="failed; the log has the error"):
        with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
            writer.save(3, FIRST, DATA)
    assert "Read-only file system" in said[0]
    with pytest.raises(KeyError, match="what ended the run"):
        with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
            writer.save(3, FIRST, DATA)
            raise KeyError("what ended the run")
    with pytest.raises(checkpoint.SaveError, match="in 2 attempts: .*Read-only file system"):
        with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
            writer.save(3, FIRST, DATA)
            assert not writer.retry_is_due()  # the wait is long
            writer.save(6, FIRST, DATA)
            writer.save(9, FIRST, DATA)
    assert "this was the last attempt" in said[-1]
    assert checkpoint.latest_step(run) == 2


@pytest.mark.usefixtures("at_once")
def test_the_disk_of_a_run_is_full(
    run: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("TensorStore: No space left on device")

    monkeypatch.setattr(sealing, "seal", fail)
    with pytest.raises(UserError, match="Earlier checkpoints are unchanged. Correct the cause"):
        with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
            writer.save(3, FIRST, DATA)
            writer.wait()
    assert checkpoint.latest_step(run) == 2


@pytest.mark.usefixtures("at_once")
def test_a_missing_run_folder_is_not_created_again(run: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(checkpoint.SaveError, match=r"No such file or directory: .*checkpoints"):
        with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
            shutil.rmtree(run)
            writer.save(3, FIRST, DATA)
            writer.wait()
    assert not run.exists()


def test_nothing_is_saved_into_a_folder_that_another_run_took(
    run: Path, tokenizer: Tokenizer
) -> None:
    def lost() -> None:
        raise LockLostError("another")

    with pytest.raises(LockLostError):
        with checkpoint.CheckpointWriter(run, CONFIG, tokenizer, lost) as writer:
            writer.save(3, FIRST, DATA)
    assert checkpoint.steps(run) == [1, 2]


def test_a_rename_that_moves_single_files_may_be_cut_off_anywhere(
    run: Path, tokenizer: Tokenizer, said: list[str]
) -> None:
    """A mounted bucket has no folders, so it renames the files one by one."""
    final = run / "checkpoints" / "2"
    work = final.rename(f"{final}.saving-1")
    files = sorted(p for p in work.rglob("*") if p.is_file())
    for file in files[:-1]:
        place = final / file.relative_to(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
        said.clear()
        assert checkpoint.latest_step(run) == 1
        assert said[0].startswith(f"Skipped: {final} is ")
    with checkpoint.CheckpointWriter(run, CONFIG, tokenizer) as writer:
        writer.save(2, FIRST, DATA)
    assert checkpoint.latest_step(run) == 2
    same(FIRST.params, checkpoint.restore_model(run, 2).params)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"1", "2", "2.damaged-1"}


@pytest.fixture
def no_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates an object store, which cannot rename."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this store cannot rename")

    monkeypatch.setattr(sealing, "is_local", lambda path: False)
    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.usefixtures("no_rename")
def test_on_a_store_without_rename_a_manifest_completes_a_step(
    tmp_path: Path, tokenizer: Tokenizer, said: list[str]
) -> None:
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        for step in (1, 3, 5):
            writer.save(step, FIRST, DATA)
        writer.save(6, SECOND, DATA)
    assert checkpoint.steps(tmp_path) == [5, 6]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"5", "6"}
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        same(SECOND, writer.restore(6, abstract(CONFIG)))
    # A kill cuts a save off before the manifest, which is written last.
    (tmp_path / "checkpoints" / "6" / "manifest.json").unlink()
    assert checkpoint.latest_step(tmp_path) == 5
    assert "checkpoints/6 is incomplete: it has no manifest.json" in said[0]
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        writer.save(6, FIRST, DATA)
    model = checkpoint.restore_model(tmp_path, 6)
    same(FIRST.params, model.params)
    assert model.tokenizer.encode("a thin phone") == tokenizer.encode("a thin phone")


@pytest.mark.usefixtures("no_rename")
def test_a_run_starts_again_after_its_first_save_on_a_store_was_cut_off(
    tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "checkpoints" / "3" / "params").mkdir(parents=True)
    assert checkpoint.latest_step(tmp_path) is None
    assert "checkpoints/3 is incomplete" in said[0]


def test_a_deletion_that_was_cut_off_leaves_no_checkpoint(run: Path) -> None:
    """The deletion may stop after any file; the name or the manifest goes first."""
    folder = epath.Path(run / "checkpoints")
    removed = folder / "1.deleted"
    (folder / "1").rename(removed)
    for file in files_of(run, 1):
        file.unlink()
    assert checkpoint.steps(run) == [2]
    folders.tidy(folder)
    assert [p.name for p in folder.iterdir()] == ["2"]
