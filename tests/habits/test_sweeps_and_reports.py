"""What users do with sweeps, reports and pictures; each test has the name of a habit."""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from matplotlib.figure import Figure

from mobilellm_jax import run_record
from mobilellm_jax.benchmark import table as benchmark
from mobilellm_jax.checkpoint import save_model
from mobilellm_jax.cli.main import main
from mobilellm_jax.config import Config, ConfigError, changed, to_json
from mobilellm_jax.plan import memory
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.report.compare import group_seeds
from mobilellm_jax.report.runs import read_runs
from mobilellm_jax.sweep import child, estimate, slots
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.train.metrics import plot_losses
from mobilellm_jax.train.optimizer import learning_rate
from tests import tiny
from tests.benchmark.test_table import MEASURED
from tests.report.conftest import run_writer
from tests.together import ROOT

CONFIG = changed(
    tiny.RUN,
    {"train.steps": 20, "train.eval_every": 5, "data.path": "tokens", "model.num_blocks": 1,
     "model.compute_dtype": "float32"},
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(
        "from mobilellm_jax.config import from_json, to_config_dict\n\n"
        f"def get_config():\n    return to_config_dict(from_json({to_json(CONFIG)!r}))\n"
    )
    return path


@pytest.fixture
def sweep(recipe: Path, tmp_path: Path) -> Callable[..., int]:
    """Returns a function that plans a sweep of num_blocks=1,2 with more flags."""

    def plan(*flags: str) -> int:
        values = () if any(f.startswith("--sweep") for f in flags) else (BLOCKS,)
        folder = f"--workdir={tmp_path / 'sweep'}"
        known = ("--plan", "--flops_per_sec=1e9", f"--config={recipe}", folder)
        return main(["sweep", *known, *values, *flags])

    return plan


BLOCKS = "--sweep=model.num_blocks=1,2"


def write_rates(folder: Path, *parts: tuple[Config, range]) -> None:
    """Adds the learning rates of a run that had the schedule of each config for some steps."""
    with (folder / "metrics.jsonl").open("a") as file:
        for config, steps in parts:
            rate = learning_rate(config.optimizer, config.train.steps)
            for step in steps:
                record = {"step": step, "train/learning_rate": float(rate(step - 1))}
                file.write(json.dumps(record) + "\n")


def longer(config: Config, steps: int) -> Config:
    return changed(config, {"train.steps": steps})


def test_somebody_asks_for_fewer_steps_than_the_runs_have(
    sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_writer(tmp_path / "sweep")("num_blocks=1-s0", longer(CONFIG, 60), 2.0)
    assert sweep() == 2
    said = capsys.readouterr().err
    assert "num_blocks=1-s0: 60 steps taken, train.steps=20 here" in said
    remedy = re.search(r"--config\.train\.steps=\d+", said)
    assert remedy is not None
    assert sweep(remedy[0]) == 0
    assert "1 finished" in capsys.readouterr().err


def test_somebody_extends_a_sweep_and_adds_a_seed(
    sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = longer(CONFIG, 60)
    write = run_writer(tmp_path / "sweep")
    extended = write("num_blocks=1-s0", long, 2.0)
    write_rates(extended, (CONFIG, range(1, 21)), (long, range(21, 61)))
    fresh = write("num_blocks=1-s1", changed(long, {"train.seed": 1, "data.seed": 1}), 3.0)
    write_rates(fresh, (long, range(1, 61)))
    models = group_seeds(read_runs(str(tmp_path / "sweep"))[0])
    assert [len(model.runs) for model in models] == [1, 1]
    assert models[0].name.endswith(", other schedule until step 20")
    assert sweep("--config.train.steps=60", "--seeds=2") == 0
    said = capsys.readouterr().err
    assert "num_blocks=1-s0 (until step 20)" in said and "num_blocks=1-s1 (until" not in said


def test_a_longer_run_with_a_constant_rate_is_no_other_run(tmp_path: Path) -> None:
    constant = changed(CONFIG, {"optimizer.schedule": "constant"})
    long = longer(constant, 60)
    write = run_writer(tmp_path / "sweep")
    write_rates(write("a", long, 2.0), (constant, range(1, 21)), (long, range(21, 61)))
    write_rates(write("b", changed(long, {"train.seed": 1}), 2.0), (long, range(1, 61)))
    (model,) = group_seeds(read_runs(str(tmp_path / "sweep"))[0])
    assert len(model.runs) == 2 and "other schedule" not in model.name


def test_a_skipped_step_is_no_other_schedule(tmp_path: Path) -> None:
    rate = learning_rate(CONFIG.optimizer, CONFIG.train.steps)
    folder = run_writer(tmp_path / "sweep")("a", CONFIG, 2.0)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(1, 21):
            updates = step - 1 - (step > 7)
            record = {"step": step, "train/learning_rate": float(rate(updates))}
            if step == 7:
                record |= {"train/skipped_steps": 1.0}
            file.write(json.dumps(record) + "\n")
    assert run_record.read_record(folder).other_schedule_until(CONFIG) == 0


def test_a_rate_is_not_chosen_among_extended_and_fresh_runs(
    sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = longer(CONFIG, 60)
    first = changed(long, {"optimizer.peak_lr": 1e-3})
    folder = run_writer(tmp_path / "sweep")("num_blocks=1-lr0.001-s0", first, 2.0)
    write_rates(folder, (longer(first, 20), range(1, 21)), (first, range(21, 61)))
    flags = ("--tune_lr=1e-3,1e-2", "--seeds=2", "--config.train.steps=60")
    assert sweep(*flags) == 2
    assert "are not comparable. Use another --workdir." in capsys.readouterr().err
    assert sweep(*flags, f"--workdir={tmp_path / 'another'}") == 0


def test_runs_with_other_validation_batches_are_no_seeds(tmp_path: Path) -> None:
    write = run_writer(tmp_path / "sweep")
    write("a", CONFIG, 2.0)
    write("b", changed(CONFIG, {"train.seed": 1, "train.eval_batches": 1}), 3.0)
    assert len(group_seeds(read_runs(str(tmp_path / "sweep"))[0])) == 2


def test_data_is_known_by_its_contents_and_not_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = {"a": "one", "b": "one", "c": "two"}
    monkeypatch.setattr(
        run_record.RunRecord, "data", property(lambda record: prints.get(record.folder.name))
    )
    write = run_writer(tmp_path / "sweep")
    for seed, (name, path) in enumerate({"a": "x/words", "b": "y/words", "c": "x/words"}.items()):
        write(name, changed(CONFIG, {"train.seed": seed, "data.path": path}), 2.0 + seed)
    models = group_seeds(read_runs(str(tmp_path / "sweep"))[0])
    assert sorted(len(model.runs) for model in models) == [1, 2]
    assert any("path=x/words (fingerprint two)" in model.name for model in models)


def test_a_sweep_does_not_count_a_run_on_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(name="a", config=CONFIG)
    files.check_data(tmp_path, run, "now")  # The run has no checkpoint yet.
    monkeypatch.setattr(run_record.RunRecord, "data", "then")
    with pytest.raises(ValueError, match=r"other data \(fingerprint then\)"):
        files.check_data(tmp_path, run, "now")
    files.check_data(tmp_path, run, "then")


def damaged(folder: Path) -> Iterator[tuple[str, str]]:
    """Writes four folders that cannot be read; yields the name and the reason of each."""
    for name, file, text, reason in (
        ("newer", "config.json", '{"model": {"num_experts": 4}}', "model.num_experts: unknown"),
        ("torn", "metrics.jsonl", '{"st\n{"step": 2}\n', "metrics.jsonl, line 1"),
        ("foreign", "config.json", '{"hidden_size": 64}', "hidden_size: unknown config group"),
        ("odd", "outcome.json", "[", "outcome.json: is not JSON"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(to_json(CONFIG))
        (folder / name / file).write_text(text)
        yield name, reason


def test_one_folder_of_many_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_writer(tmp_path / "sweep")("fine", CONFIG, 2.0)
    output = f"--output={tmp_path / 'page'}"
    reasons = dict(damaged(tmp_path / "sweep" / "runs"))
    assert main(["report", f"--runs={tmp_path / 'sweep'}", output]) == 0
    said = capsys.readouterr()
    assert "1 model of 1 finished run\n" in said.out
    page = (tmp_path / "page" / "index.html").read_text()
    for name, reason in reasons.items():
        assert f"{name}/" in said.err and reason in said.err
        assert f"<li>{name}, not read: " in page
    assert main(["report", f"--runs={tmp_path}/sweep/runs/[not]*", output]) == 2
    assert "matches no run folder that can be read" in capsys.readouterr().err


def test_a_sweep_goes_on_beside_an_entry_of_a_newer_version(
    sweep: Callable[..., int], tmp_path: Path
) -> None:
    entry = {"name": "x", "tune_from": [], "config": {"model": {"num_experts": 4}}}
    (tmp_path / "sweep").mkdir()
    file = tmp_path / "sweep" / "sweep.json"
    file.write_text(json.dumps({"version": 1, "runs": [entry]}))
    assert sweep() == 0
    entries = json.loads(file.read_text())["runs"]
    assert entries[0] == entry and len(entries) == 3


def test_the_measured_speeds_of_a_sweep_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "trials.json"
    file.write_text("{")
    assert files.read_results(file, estimate.Speed) == {}
    assert "will be measured again" in caplog.text
    speed = estimate.Speed(step_sec=0.5, start_sec=2.0)
    files.write_results(file, {"x": speed})
    assert files.read_results(file, estimate.Speed) == {"x": speed}


def test_a_sweep_names_the_run_that_cannot_be_read(
    sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_writer(tmp_path / "sweep")("num_blocks=2-s0", CONFIG, 2.0)
    (folder / "config.json").write_text('{"model": {"num_experts": 4}}')
    assert sweep() == 2
    assert "num_blocks=2-s0/config.json: " in capsys.readouterr().err


def test_a_notebook_or_matplotlibrc_chooses_a_backend(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.bbox: tight\n")
    program = (
        "import os, sys; from pathlib import Path; "
        "from mobilellm_jax.storage.picture import png; "
        "draw = lambda figure: figure.suptitle('a $x_{$ name'); "
        "Path(sys.argv[1]).write_bytes(png(draw, (2, 1), 50)); "
        "assert os.environ['MPLBACKEND'].startswith('module://')"
    )
    notebook = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(tmp_path),
    }
    command = [sys.executable, "-c", program, str(tmp_path / "x.png")]
    subprocess.run(command, env={**os.environ, **notebook}, cwd=ROOT, check=True)
    header = (tmp_path / "x.png").read_bytes()[:24]
    assert header[:4] == b"\x89PNG"
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (100, 50)


@pytest.mark.parametrize("hidden", ["-1", "", "NoDevFiles", "-1,0"])
def test_a_cluster_hides_the_gpus(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots.importlib.util, "find_spec", lambda name: name)
    assert slots._gpus({"CUDA_VISIBLE_DEVICES": hidden}) == []
    assert slots._gpus({"CUDA_VISIBLE_DEVICES": "1,GPU-8932f937,-1,3"}) == ["1", "GPU-8932f937"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Returns a list of the figures that are drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


def test_somebody_looks_at_the_loss_of_a_short_run(figures: list[Figure], tmp_path: Path) -> None:
    training = [{"step": s, "train/loss": 9 / s} for s in range(1, 561)]
    validation = [{"step": s, "validation/loss": 5.0} for s in (0, 280, 560)]
    plot_losses([*training, *validation], tmp_path / "loss.png", "a run")
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    assert legend is not None and not axes.texts
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["training: 0.016 at step 560", "validation: 5.000 at step 560"]
    assert axes.lines[1].get_linestyle() == "None", "three points are no curve"


def test_exports_that_differ_by_noise_look_alike(figures: list[Figure]) -> None:
    rows = [
        dataclasses.replace(benchmark.summarize([MEASURED], 128), loss=loss)
        for loss in (6.0511, 6.0514)
    ]
    benchmark.plot(rows, "the built-in text")
    low, high = figures[0].axes[0].get_ylim()
    assert high - low == pytest.approx(0.05)
    assert not figures[0].axes[0].yaxis.get_major_formatter().get_useOffset()
    tiny_row = dataclasses.replace(rows[0], battery_hours=10_596.0)
    said = benchmark.markdown([tiny_row], "corpus.txt")
    assert "| > 168 |" in said and "are from corpus.txt." in said


def test_somebody_makes_a_report_of_one_run(
    figures: list[Figure], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_writer(tmp_path / "sweep")("my run", CONFIG, 2.0)
    tokenizer = tiny.tokenizer_of_few_words(tmp_path, 300)
    imported = changed(CONFIG, {"train.steps": 480_000})
    save_model(folder.parent / "theirs", imported, tiny.random_params(CONFIG.model), tokenizer)
    output = tmp_path / "page"
    assert main(["report", f"--runs={folder.parent}/*", f"--output={output}"]) == 0
    assert "1 model of 1 finished run\n" in capsys.readouterr().out
    page = (output / "index.html").read_text()
    assert "<h1>One model</h1>" in page and "Models compared" not in page
    assert "my run" in page, "the name of the folder"
    assert "theirs, imported: this program did not train it" in page
    assert "480000" not in page
    assert len(figures) == 2, "a picture of the curve for each theme, and no comparison"
    validation, training = figures[0].axes[0].lines
    assert validation.get_linestyle() == "None", "few points are no curve"
    assert training.get_label() == "training loss"


def test_somebody_has_long_names(figures: list[Figure], tmp_path: Path) -> None:
    write = run_writer(tmp_path / "sweep")
    for name in ("one", "two"):
        path = f"data/{'a corpus with a long name ' * 9}{name}"
        write(name, changed(CONFIG, {"data.path": path}), 2.0)
    assert main(["report", f"--runs={tmp_path}/sweep", f"--output={tmp_path}/page"]) == 0
    lines = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert len(lines) == 2
    assert all(len(line) <= 62 for text in lines for line in text.split("\n"))
    assert lines[0].endswith("one") and lines[1].endswith("two")


def test_the_time_left_follows_from_the_time_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [Run(name=name, config=CONFIG) for name in "abc"]
    shares: dict[str, float] = {"a": 1.0, "b": 0.01, "c": 0.0}
    monkeypatch.setattr(estimate, "share_done", lambda sweep, run: shares[run.name])
    pace = estimate.Pace(tmp_path, dict.fromkeys("abc", 100.0), slots=2)
    assert pace.seconds_left(runs[2:], [(runs[1], 60.0, 0.0)]) == pytest.approx(199 / 2)
    shares["b"] = 0.5
    assert pace.seconds_left(runs[2:], [(runs[1], 10.0, 0.0)]) == pytest.approx(0.2 * 150 / 2)
    pace.ended(runs[0], 40.0, 1.0)
    assert pace.seconds_left(runs[2:], []) == pytest.approx(40.0)


class _TrialHere:
    """Stands for a slot; a trial runs in this process, which then has the role of the child."""

    name, count = "here", 0

    def start(self, what: str, folder: Path, name: str, **_: object) -> "_TrialHere":
        self.count += 1
        self.returncode, self._run = 0, (what, str(folder), name)
        return self

    def communicate(self) -> tuple[bytes, None]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            self.returncode = child.main([*self._run])
        return said.getvalue().encode(), None


def test_a_model_of_a_sweep_is_too_large_for_the_laptop(
    sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep says so before its first run starts, like `train`, and its remedy helps."""
    large = ("--config.train.global_batch=64", "--config.train.eval_every=0")
    assert sweep(*large, "--sweep=model.num_blocks=2") == 0
    (run,) = files.read_runs(tmp_path / "sweep", ["num_blocks=2-s0"])
    needed = account_of(run.config, jax.devices()[:1]).total_bytes
    monkeypatch.setattr(memory, "memory_per_device", lambda _: int(0.6 * needed))
    monkeypatch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])
    slot: Any = _TrialHere()
    with pytest.raises(ConfigError, match="num_blocks=2-s0: The run does not fit") as caught:
        estimate.try_all(tmp_path / "sweep", [run], [slot])
    (flag,) = re.findall(r"Add (--config\.\S+);", str(caught.value))
    (tmp_path / "sweep" / "sweep.json").unlink()
    assert sweep(*large, "--sweep=model.num_blocks=2", flag) == 0
    (run,) = files.read_runs(tmp_path / "sweep", ["num_blocks=2-s0"])
    assert estimate.try_all(tmp_path / "sweep", [run], [slot]).keys() == {estimate.key_of(run)}
    # A trial is not repeated, unless the runs get another share of the machine.
    estimate.try_all(tmp_path / "sweep", [run], [slot])
    assert slot.count == 2
    estimate.try_all(tmp_path / "sweep", [run], [slot, slot])
    assert slot.count == 3


def test_a_sweep_of_one_run_and_tiny_models(
    sweep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--sweep=model.num_blocks=1") == 0
    said = capsys.readouterr().err
    assert re.search(r"\n1 run, 0\.\d*[1-9]\d* GFLOP in all", said)
    assert "0.000" not in said


def planned(tmp_path: Path) -> dict[str, str]:
    """Returns the `data.path` of every run of the planned sweep."""
    entries = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    return {entry["name"]: entry["config"]["data"]["path"] for entry in entries}


def test_somebody_sweeps_over_a_mixture(
    sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--sweep=data.path=a:0.7,b:0.3") == 0
    said = capsys.readouterr().err
    assert "has 2 values: 'a:0.7' | 'b:0.3'" in said
    remedy = re.search(r"--sweep='(data.path=.*)'", said)
    assert remedy is not None
    (tmp_path / "sweep" / "sweep.json").unlink()
    assert sweep(f"--sweep={remedy[1]}") == 0
    assert list(planned(tmp_path).values()) == ["a:0.7,b:0.3", "c"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("bob's,ann's", ["bob's", "ann's"]),
        ("'a:1,b:1','c d'", ["a:1,b:1", "c d"]),
        ('a"b,c"d', ['a"b', 'c"d']),
        ('"a,b"', ["a,b"]),
        ("Data,data", ["Data", "data"]),  # One folder on some disks.
        ("x/a,x_a,x:a", ["x/a", "x_a", "x:a"]),  # No slash can be in a name.
        ("é" * 150 + ",b", ["é" * 150, "b"]),
        ("x" * 4000, ["x" * 4000]),
    ],
)
def test_values_of_all_kinds_are_swept(
    values: str, expected: list[str], sweep: Callable[..., int], tmp_path: Path
) -> None:
    assert sweep(f"--sweep=data.path={values}") == 0
    found = planned(tmp_path)
    assert list(found.values()) == expected
    assert len({name.casefold() for name in found}) == len(expected)
    for name in found:
        files.log_file(tmp_path / "sweep", name).write_text("A file can have this name.")


@pytest.mark.parametrize("flag", ["--sweep=model.num_blocks=1,", "--tune_lr=1e-3,,1e-2"])
def test_somebody_writes_a_comma_too_many(
    flag: str, sweep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(flag) == 2
    said = capsys.readouterr().err
    assert f"{flag}: " in said and "Remove the comma beside it." in said
    assert sweep(flag.removesuffix(",").replace(",,", ",")) == 0


def test_somebody_forgets_the_second_quote(
    sweep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep('--sweep=data.path="a:0.7,b:0.3') == 2
    assert "write the second quote" in capsys.readouterr().err
    assert sweep('--sweep=data.path="a:0.7,b:0.3"') == 0


def test_rates_that_differ_in_the_ninth_digit(sweep: Callable[..., int], tmp_path: Path) -> None:
    assert sweep("--sweep=model.num_blocks=1", "--tune_lr=0.00123456781,0.00123456782") == 0
    assert len(planned(tmp_path)) == 2


def test_a_fixed_size_needs_narrower_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    common = ["sweep", "--config=configs/quickstart.py", "--plan", "--flops_per_sec=1e9"]
    common += [f"--workdir={tmp_path / 'sweep'}", "--sweep=model.num_blocks=2,4,8"]
    for parameters in (900_000, 860_000):
        command = [*common, f"--fixed_parameters={parameters}"]
        assert main(command) == 2
        said = capsys.readouterr().err
        remedy = re.search(r"(--config\.model\.head_dim=\d+) works for all models", said)
        assert remedy is not None, said
        assert main([*command, remedy[1]]) == 0
        assert "3 runs" in capsys.readouterr().err
    heads = [*common[:-1], "--sweep=model.head_dim=64,66", "--fixed_parameters=600000"]
    assert main(heads) == 2
    assert "works" not in capsys.readouterr().err, "the sweep sets the width of heads itself"


def test_a_computed_field_follows_the_swept_field(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from mobilellm_jax.config import to_config_dict\n\n"
        "def get_config():\n    c = to_config_dict().unlock()\n"
        "    c.optimizer.warmup_steps = c.train.get_ref('steps') // 10\n    return c\n"
    )
    folder = tmp_path / "sweep"
    command = ["sweep", f"--config={recipe}", f"--workdir={folder}", "--plan"]
    flags = ["--sweep=train.steps=60,200", "--flops_per_sec=1e12", "--seeds=2", "--tune_lr=1e-3"]
    assert main([*command, *flags]) == 0
    entries = json.loads((folder / "sweep.json").read_text())["runs"]
    found = {(e["config"]["train"]["steps"], e["config"]["optimizer"]["warmup_steps"])
             for e in entries}  # fmt: skip
    assert found == {(60, 6), (200, 20)} and len(entries) == 4
