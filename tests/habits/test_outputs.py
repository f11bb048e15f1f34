"""Runs commands on the folders, disks and users that people have."""

import contextlib
import grp
import os
import pwd
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from mobilellm_jax.benchmark.measure import is_artifact
from mobilellm_jax.cli.config_flags import load_config
from mobilellm_jax.cli.main import main
from mobilellm_jax.errors import UserError
from mobilellm_jax.open_model import open_model
from mobilellm_jax.preflight import open_data, settle_run, take_workdir
from mobilellm_jax.report.runs import read_runs
from mobilellm_jax.startup.compile_cache import use_compile_cache
from mobilellm_jax.storage import outputs, rundir, sealing
from mobilellm_jax.storage.user_path import user_path
from tests import tiny
from tests.huggingface import write_huggingface

CONFIG = """
from mobilellm_jax.config import to_config_dict

def get_config():
    config = to_config_dict()
    config.model.update(vocab_size=300, embed_dim=16, num_blocks=1, num_heads=2, num_kv_heads=1,
                        head_dim=8, ffn_dim=24, max_seq_len=32)
    config.data.update(path=DATA, seq_len=16)
    config.optimizer.update(warmup_steps=2)
    config.train.update(steps=4, global_batch=8, log_every=1, eval_every=0, checkpoint_every=2)
    return config
"""
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


def no_name(number: int) -> None:
    raise KeyError(f"uid not found: {number}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def tokens(place: Path) -> Path:
    return tiny.prepared_words(place)


@pytest.fixture(scope="module")
def recipe(place: Path, tokens: Path) -> Path:
    file = place / "recipe.py"
    file.write_text(f"DATA = {str(tokens)!r}\n{CONFIG}")
    return file


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    """A run that a user without a name trained; `docker --user` starts processes like that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pwd, "getpwuid", no_name)
        patch.setattr(grp, "getgrgid", no_name)
        patch.delenv("HOME", raising=False)
        run = recipe.parent / "run"
        assert main(["train", f"--config={recipe}", f"--workdir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    """A Hugging Face directory."""
    folder = place / "model"
    tokenizer = tiny.tokenizer_of_few_words(place, 300)
    write_huggingface(tiny.MODEL, tiny.random_params(tiny.MODEL), tokenizer, folder, layout="hf")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not allow a mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# Foreign folders


@pytest.mark.parametrize(
    "command",
    ["train", "sweep --plan --sweep=model.num_blocks=1,2", "report", "prepare", "import", "export"],
)
def test_somebody_names_the_folder_of_a_downloaded_model_as_the_output(
    command: str, model: Path, recipe: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(model)
    name = command.split()[0]
    output = {"train": "--workdir", "sweep": "--workdir"}.get(name, "--output")
    inputs = {
        "report": [f"--runs={place}/run"],
        "prepare": [f"--source=text:{place}/*.txt", "--vocab_size=300"],
        "import": [f"--source={model}"],
        "export": [f"--checkpoint={model}"],
    }.get(name, [f"--config={recipe}"])
    assert main([*command.split(), *inputs, f"{output}={model}"]) == 2
    error = capsys.readouterr().err
    assert str(model) in error and "name a" in error
    assert contents(model) == before


@pytest.mark.parametrize("name", ["tokenizer.model", "manifest.json", "sweep.json", "samples.txt"])
def test_somebody_trains_where_their_own_file_would_be_overwritten(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}"):
        take_workdir(tmp_path)
    (tmp_path / "new").mkdir()
    take_workdir(tmp_path / "new")  # the remedy


def test_somebody_keeps_notes_and_the_log_of_slurm_in_the_run_folder(
    tmp_path: Path, trained: Path
) -> None:
    for name in ("notes.md", "slurm-17.out", ".DS_Store", "run.lock", "outcome.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "checkpoints").symlink_to(trained)  # on a larger disk
    take_workdir(tmp_path)
    take_workdir(trained)  # a run of our own


def test_somebody_writes_a_report_beside_their_own_page(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("<h1>My page</h1>")
    command = ["report", f"--runs={trained}"]
    assert main([*command, f"--output={tmp_path}"]) == 2
    assert "holds index.html" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "<h1>My page</h1>"
    for _ in range(2):  # The second report replaces the first.
        assert main([*command, f"--output={tmp_path / 'new'}"]) == 0


def test_somebodys_runs_have_brackets_in_their_names_or_are_broken_links(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "[a] run" / "1")
    (tmp_path / "[a] run" / "2").symlink_to("gone")
    runs, unreadable = read_runs(f"{tmp_path}/[a] run/*")
    assert [run.folder.name for run in runs] == ["1"]
    assert ["2 is a link to gone, which" in each.reason for each in unreadable] == [True]


def test_somebody_gives_evaluate_the_same_file_as_text_and_output(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("thin deep block shared " * 20)
    command = ["evaluate", f"--checkpoint={trained}", f"--perplexity={text}"]
    assert main([*command, f"--output={text}"]) == 2
    assert "name a new file" in capsys.readouterr().err
    for _ in range(2):  # A later result replaces an earlier one.
        assert main([*command, f"--output={tmp_path / 'new.json'}"]) == 0


# Owners and homes


def test_somebody_trains_in_a_container_in_which_their_user_has_no_name(trained: Path) -> None:
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"2", "4"}


@NEEDS_ROOT
def test_somebody_restores_a_run_whose_owner_this_system_does_not_know(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for path in (run, *run.rglob("*")):
        os.chown(path, 54321, 54321)
    command = ["generate", f"--checkpoint={run}", "--prompt=thin", "--max_new_tokens=2"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("thin")


def test_somebody_has_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", no_name)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    import jax

    found = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert "JAX_COMPILATION_CACHE_DIR names a folder" in use_compile_cache()
        jax.config.update("jax_compilation_cache_dir", found)  # the remedy
        assert use_compile_cache() == found
    finally:
        jax.config.update("jax_compilation_cache_dir", found)


# Mounts, links, devices


def imported(model: Path, output: str | Path) -> None:
    assert main(["import", f"--source={model}", f"--output={output}"]) == 0


def test_somebody_mounts_the_output_folder_into_a_container(
    mounted: Path, model: Path, place: Path, tokens: Path
) -> None:
    (mounted / "lost+found").mkdir()
    imported(model, mounted)
    assert {path.name for path in mounted.iterdir()} == {
        *("lost+found", "checkpoints", "config.json", "tokenizer.model", "tokenizer.json"),
        *("tokenizer_config.json", "generation_config.json", "tokenizer_convention.json"),
    }
    for path in mounted.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = [f"--source=text:{place}/[0-9]*.txt", "--vocab_size=300", "--validation_fraction=0.1"]
    assert main(["prepare", *flags, f"--output={mounted}"]) == 0
    assert contents(mounted).keys() == contents(tokens).keys()
    assert main(["prepare", *flags, f"--output={mounted}"]) == 0  # nothing to do


def test_somebody_mounts_a_folder_into_which_train_prepares_the_data(
    mounted: Path, recipe: Path, place: Path
) -> None:
    source = f"data.source=text:{place}/[0-9]*.txt"
    config = load_config(str(recipe), [f"data.path={mounted}", source])
    mixture, _ = open_data(config)
    assert mixture.datasets[0].path == mounted


def test_somebody_names_the_current_folder_as_the_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    assert main(["export", f"--checkpoint={model}", "--output=.", "--noverify"]) == 0
    assert Path("model.safetensors").is_file()
    assert os.stat(".").st_ino == before == tmp_path.stat().st_ino


@pytest.mark.parametrize("exists", [True, False])
def test_somebody_links_the_output_to_a_larger_disk(
    exists: bool, model: Path, tmp_path: Path
) -> None:
    target, link = tmp_path / "large" / "run", tmp_path / "run"
    target.parent.mkdir()
    if exists:
        target.mkdir()
    link.symlink_to(target)
    imported(model, link)
    assert link.is_symlink() and (target / "config.json").is_file()
    assert [path.name for path in target.parent.iterdir()] == ["run"]


def test_an_import_that_fails_leaves_nothing_in_the_output(model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"")
    output = tmp_path / "output"
    output.mkdir()
    assert main(["import", f"--source={broken}", f"--output={output}"]) == 2
    assert list(output.iterdir()) == []


@NEEDS_ROOT
def test_somebody_names_a_device_as_the_output(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o20666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this system does not allow mknod")
    assert main(["import", f"--source={model}", f"--output={device}"]) == 2
    assert "is not a folder; name a new folder" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("thin deep block shared " * 20)
    command = ["evaluate", f"--checkpoint={trained}", f"--perplexity={text}"]
    assert main([*command, f"--output={device}"]) == 0
    assert device.is_char_device()


def test_a_file_is_a_mount_or_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(source: object, target: object) -> None:
        raise OSError(16, "Device or resource busy")

    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    rundir.write_whole(link, "one")
    assert link.is_symlink() and file.read_text() == "one"
    monkeypatch.setattr(os, "replace", busy)
    rundir.write_whole(file, "two")
    assert file.read_text() == "two"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


@pytest.mark.parametrize("name", ["file.txt/run", "n" * 300, "loop/run", "${SCRATCH}/run", "~/run"])
def test_an_output_that_cannot_be_made_is_refused_before_the_work(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="--output="):
        outputs.new_folder("--output", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"file.txt", "loop"}


# Full disks and folders that cannot be written


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Lets no file grow beyond `limit` bytes, as `ulimit -f` does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["import", "export", "prepare"])
def test_somebody_has_a_full_disk(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "output"
    text.write_text("thin deep block shared " * 200)
    flags = {
        "import": [f"--source={model}"],
        "export": [f"--checkpoint={model}", "--noverify"],
        "prepare": [f"--source=text:{text}", f"--tokenizer={model / 'tokenizer.model'}"],
    }[command]
    flags += ["--validation_fraction=0"] if command == "prepare" else []
    with full_disk(512):
        assert main([command, *flags, f"--output={output}"]) == 2
    assert "Free some space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text]
    assert main([command, *flags, f"--output={output}"]) == 0  # the remedy


def test_the_disk_becomes_full_while_somebody_evaluates(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    text, output = tmp_path / "text.txt", tmp_path / "output.json"
    text.write_text("thin deep block shared " * 20)
    monkeypatch.setattr(os, "fsync", full)
    command = ["evaluate", f"--checkpoint={trained}", f"--perplexity={text}"]
    assert main([*command, f"--output={output}"]) == 2
    said = capsys.readouterr()
    assert "bits_per_byte" in said.out and "Free some space" in said.err
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("command", ["import", "export", "prepare", "report", "evaluate", "train"])
def test_somebody_may_not_write_the_parent_of_the_output(
    command: str,
    model: Path,
    recipe: Path,
    trained: Path,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    # Root may write everywhere, so the test takes the place of the system.
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    for name in ("open_model._open", "data.mixture.open_mixture", "report.write.read_runs"):
        monkeypatch.setattr(f"mobilellm_jax.{name}", work)
    flags = {
        "import": [f"--source={model}"],
        "export": [f"--checkpoint={model}"],
        "prepare": [f"--source=text:{place}/*.txt", "--vocab_size=300"],
        "report": [f"--runs={trained}"],
        "evaluate": [f"--checkpoint={trained}", f"--perplexity={recipe}"],
        "train": [f"--config={recipe}"],
    }[command]
    output = "--workdir" if command == "train" else "--output"
    assert main([command, *flags, f"{output}={tmp_path}/output"]) == 2
    error = capsys.readouterr().err
    assert f"{output}={tmp_path}" in error and "Permission denied" in error
    assert list(tmp_path.iterdir()) == []


# Names of paths


def test_somebody_writes_a_tilde_after_the_equals_sign(
    model: Path, tokens: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    shutil.copytree(tokens, home / "tokens")
    shutil.copytree(tokens, home / "a,b")
    imported(model, "~/run")
    assert main(["inspect", "--data=~/tokens:0.5,~/tokens/../tokens:0.5", "--sample=0"]) == 0
    assert main(["inspect", "--data=~/a,b", "--sample=0"]) == 0
    assert main(["generate", "--checkpoint=~/run", "--prompt=the", "--max_new_tokens=1"]) == 0
    assert main(["export", "--checkpoint=~/run", "--output=~/hf", "--noverify"]) == 0
    shutil.copy(recipe, home)
    names = ["train.init_from=~/run", "data.path=~/tokens", "model.head_dim=4"]
    with pytest.raises(UserError, match="train.init_from='~/run' is another model"):
        settle_run(load_config("~/recipe.py", names), here / "new", None)
    assert load_config("~/recipe.py", ["model=~/run"]).model.embed_dim == 16
    assert {path.name for path in home.iterdir()} == {"tokens", "a,b", "run", "hf", "recipe.py"}
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("~no_such_user/run", "./~no_such_user/run"),
        ("gs://bucket/run", "mounted"),
        ("file:///data/run", "without file://"),
        ("", "name a file or folder"),
    ],
)
def test_somebody_writes_a_path_that_is_not_one(
    text: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "--source=x", f"--output={text}"]) == 2
    assert remedy in capsys.readouterr().err
    assert user_path("--output", "./~no_such_user/run").parts[0] == "~no_such_user"  # the remedy
    assert user_path("--output", "/data/run") == Path("/data/run")


# Copies of a step


def test_somebody_copies_the_best_step_of_a_run(
    trained: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, all_steps = tmp_path / "best", tmp_path / "2024"
    shutil.copytree(trained / "checkpoints" / "2", best)
    shutil.copytree(trained / "checkpoints", all_steps)
    expected = {best: 2, all_steps: 4, trained / "checkpoints": 4, all_steps / "2": 2}
    assert {path: open_model(path).step for path in expected} == expected
    assert not is_artifact(best)
    command = ["generate", f"--checkpoint={best}", "--prompt=thin", "--max_new_tokens=1"]
    assert main(command) == 0
    assert main(["export", f"--checkpoint={best}", f"--output={tmp_path}/hf", "--noverify"]) == 0
    assert "| steps | 2 of 4 |" in (tmp_path / "hf" / "model_card.md").read_text()
    config = load_config(str(recipe), [f"train.init_from={best}"])
    assert settle_run(config, tmp_path, None).params is not None
    capsys.readouterr()
    (best / "manifest.json").unlink()
    assert main(command) == 2
    assert "is incomplete: it has no manifest.json" in capsys.readouterr().err


def test_a_copy_of_a_step_of_an_older_release_opens(trained: Path, tmp_path: Path) -> None:
    best = epath.Path(shutil.copytree(trained / "checkpoints" / "2", tmp_path / "best"))
    content = sealing.read_manifest(best)
    sealing.seal(best, {name: content[name] for name in content.keys() - {"files", "step"}})
    assert open_model(Path(best)).step is None
    at_home = Path(shutil.copytree(best, tmp_path / "checkpoints" / "2"))
    assert open_model(at_home).step == 2


# Weights that are not finite


@pytest.fixture(scope="module", params=["hf", "run"])
def damaged(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model with one NaN and one infinite value in one array."""
    place = tmp_path_factory.mktemp("weights")
    if request.param == "hf":
        folder = Path(shutil.copytree(model, place / "damaged"))
        weights = dict(load_file(folder / "model.safetensors"))
        name = "model.layers.0.mlp.down_proj.weight"
        weights[name] = weights[name].copy()
        weights[name][0, :2] = np.nan, np.inf
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    params = tiny.random_params(tiny.MODEL)
    params["blocks"]["feed_forward"]["down"][0, 0, :2] = np.nan, np.inf
    tiny.save_run(place / "old" / "run", tiny.MODEL, params)
    return place / "old" / "run"


@pytest.mark.parametrize("command", ["import", "export", "generate", "evaluate", "train"])
def test_somebody_opens_weights_with_nan(
    command: str,
    damaged: Path,
    model: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("thin deep block shared " * 20)
    output = f"--output={tmp_path / 'output'}"
    flags = {
        "import": [f"--source={damaged}", output],
        "export": [f"--checkpoint={damaged}", output],
        "generate": [f"--checkpoint={damaged}", "--prompt=a"],
        "evaluate": [f"--checkpoint={damaged}", f"--perplexity={text}"],
        "train": [
            *(f"--config={recipe}", f"--config.train.init_from={damaged}"),
            f"--workdir={tmp_path / 'output'}",
        ],
    }
    if command == "import" and damaged.name == "run":
        pytest.skip("import reads Hugging Face directories only")
    assert main([command, *flags[command]]) == 2
    error = capsys.readouterr().err
    assert "down" in error and "has 2 of " in error and str(damaged) in error
    assert not (tmp_path / "output" / "config.json").exists()
    assert open_model(model).params is not None  # the remedy: another model
