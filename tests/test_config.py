import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax.config import (
    Config,
    ConfigError,
    changed_fields,
    field_types,
    from_json,
    from_object,
    near_miss,
    read_json,
    to_config_dict,
    to_json,
)
from mobilellm_jax.config.rules import ATTENTION


def changed(**fields: Any) -> Config:
    """Returns the default config with {"group__field": value} replaced."""
    config_dict = to_config_dict().unlock()
    for name, value in fields.items():
        group, field = name.split("__")
        # The test goes around ConfigDict's own type check, because the rules here must not rely on
        # it.
        with config_dict[group].ignore_type():
            config_dict[group][field] = value
    return from_object(config_dict.to_dict())


def violations(**fields: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        changed(**fields)
    return str(caught.value).splitlines()


def test_defaults_are_the_papers_recipe() -> None:
    config = Config()
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.95)
    assert (config.optimizer.peak_lr, config.optimizer.weight_decay) == (2e-3, 0.1)
    tokens = config.train.steps * config.train.global_batch * config.data.seq_len
    assert tokens == pytest.approx(1.0066e12, rel=1e-4)


def test_config_dict_round_trip() -> None:
    config = changed(model__num_repeats=2, optimizer__peak_lr=1e-3)
    assert config != Config()
    assert from_object(to_config_dict(config).to_dict()) == config


def test_json_round_trip() -> None:
    config = changed(model__sharing="reverse", data__path="somewhere", train__steps=7_000)
    assert config != Config()
    assert from_json(to_json(config)) == config


def test_json_of_an_int_where_a_float_belongs() -> None:
    text = to_json(Config()).replace('"clip_norm": 1.0', '"clip_norm": 1')
    assert text != to_json(Config())
    clip_norm = from_json(text).optimizer.clip_norm
    assert (clip_norm, type(clip_norm)) == (1.0, float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "config.json: is not JSON (Expecting"),
        ("[]", "config.json must hold an object, not list."),
        ('{"model": {"vocab_size": 1e999}}', "config.json: holds the number 1e999"),
        (
            '{"optimizer": {"peak_lr": 9007199254740993}}',
            "optimizer.peak_lr=9007199254740993 must be of type float, not int.",
        ),
        ('{"model": 3}', "model=3 must be a group of fields."),
        ('{"modle": {}}', "modle: unknown config group. Did you mean model?"),
        (
            '{"model": {"num_hedas": 3}}',
            "model.num_hedas: unknown config key. Did you mean model.num_heads?",
        ),
    ],
)
def test_bad_json(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(text)
    assert str(caught.value).startswith(expected)


def test_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_json(file)
    for content, message in ((b"\xff", "is not UTF-8"), (b"[]", "must hold an object, not list")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{file}:? {message}"):
            read_json(file)
    file.write_text(to_json(Config()))
    assert read_json(file) == Config()


def test_the_edge_is_locked() -> None:
    with pytest.raises(AttributeError, match="num_heads"):
        to_config_dict().model.num_hedas = 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"model__num_kv_heads": 4},
            "model.num_heads=9 must be a multiple of model.num_kv_heads=4; "
            "choose num_kv_heads from 1, 3, 9.",
        ),
        (
            {"model__head_dim": 63},
            "model.head_dim=63 must be even, because RoPE rotates pairs; choose 62 or 64.",
        ),
        ({"model__vocab_size": 0}, "model.vocab_size=0 must be at least 1."),
        (
            {"evaluate__tasks": "piqa"},
            "evaluate.tasks='piqa' has no effect, because evaluate.every=0; set "
            "--config.evaluate.every to a number of steps.",
        ),
        (
            {"model__rope_factor": 8.0},
            "model.rope_factor=8.0 has no effect, because model.rope_scaling='none'; set it to "
            "linear or llama3.",
        ),
        (
            {"model__rope_low_freq_factor": 4.0},
            "model.rope_low_freq_factor=4.0 must be less than model.rope_high_freq_factor=4.0.",
        ),
        ({"model__norm_eps": 0.0}, "model.norm_eps=0.0 must be greater than 0."),
        ({"model__scan_unroll": 31}, "model.scan_unroll=31 must be at most model.num_blocks=30."),
        (
            {"model__sharing": "imediate"},
            "model.sharing='imediate' must be one of immediate, repeat_all, reverse. "
            "Did you mean immediate?",
        ),
        ({"model__num_heads": 9.0}, "model.num_heads=9.0 must be of type int, not float."),
        (
            {"model__tie_embeddings": 1},
            "model.tie_embeddings=1 must be of type bool, not int.",
        ),
        ({"data__path": None}, "data.path=None must be of type str, not None."),
        (
            {"data__seq_len": 4096},
            "data.seq_len=4096 must be at most model.max_seq_len=2048; "
            "shorten the windows or raise model.max_seq_len.",
        ),
        (
            {"optimizer__peak_lr": math.inf},
            "optimizer.peak_lr=inf must be a finite number.",
        ),
        ({"optimizer__eps": math.nan}, "optimizer.eps=nan must be a finite number."),
        (
            {"data__seed": 1 << 31},
            "data.seed=2147483648 must fit 32 bits: at most 2,147,483,647.",
        ),
        (
            {"model__num_heads": 2_000_000_011, "model__num_kv_heads": 2},  # a prime
            "model.num_heads=2000000011 must be a multiple of model.num_kv_heads=2; "
            "choose num_kv_heads from 1, 2000000011.",
        ),
        ({"optimizer__min_lr_ratio": 1.5}, "optimizer.min_lr_ratio=1.5 must be between 0 and 1."),
        ({"optimizer__beta2": 1.0}, "optimizer.beta2=1.0 must be at least 0 and less than 1."),
        (
            {"optimizer__weight_decay": -0.1},
            "optimizer.weight_decay=-0.1 must be at least 0.",
        ),
        (
            {"train__steps": 1000},
            "optimizer.warmup_steps=1000 must be less than train.steps=1000; "
            "shorten the warm-up or train longer.",
        ),
        (
            {"train__accumulation_steps": 3},
            "train.global_batch=1024 must be a multiple of train.accumulation_steps=3.",
        ),
        ({"mesh__fsdp": 0}, "mesh.fsdp=0 must be at least 1, or -1 for what is left."),
        (
            {"mesh__fsdp": -1},
            "mesh.data and mesh.fsdp are -1, but only one mesh axis can take what is left.",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_broken_rule(fields: dict[str, Any], expected: str) -> None:
    assert violations(**fields) == [expected]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (
            {"model__attention": "cudnn", "data__boundaries": "document_mask"},
            ["model.attention='cudnn' does not; choose xla, splash, tokamax or auto"],
        ),
        (
            {"model__attention": "tokamax", "model__compute_dtype": "float32"},
            ["model.attention='tokamax' takes bfloat16 only", "choose xla, splash or auto"],
        ),
        (
            {"model__attention": "splash", "mesh__sequence": 2},
            ["model.attention='splash' cannot split a sequence", "mesh.sequence=2; choose xla or"],
        ),
        (
            {"model__attention": "cudnn", "mesh__sequence": -1, "mesh__data": 1},
            ["mesh.sequence=-1", "--config.mesh.sequence=1"],
        ),
        (
            {"model__attention": "splash", "data__seq_len": 1000},
            ["data.seq_len=1000 must be a multiple of 128 for model.attention='splash'"],
        ),
        (
            {"model__attention": "cudnn", "model__head_dim": 20},
            ["model.head_dim=20 must be a multiple of 8 for model.attention='cudnn'"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_attention_is_refused_what_it_cannot_do(asked: dict[str, Any], named: list[str]) -> None:
    (found,) = violations(**asked)
    assert all(part in found for part in named)
    for other in ("xla", "auto"):
        changed(**asked | {"model__attention": other})


@pytest.mark.parametrize(
    "fields",
    [
        {"boundaries": "concat", "dtype": "bfloat16", "name": "cudnn"},
        {"boundaries": "document_mask", "name": "splash"},
        {"boundaries": "document_mask", "name": "tokamax"},
        {"seq_len": 1024, "dtype": "float32", "name": "splash"},
    ],
    ids=str,
)
def test_attention_is_accepted_where_it_can_run(fields: dict[str, Any]) -> None:
    names = {
        "boundaries": "data__boundaries",
        "dtype": "model__compute_dtype",
        "name": "model__attention",
        "seq_len": "data__seq_len",
    }
    config = changed(**{names[key]: value for key, value in fields.items()})
    assert config.model.attention == fields["name"]


def test_every_implementation_of_attention_has_its_rules() -> None:
    choices = set(typing.get_args(field_types()["model.attention"]))
    assert choices == {"auto", *ATTENTION}


def test_all_violations_are_listed() -> None:
    lines = violations(model__num_kv_heads=4, train__steps=0, optimizer__eps="1e-8")
    starts = ("optimizer.eps='1e-8' ", "train.steps=0 ", "model.num_heads=9 ")
    assert len(lines) == 3
    assert all(any(line.startswith(start) for line in lines) for start in starts)


def test_a_frozen_config_checks_itself() -> None:
    config = Config()
    with pytest.raises(ConfigError, match="model.num_heads=8 must be a multiple"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, num_heads=8))


def test_applied_depth() -> None:
    assert changed(model__num_blocks=5, model__num_repeats=3).model.applied_depth == 15


def test_changed_fields() -> None:
    new = changed(train__steps=500_000, model__num_repeats=2)
    assert changed_fields(Config(), new) == {
        "model.num_repeats": (1, 2),
        "train.steps": (480_000, 500_000),
    }


def test_field_types_name_every_leaf() -> None:
    types = field_types()
    leaves = [
        f"{group.name}.{field.name}"
        for group in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(Config(), group.name))
    ]
    assert sorted(types) == sorted(leaves)
    assert types["train.steps"] is int
    assert typing.get_args(types["model.sharing"]) == ("immediate", "repeat_all", "reverse")


def test_near_miss() -> None:
    assert near_miss("trian", ["prepare", "train"]) == " Did you mean train?"
    assert near_miss("qqq", ["prepare", "train"]) == ""


def test_defaults_are_written_once() -> None:
    """Only the dataclasses of the config set defaults."""
    package = Path(__file__).parent.parent / "mobilellm_jax"
    readers = [f for f in package.rglob("*.py") if "config.get(" in f.read_text()]
    assert readers == []
