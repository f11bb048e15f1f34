"""What people type: names of configs, records of runs, words of other tools."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mobilellm_jax import __version__, preflight
from mobilellm_jax.cli import main as cli
from mobilellm_jax.cli.config_flags import load_config, load_recipe
from mobilellm_jax.cli.flags import define, usage
from mobilellm_jax.cli.main import COMMANDS, import_command, main
from mobilellm_jax.config import ConfigError, field_types, synonyms, to_json
from mobilellm_jax.config.comments import comments
from mobilellm_jax.export import formats
from mobilellm_jax.processes.cluster import find_cluster
from mobilellm_jax.processes.source_digest import source_digest
from mobilellm_jax.sharding import make_mesh
from mobilellm_jax.storage import rundir
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.runs import grid_variants, vary, with_seeds
from tests.tiny import MODEL, RUN, random_params, save_run

ROOT = Path(__file__).parents[2]

COMPUTED = """
from mobilellm_jax.config import to_config_dict

def get_config():
    config = to_config_dict()
    config.train.steps = 30
    config.optimizer.warmup_steps = config.train.get_ref("steps") // 10
    config.optimizer.min_lr_ratio = 1e-5 / config.optimizer.get_ref("peak_lr")
    config.model.ffn_dim = config.model.get_ref("embed_dim") * 3
    return config
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the current folder, which contains only a config file with computed fields."""
    (tmp_path / "mine.py").write_text(COMPUTED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_somebody_overrides_a_field_that_others_are_computed_from(here: Path) -> None:
    config = load_config("mine.py", ["train.steps=60", "model.embed_dim=100"])
    assert (config.optimizer.warmup_steps, config.model.ffn_dim) == (6, 300)
    fixed = load_config("mine.py", ["optimizer.warmup_steps=4", "train.steps=60"])
    assert (fixed.optimizer.warmup_steps, fixed.train.steps) == (4, 60)


def test_somebody_sweeps_a_field_that_others_are_computed_from(here: Path) -> None:
    variants = vary({"": load_recipe("mine.py")}, {"train.steps": [60, 90]})
    assert [v.config.optimizer.warmup_steps for v in variants.values()] == [6, 9]
    sized = vary({"": load_recipe("mine.py")}, {"model.num_blocks": [8, 16]}, 30_000_000)
    assert len({v.config.model.ffn_dim for v in sized.values()}) == 2
    long = grid_variants(load_recipe("mine.py"), ["roadmap"], "paper", "125M")
    warmups = {v.config.optimizer.warmup_steps / v.config.train.steps for v in long.values()}
    assert warmups == {0.1} and len({v.config.train.steps for v in long.values()}) == 2


def test_somebody_tunes_a_rate_that_others_are_computed_from(here: Path) -> None:
    runs = with_seeds({"a": load_recipe("mine.py")}, 2, [1e-3, 1e-2])
    files.record_runs(here, runs)
    for run, loss in zip(runs[:2], ("3.0", "2.0"), strict=True):
        folder = files.run_folder(here, run.name)
        files.write_outcome(folder, "finished", steps=30)
        (folder / rundir.CONFIG).write_text(to_json(run.config))
        (folder / "metrics.jsonl").write_text(f'{{"step": 30, "validation/loss": {loss}}}\n')
    chosen = files.settled(here, runs[2])
    assert (chosen.optimizer.peak_lr, chosen.optimizer.min_lr_ratio) == (1e-2, 1e-3)
    assert (chosen.train.seed, chosen.data.seed) == (1, 1)
    (files.run_folder(here, runs[2].name)).mkdir()
    (files.run_folder(here, runs[2].name) / rundir.CONFIG).write_text(to_json(chosen))
    files.record_runs(here, runs)  # The started run is the same run.


@pytest.mark.parametrize(
    ("line", "message", "remedy"),
    [
        ("config.train.steps = required_placeholder(int)", "has no value in", "train.steps=50"),
        (
            "config.optimizer.warmup_steps = 9 // config.train.get_ref('log_every')",
            "computes optimizer.warmup_steps from other fields, and this fails: ZeroDivisionError",
            "optimizer.warmup_steps=5",
        ),
    ],
)
def test_somebody_has_a_field_without_a_value(
    line: str, message: str, remedy: str, here: Path
) -> None:
    source = COMPUTED.replace("    return", f"    {line}\n    return")
    source = "from ml_collections.config_dict import required_placeholder\n" + source
    (here / "mine.py").write_text(source)
    zero = ["train.log_every=0"] if "log_every" in line else []
    with pytest.raises(ConfigError) as caught:
        load_config("mine.py", zero)
    field, _, value = remedy.partition("=")
    assert message in str(caught.value) and f"write --config.{field}=VALUE" in str(caught.value)
    group, name = field.split(".")
    recipe = load_recipe("mine.py", [remedy])
    assert getattr(getattr(recipe.config, group), name) == int(value)


def test_somebody_installs_the_wheel_and_has_no_checkout(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    build = [sys.executable, "setup.py", "-q", "build", f"--build-base={tmp_path / 'build'}"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    script = (
        "import mobilellm_jax\n"
        "from mobilellm_jax.processes.source_digest import source_digest\n"
        "from mobilellm_jax.cli.config_flags import load_config\n"
        "for name in ('quickstart', 'configs/sweep_tiny.py', 'quantize/quickstart_w4a8'):\n"
        "    print(load_config(name).data.path, mobilellm_jax.__file__)\n"
        "print(source_digest())\n"
    )
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "empty",
        env={"PYTHONPATH": str(tmp_path / "build" / "lib")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        *("data/python_docs", "data/python_docs_2048", "data/python_docs", source_digest())
    ]
    assert str(tmp_path / "build") in result.stdout


def test_somebody_names_a_config_without_its_folder(here: Path) -> None:
    assert load_config("quickstart") == load_config("configs/quickstart.py")
    (here / "configs").mkdir()
    (here / "configs" / "quickstart.py").write_text(COMPUTED)
    assert load_config("quickstart").train.steps == 30  # The user's own file comes first.


def test_somebody_copies_a_config_under_an_odd_name(here: Path) -> None:
    (here / "mine.py").rename(here / "recipe.txt")
    assert load_config("recipe.txt").train.steps == 30
    (here / "record").write_text("\ufeff" + to_json(RUN))
    assert load_config("record") == RUN


def test_somebody_imports_a_file_beside_the_config(here: Path) -> None:
    (here / "variants").mkdir()
    (here / "variants" / "deep_base.py").write_text(COMPUTED)
    (here / "variants" / "deep.py").write_text(
        "import deep_base\n\ndef get_config():\n    config = deep_base.get_config()\n"
        "    config.model.num_blocks = 7\n    return config\n"
    )
    before = list(sys.path)
    config = load_config("variants/deep.py", ["train.steps=60"])
    assert (config.model.num_blocks, config.optimizer.warmup_steps) == (7, 6)
    assert sys.path == before


def test_somebody_repeats_a_run_from_its_record(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / rundir.CONFIG).write_text(to_json(RUN))
    for name in ("run/config.json", "run", str(here / "run")):
        assert load_config(name) == RUN
    ablated = load_config("run", ["train.seed=3"])
    assert ablated == dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, seed=3))
    variants = vary({"": load_recipe("run")}, {"model.num_blocks": [1, 3]})
    assert [v.config.model.num_blocks for v in variants.values()] == [1, 3]


def test_somebody_trains_on_from_an_imported_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(here / "source", MODEL, random_params(MODEL))
    assert main(["export", "--checkpoint=source", "--output=hf", "--noverify"]) == 0
    capsys.readouterr()
    assert main(["import", "--source=hf", "--output=imported"]) == 0
    assert "1 block\n" in capsys.readouterr().out  # and not "applied 1 times"
    for checkpoint in ("imported", "imported/checkpoints/0", "hf"):
        overrides = [f"model={checkpoint}", "data.seq_len=32", "model.scan_unroll=1"]
        config = load_config("quickstart", overrides)
        assert config.model == dataclasses.replace(MODEL, init_std=0.06)
    longer = load_config("quickstart", ["model=hf", "model.num_blocks=2", "data.seq_len=32"])
    assert (longer.model.num_blocks, longer.model.embed_dim) == (2, MODEL.embed_dim)
    capsys.readouterr()
    assert main(["plan", "--config=hf/config.json"]) == 2
    assert "--config.model=hf takes the model from this directory" in capsys.readouterr().err
    assert main(["plan", "--config=quickstart", "--config.model=none"]) == 2
    assert "checkpoint='none' does not exist" in capsys.readouterr().err


def test_somebody_starts_from_a_model_of_another_shape(here: Path) -> None:
    tokenizer = save_run(here / "imported", MODEL, random_params(MODEL))
    overrides = [f"model.vocab_size={MODEL.vocab_size}", "train.init_from=imported"]
    with pytest.raises(ConfigError) as caught:
        preflight._initial_params(load_config("quickstart", overrides), tokenizer)
    remedy = "model=imported"
    assert f"To take the model from it, write --config.{remedy}." in str(caught.value)
    more = ["data.seq_len=32", "model.scan_unroll=1"]
    config = load_config("quickstart", [*overrides, *more, remedy])
    assert preflight._initial_params(config, tokenizer) is not None


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("train.lr", "optimizer.peak_lr"),
        ("learning_rate", "optimizer.peak_lr"),
        ("train.batch_size", "train.global_batch"),
        ("model.n_layer", "model.num_blocks"),
        ("model.n_head", "model.num_heads"),
        ("n_embd", "model.embed_dim"),
        ("block_size", "data.seq_len"),
        ("train.max_iters", "train.steps"),
        ("gradient_accumulation_steps", "train.accumulation_steps"),
        ("model.num_hidden_layers", "model.num_blocks"),
        ("model.peak_lr", "optimizer.peak_lr"),
        ("Train.Warmup-Iters", "optimizer.warmup_steps"),
    ],
)
def test_somebody_uses_the_word_of_another_tool(
    word: str, field: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config=mine.py", "--workdir=x", f"--config.{word}=1"]) == 2
    answer = capsys.readouterr().err
    assert f"calls it {field}" in answer or f"mean {field}?" in answer
    assert main(["plan", "--config=mine.py", f"--{word}=1"]) == 2
    answer = capsys.readouterr().err
    assert f"calls it --config.{field}" in answer or f"mean --config.{field}?" in answer
    (here / rundir.CONFIG).write_text('{"train": {"' + word + '": 1}}')
    with pytest.raises(ConfigError, match=field):
        load_config(rundir.CONFIG)


def test_every_word_of_another_tool_has_an_answer_that_exists() -> None:
    for answer in synonyms._FIELDS.values():
        named = re.findall(r"\b[a-z]+\.[a-z_]+", answer)
        assert named and set(named) <= set(field_types())
    flags = {flag for name in COMMANDS for flag in define(import_command(name).Flags)}
    assert {flag for answers in synonyms._FLAGS.values() for flag in answers} <= flags


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("train mine.py --workdir=x", "'mine.py'; write --config=mine.py."),
        ("train --config=mine.py runs/x", "'runs/x'; write --workdir=runs/x."),
        ("inspect data/web", "'data/web'; write --data=data/web."),
        ("import hf runs/x", "'hf'; write --source=hf --output=runs/x."),
        ("generate --checkpoint=runs/x Once", "'Once'; write flags as --name=value."),
        ("generate --model=runs/x", "This command calls it --checkpoint."),
        ("sweep --grid=heads --out_dir=x", "This command calls it --workdir."),
        ("prepare --source=python_docs --output_dir=x", "This command calls it --output."),
        ("train --config=mine.py --workdri=x", "Did you mean --workdir?"),
        ("train --config=mine.py --train.steps=5", "Did you mean --config.train.steps?"),
    ],
)
def test_somebody_types_a_word_without_its_flag(
    line: str, answer: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert answer in capsys.readouterr().err


def test_somebody_wants_to_see_all_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config=mine.py", "--show_config", "--config.train.seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "  seed = 3  (command line)\n      Seed of initialisation and sampling." in shown
    assert "  warmup_steps = 3  (mine.py, computed)\n" in shown
    assert "  steps = 30  (mine.py)\n" in shown
    assert "  name = 'adamw'  (default)\n" in shown
    assert [name.rpartition(".")[2] for name in field_types()] == re.findall(
        r"(?m)^  (\w+) = ", shown
    )
    assert all(len(meaning) > 15 for meaning in comments().values())
    assert main(["train", "--show_config"]) == 2
    assert "--config is missing" in capsys.readouterr().err


def test_somebody_asks_for_the_version_or_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"mobilellm-jax {__version__} ")
    assert main(["help"]) == 0 and main(["--help"]) == 0
    first, second = capsys.readouterr().out.split("Usage:")[1:]
    assert first == second
    assert main(["help", "plan"]) == 0
    assert "Usage: mobilellm plan" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_somebody_reads_the_flags_of_a_command(name: str) -> None:
    text = usage(import_command(name).Flags)
    for entry in re.split(r"(?m)^  (?=--)", text)[1:]:
        words = re.sub(r"\n +", " ", entry).strip()
        assert "  " not in words and words[-1] not in ":;,"


def test_somebody_asks_for_more_blocks_than_fit_the_parameters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = ["--sweep=model.num_blocks=2,4,8", "--fixed_parameters=900000", "--plan"]
    command = ["sweep", "--config=quickstart", f"--workdir={tmp_path}", "--flops_per_sec=1e12"]
    assert main([*command, *sweep]) == 2
    remedy = re.search(r"(--config.model.head_dim=\d+) works", capsys.readouterr().err)
    assert remedy
    assert main([*command, *sweep, remedy[1]]) == 0


def test_somebody_exports_without_pytorch(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(formats, "_not_installed", list)
    save_run(here / "source", MODEL, random_params(MODEL))
    caplog.set_level("INFO")
    monkeypatch.setattr(cli, "show_messages", lambda: None)
    assert main(["export", "--checkpoint=source", "--output=hf"]) == 0
    [line] = [record for record in caplog.records if "will not be run" in record.message]
    assert line.levelname == "INFO"
    extra = re.search(r"pip install 'mobilellm-jax\[(\w+)\]'", line.message)
    assert extra
    # The named extra has the packages, and README names it too.
    setup = (ROOT / "setup.py").read_text()
    assert f'    "{extra[1]}": HF,' in setup and "transformers" in setup
    assert f"| `{extra[1]}` |" in (ROOT / "README.md").read_text()


def test_somebody_pastes_an_install_command_into_zsh() -> None:
    files = [ROOT / "README.md", ROOT / "setup.py", *(ROOT / "docs").glob("*.md")]
    files += [
        file
        for folder in ("mobilellm_jax", "launch", "benchmarks", "constraints")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".sh", ".md", ".txt")
    ]
    for file in files:
        for line in file.read_text().splitlines():
            bare = re.search(r"pip install[^'\"]*\[[a-z,]+\]", line)
            assert not bare, f"{file}: zsh expands the brackets in: {line}"


def test_somebody_adds_a_feature_with_the_document_that_names_the_files() -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    rows = re.findall(r"(?m)^\| `([^`]+)`(?:: (.*?))? \|", text)
    assert len(rows) > 20
    for file, names in rows:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`([^`]+)`", names):
            assert re.search(rf"\b{re.escape(name)}\b", source), f"{file} has no {name}"
    for file in re.findall(r"`((?:mobilellm_jax|tests)/[\w/.]+)`", text):
        assert (ROOT / file).exists(), file


def test_somebody_has_eight_devices_in_one_machine(here: Path) -> None:
    for override, axis in (("train.seed=0", "data"), ("mesh.fsdp=8", "fsdp")):
        mesh = make_mesh(load_config("quickstart", [override]).mesh)
        assert mesh.shape[axis] == 8 and mesh.size == 8


@pytest.mark.parametrize(("tasks", "gpus"), [(1, list(range(8))), (8, [0])])
def test_somebody_starts_srun_on_machines_with_eight_gpus(tasks: int, gpus: list[int]) -> None:
    environment = {
        "SLURM_NTASKS": str(2 * tasks),
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)",
        "SLURM_LOCALID": "0",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    }
    cluster = find_cluster(environment)
    assert cluster.several and cluster.devices == gpus
    text = (ROOT / "docs" / "training.md").read_text()
    assert f"--ntasks-per-node={tasks}" in text
    flags = define(import_command("train").Flags)
    for flag in ("coordinator_address", "num_processes", "process_id"):
        assert f"--{flag}=" in text and flag in flags
