import pkgutil

import pytest

from mobilellm_jax.export.formats import FORMATS, check_precision


@pytest.mark.parametrize(
    ("name", "dtype", "quantize", "message"),
    [
        ("hf", None, "q8_0", r"which has none for --quantize\. --format=gguf has it"),
        ("stablehlo", "float16", None, r"float32, bfloat16 for --dtype\. --format=hf or mobilellm"),
        ("litert", None, "int9", r"which has int8 for --quantize\. Did you mean int8\?"),
        ("hf", "float16", "q8_0", "both say how weights are stored; give one"),
    ],
)
def test_a_precision_that_a_format_lacks(name, dtype, quantize, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(name, dtype, quantize)


def test_the_default_is_float32() -> None:
    assert check_precision("hf", None, None) == "float32"
    assert check_precision("mobilellm", "bfloat16", None) == "bfloat16"


def test_a_package_that_the_writer_lacks_is_named(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"needs executorch, torchao to write a file; pip install"):
        check_precision("executorch", None, None)
    assert not FORMATS["hf"].can_run


@pytest.mark.parametrize("name", ["hf", "mobilellm"])
def test_every_format_names_a_writer(name) -> None:
    assert callable(pkgutil.resolve_name(f"mobilellm_jax.export.{FORMATS[name].writer}"))
