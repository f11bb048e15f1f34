from typing import get_args

import pytest

from mobilellm_jax.config import (
    Config,
    ConfigError,
    ModelConfig,
    QuantizeConfig,
    QuantizeScheme,
    from_json,
    to_json,
)
from mobilellm_jax.quantize.schemes import (
    ALIASES,
    SCHEMES,
    check_scheme,
    find_scheme,
    trained_scheme,
)

UNTIED = ModelConfig(tie_embeddings=False)


def test_config_names_every_scheme() -> None:
    assert set(get_args(QuantizeScheme)) == {"none", *SCHEMES, *ALIASES}


@pytest.mark.parametrize(
    ("name", "bits", "size", "integers"),
    [
        ("w8a8", 8, 0, True),
        ("w8", 8, 32, False),
        ("w8g128", 8, 128, False),
        ("w4", 4, 32, False),
        ("w4g128", 4, 128, False),
        ("w4a8", 4, 32, True),
        ("w4a8g128", 4, 128, True),
    ],
)
def test_name_says_what_it_is(name: str, bits: int, size: int, integers: bool) -> None:
    scheme = find_scheme(name)
    assert (scheme.weight_bits, scheme.group_size, scheme.integer_products) == (
        *(bits, size, integers),
    )
    assert scheme.parts == ("embedding", "head")


def test_description_names_what_is_quantized_and_what_is_not() -> None:
    text = str(find_scheme("w4a8g128", "cache, head"))
    assert "4 bits per groups of 128" in text and "8-bit activations per token" in text
    assert "in 8 bits: head, cache; not quantized: embedding, attention, norms" in text


@pytest.mark.parametrize(
    ("name", "parts", "words"),
    [
        ("w8a", "", ["quantize='w8a'", "Did you mean w8a8?", "w4a8g128"]),
        ("none", "", ["must be one of"]),
        ("w8a8", "heads", ["quantized_parts='heads'", "Did you mean head?", "embedding"]),
    ],
)
def test_wrong_name_is_answered_with_the_near_miss(name: str, parts: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        find_scheme(name, parts)
    assert all(word in str(error.value) for word in words)


def test_tied_embeddings_are_quantized_whole_or_not_at_all() -> None:
    for parts in ("head", "embedding"):
        with pytest.raises(ConfigError, match="name both or neither"):
            check_scheme(find_scheme("w8a8", parts), ModelConfig())
        check_scheme(find_scheme("w8a8", parts), UNTIED)
    check_scheme(find_scheme("w8a8", "cache"), ModelConfig())


@pytest.mark.parametrize(
    ("quantize", "word"),
    [
        ({"parts": "head"}, "name both or neither"),
        ({"parts": "embedding,head,attention"}, "not trained in 8 bits"),
        ({"parts": "embeding,head"}, "Did you mean embedding?"),
        ({"scheme": "w8a88"}, "Did you mean w8a8?"),
    ],
)
def test_config_refuses_what_is_not_trained(quantize: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match="quantize") as error:
        Config(quantize=QuantizeConfig(**{"scheme": "w8a8", **quantize}))
    assert word in str(error.value)


def test_run_is_trained_for_no_scheme_unless_it_says_so() -> None:
    assert trained_scheme(Config()) is None
    config = Config(quantize=QuantizeConfig(scheme="w4a8", parts="embedding,head,cache"))
    scheme = trained_scheme(from_json(to_json(config)))
    assert scheme is not None
    assert scheme.name == "w4a8g32" and scheme.parts == ("embedding", "head", "cache")
