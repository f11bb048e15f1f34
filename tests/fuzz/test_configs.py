"""Tests config.json of a run and of a Hugging Face directory."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mobilellm_jax.config import Config, read_json
from mobilellm_jax.export.huggingface.config import from_config_json, to_config_json
from mobilellm_jax.storage.strict_json import as_type, read
from tests.fuzz.hostile import damaged_json, fuzz


def test_config_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "config.json"

    def parse(content: bytes) -> None:
        file.write_bytes(content)
        assert isinstance(read_json(file), Config)

    valid = dataclasses.asdict(Config())
    fuzz(parse, damaged_json(valid), tmp_path, valid=json.dumps(valid).encode())


def test_config_of_a_hugging_face_directory(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    model = Config().model
    valid = to_config_json(model, 30, "mobilellm")
    valid |= {"rope_scaling": {"rope_type": "default"}, "layer_types": ["full_attention"]}
    valid |= {"sliding_window": None, "quantization_config": None, "head_dim": None}

    def parse(content: bytes) -> None:
        file.write_bytes(content)
        found = from_config_json(as_type(read(file), dict[str, Any]), file)
        assert Config(model=found).model == found  # whose rules it keeps, or it would be refused

    fuzz(parse, damaged_json(valid), tmp_path, valid=json.dumps(valid).encode())
