"""A run refuses damaged data, and other data than its own, before it computes anything."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from mobilellm_jax import checkpoint, preflight, pretrain
from mobilellm_jax.cli.main import main
from mobilellm_jax.config import Attention, Config, ConfigError, DataConfig, from_json, to_json
from mobilellm_jax.data.mixture import open_mixture
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.processes import distributed
from mobilellm_jax.storage import sealing

CONFIG = """
from mobilellm_jax.config import to_config_dict

def get_config():
    config = to_config_dict()
    config.model.update(vocab_size=300, embed_dim=16, num_blocks=1, num_heads=2, num_kv_heads=1,
                        head_dim=8, ffn_dim=24, max_seq_len=64)
    config.data.update(path=DATA, seq_len=16)
    config.optimizer.update(warmup_steps=0)
    config.train.update(steps=2, global_batch=8)
    return config
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two` share a tokenizer. `third` has its own."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    words = ["thin", "deep", "block", "shared", "twice", "phone", "small", "model"]
    for name in ("one", "two", "third"):
        (folder / f"{name}.text").mkdir()
        for i in range(12):
            text = " ".join(rng.choice(words, 100)) + f" {name} {i}\n"
            (folder / f"{name}.text" / f"{i}.txt").write_text(text)
        tokenizer: dict[str, Any] = (
            {"tokenizer": folder / "one" / "tokenizer.model"}
            if name == "two"
            else {"vocab_size": 300}
        )
        prepare(
            [f"text:{folder}/{name}.text/*"],
            folder / name,
            validation_fraction=0.3,
            shard_tokens=300,
            **tokenizer,
        )
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """Returns a copy that a test may damage."""
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


def config_of(path: str, **data: Any) -> Config:
    base = Config()
    return dataclasses.replace(base, data=DataConfig(path=path, **data))


def train(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, str]:
    file = tmp_path / "config.py"
    file.write_text(f"DATA = {data!r}\n{CONFIG}")
    code = main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}", *flags])
    return code, capsys.readouterr().err


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object, **__: object) -> None:
        raise AssertionError("computing began")

    # The count of the memory traces the model with `jax.jit`, and compiles nothing.
    monkeypatch.setattr(preflight, "shortage", lambda *_: None)
    monkeypatch.setattr(jax, "jit", compiled)
    monkeypatch.setattr(pretrain, "abstract_state", compiled)


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://b/run", "file:///tmp/run", "memory://x"])
def test_a_url_is_no_run_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config=quickstart", f"--workdir={url}"]) == 2
    message = capsys.readouterr().err
    for part in (f"--workdir={url!r} is a URL", "where the bucket is mounted"):
        assert part in message
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("damaged", ["one/train-00001", "two/validation-00000"])
@pytest.mark.parametrize("suffix", ["tokens", "offsets"])
def test_a_flipped_byte_is_found_before_training_starts(
    damaged: str, suffix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = folder.glob(f"{damaged}-of-*.{suffix}")
    size = file.stat().st_size
    flip_byte(file)
    assert file.stat().st_size == size
    code, message = train(f"{folder}/one:0.5,{folder}/two:0.5", tmp_path, capsys)
    assert code == 2
    assert str(file) in message
    assert "SHA-256" in message
    assert "Traceback" not in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_verifying_can_be_turned_off(folder: Path) -> None:
    mixture = open_mixture(str(folder / "one"))
    config = config_of(str(folder / "one"))
    preflight.verify(config, mixture)
    flip_byte(next(folder.glob("one/train-00000-*.tokens")))
    with pytest.raises(ValueError, match=r"train-00000"):
        preflight.verify(config, mixture)
    preflight.verify(config_of(str(folder / "one"), verify=False), mixture)


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("@/one:0.5,@/third:0.5", ["@/one", "@/third", "the same tokenizer", "--tokenizer"]),
        ("@/one:0.5,@/none:0.5", ["@/none", "does not exist", "mobilellm prepare"]),
        ("@/one:0.5,@/two", ["'@/two' must be a folder and its weight", "data/web:0.7"]),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(
    path: str,
    parts: list[str],
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, message = train(path.replace("@", str(prepared)), tmp_path, capsys)
    assert code == 2
    assert "Traceback" not in message
    for part in parts:
        assert part.replace("@", str(prepared)) in message


def test_a_missing_mixture_is_not_prepared(prepared: Path, tmp_path: Path) -> None:
    """`data.source` makes one folder. Two folders would be two copies of the same data."""
    path = f"{tmp_path}/new:1,{prepared}/one:1"
    with pytest.raises(FileNotFoundError, match="new does not exist"):
        preflight.open_data(config_of(path, source="python_docs"))
    assert not list(tmp_path.iterdir())


def test_no_held_out_targets_but_evaluation_is_refused(prepared: Path, tmp_path: Path) -> None:
    """The run also refuses data whose held-out tokens are all masked."""
    file = tmp_path / "tokens.jsonl"
    lines = [{"token_ids": [50 + i, 60], "loss_mask": [1, 1]} for i in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = prepared / "one" / "tokenizer.model"
    prepare([f"tokens:{file}"], tmp_path / "masked", tokenizer=tokenizer, validation_fraction=0.5)
    for mask in (tmp_path / "masked").glob("validation*.loss_mask"):
        mask.write_bytes(bytes(mask.stat().st_size))
    mixture = open_mixture(str(tmp_path / "masked"))
    config = Config()
    model = dataclasses.replace(config.model, vocab_size=300)
    config = dataclasses.replace(
        config_of(str(tmp_path / "masked"), boundaries="document_mask"), model=model
    )
    assert mixture.components[0].stream("validation") is not None
    with pytest.raises(ConfigError, match=r"train.eval_every=1000 needs a validation split with"):
        preflight.check(config, mixture)


def saved(workdir: Path, step: int, **data: Any) -> None:
    folder = checkpoint.step_folder(workdir, step)
    folder.mkdir(parents=True)
    content = {"config": {}, "arrays": {}, "data": data}
    sealing.seal(folder, {"format_version": checkpoint.FORMAT_VERSION, **content})


def test_a_run_goes_on_where_its_data_state_says(prepared: Path, tmp_path: Path) -> None:
    path = f"{prepared}/one:3,{prepared}/two:1"
    mixture = open_mixture(path)
    fresh = preflight.data_state(config_of(path), mixture, tmp_path, None)
    assert fresh == checkpoint.DataState(next_sample=0, fingerprint=mixture.fingerprint)
    saved(tmp_path, 5, version=1, next_sample=41, fingerprint=mixture.fingerprint)
    found = preflight.data_state(config_of(path), mixture, tmp_path, 5)
    assert found == checkpoint.DataState(next_sample=41, fingerprint=mixture.fingerprint)


def test_the_same_data_elsewhere_is_the_same_data(
    prepared: Path, folder: Path, tmp_path: Path
) -> None:
    there = open_mixture(f"{prepared}/one:3,{prepared}/two:1")
    here = open_mixture(f"{folder}/one:0.75,{folder}/two:0.25")
    saved(tmp_path, 5, version=1, next_sample=41, fingerprint=there.fingerprint)
    assert preflight.data_state(config_of(here.path), here, tmp_path, 5).next_sample == 41


@pytest.mark.parametrize("path", ["@/two", "@/one:1,@/two:1", "@/two:2,@/one:1"])
def test_other_data_than_the_runs_is_refused(path: str, prepared: Path, tmp_path: Path) -> None:
    theirs = open_mixture(f"{prepared}/one:2,{prepared}/two:1").fingerprint
    saved(tmp_path, 5, version=1, next_sample=41, fingerprint=theirs)
    path = path.replace("@", str(prepared))
    mixture = open_mixture(path)
    with pytest.raises(ConfigError) as error:
        preflight.data_state(config_of(path), mixture, tmp_path, 5)
    for part in (path, theirs, mixture.fingerprint, "step 5", "train.init_from"):
        assert part in str(error.value)


def test_other_data_than_the_first_process_has_is_refused(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "from_first", lambda what, compute: "c0ffee")
    mixture = open_mixture(str(prepared / "one"))
    with pytest.raises(ConfigError) as error:
        preflight.data_state(config_of(mixture.path), mixture, tmp_path, None)
    for part in (mixture.fingerprint, "process 0 (c0ffee)", "copy the same folder"):
        assert part in str(error.value)


def test_attention_is_settled_for_this_machine_at_every_start(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run may continue with another kernel, because every kernel computes the same numbers."""
    code, shown = train(str(prepared / "one"), tmp_path, capsys, "--config.train.steps=1")
    assert code == 0
    assert "attention xla" in shown
    recorded = tmp_path / "run" / "config.json"
    config = from_json(recorded.read_text())
    assert config.model.attention == "xla"

    def as_if_on(attention: Attention) -> Config:
        model = dataclasses.replace(config.model, attention=attention, max_seq_len=128)
        data = dataclasses.replace(config.data, seq_len=128)
        return dataclasses.replace(config, model=model, data=data)

    recorded.write_text(to_json(as_if_on("splash")))  # the run was started on a TPU
    resumed = preflight.settle(as_if_on("auto"), tmp_path / "run", resume_step=1)
    assert resumed.model.attention == "xla"


def test_a_kernel_of_another_device_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--config.model.attention=cudnn", "--config.model.compute_dtype=bfloat16")
    code, shown = train(str(prepared / "one"), tmp_path, capsys, *flags)
    assert code == 2
    assert "model.attention='cudnn' runs on GPUs, and this is cpu; choose auto or xla." in shown
    code, shown = train(str(prepared / "one"), tmp_path, capsys, "--config.model.remat=offload")
    assert code == 2
    assert "model.remat='offload'" in shown and "--config.model.remat=full" in shown


@pytest.mark.parametrize("flags", ["", "--xla_gpu_deterministic_ops=true"])
def test_determinism_that_a_gpu_was_not_told_of_is_refused(
    flags: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = config_of(f"{prepared}/one", seq_len=16)
    train = dataclasses.replace(base.train, deterministic=True, global_batch=8, eval_every=0)
    config = dataclasses.replace(
        base, train=train, model=dataclasses.replace(base.model, vocab_size=300, attention="xla")
    )
    mixture = open_mixture(config.data.path)
    monkeypatch.setenv("XLA_FLAGS", flags)
    preflight.check(config, mixture)  # a CPU needs no flag

    gpu = SimpleNamespace(platform="gpu")
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    mesh = SimpleNamespace(devices=np.array([gpu]), shape=sizes)
    monkeypatch.setattr(preflight, "make_mesh", lambda _: mesh)
    monkeypatch.setattr(preflight, "mesh_violations", lambda *_: [])
    if flags:
        preflight.check(config, mixture)
    else:
        with pytest.raises(ConfigError, match=r"train\.deterministic=True.*deterministic_ops=true"):
            preflight.check(config, mixture)
