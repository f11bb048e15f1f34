"""Compares quantized models with float models: bytes, speed, loss, and the types of products.

    python benchmarks/quantize.py
    python benchmarks/quantize.py --topology=v5e:1x1
    python benchmarks/quantize.py --checkpoint=runs/mine --text=README.md

The first command measures on this machine. The second command compiles for a TPU that need not be
present. The third command compares losses.

Speed is measured with a model of --model's shape and random weights, in two ways: one pass over
--tokens tokens up to their losses (as `evaluate` does), and --new greedy tokens for --batch prompts
(as `generate` does). All forms take turns in each round. The script prints medians, the spread, and
the ratio to float32. It then counts three things in the compiled programs: products of int8 with
sums in int32, all products, and conversions of int8 to int32. A backend without int8 products needs
these conversions.

For a TPU (pip install "mobilellm-jax[tpu]") the script compiles the same pass and prints the
compiler's estimate of cycles. With --checkpoint it prints a row for each scheme with bits, bytes
and the loss on --text.
"""

import argparse
import dataclasses
import functools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.config import ComputeDtype, ModelConfig
from mobilellm_jax.evaluate.engine import jax_engine
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.generation import generate
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.model.transformer import Params, Transformer, head_matrix, init_params
from mobilellm_jax.open_model import open_model
from mobilellm_jax.paper.architectures import MOBILELLM
from mobilellm_jax.plan.hlo import read_program
from mobilellm_jax.plan.topology import parse_topology, topology_devices
from mobilellm_jax.quantize.parameters import bits_per_weight, quantized, stored_bytes
from mobilellm_jax.quantize.schemes import find_scheme
from mobilellm_jax.startup.compile_cache import use_compile_cache
from mobilellm_jax.train.loss import token_losses

_FLOATS: tuple[ComputeDtype, ...] = ("float32", "bfloat16")
_EVERYTHING = "embedding,head,attention,cache"
_RESULT = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\w+)\[")
_PRODUCT = re.compile(r" (?:dot|convolution)\(%?([\w.\-]+), %?([\w.\-]+)\)")
_CONVERSION = re.compile(r" convert\(%?([\w.\-]+)\)")


@dataclasses.dataclass(frozen=True)
class Form:
    """A model in float or quantized form."""

    name: str
    config: ModelConfig
    params: Params


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="125m", choices=sorted(MOBILELLM))
    parser.add_argument(
        "--schemes", default="w8a8,w8a8+,w8,w4,w4a8", help="a + quantizes every part"
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--topology", help="TPU topology such as v5e:1x1")
    parser.add_argument("--checkpoint")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    arguments = parser.parse_args()
    schemes = arguments.schemes.split(",")
    if arguments.checkpoint:
        _print_losses(arguments.checkpoint, arguments.text, schemes)
        return
    if arguments.topology:
        jax.config.update("jax_platforms", "cpu")
    else:
        use_compile_cache()
    config = dataclasses.replace(MOBILELLM[arguments.model], attention="xla")
    params = init_params(config, jax.random.key(0))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}; {arguments.model}, "
        f"{arguments.tokens} tokens, {arguments.new} new for {arguments.batch}"
    )
    forms = [
        *(Form(d, dataclasses.replace(config, compute_dtype=d), params) for d in _FLOATS),
        *(_quantized(name, config, params) for name in schemes),
    ]
    if arguments.topology:
        _compile_for_tpu(forms, arguments)
    else:
        _compare(forms, arguments)


def _quantized(name: str, config: ModelConfig, params: Params) -> Form:
    scheme = find_scheme(name.removesuffix("+"), *([_EVERYTHING] if name.endswith("+") else []))
    # A CPU computes in float32 between the integer products.
    config = dataclasses.replace(config, compute_dtype="float32")
    return Form(name, config, jax.jit(functools.partial(quantized, scheme=scheme))(params))


@functools.partial(jax.jit, static_argnames="config")
def _pass(params: Params, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    model = Transformer(config).bind({"params": params})
    x_BTD = model.hidden(tokens_BT)
    return token_losses(x_BTD, head_matrix(params, config), tokens_BT, 256)


def _compare(forms: list[Form], arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    tokens_BT = jnp.asarray(rng.integers(3, forms[0].config.vocab_size, (1, arguments.tokens)))
    prompts = rng.integers(3, forms[0].config.vocab_size, (arguments.batch, 16)).tolist()
    passes: list[Callable[[], object]] = []
    decoders: list[Callable[[], object]] = []
    programs, held = [], []
    for form in forms:
        compiled = _pass.lower(form.params, tokens_BT, form.config).compile()
        programs.append(_products(compiled.as_text() or ""))
        passes.append(functools.partial(_wait, compiled, form.params, tokens_BT))
        prepared = generate.prepare(form.config, form.params)
        held.append(stored_bytes(prepared.weights))
        request = generate.Request(prompts, max_new_tokens=arguments.new, sampling=GREEDY)
        decoders.append(functools.partial(generate.generate, form.config, prepared, request))
    times = [_alternating(contenders, arguments.rounds) for contenders in (passes, decoders)]
    print(
        f"{'form':10}{'MB stored':>10}{'MB decoding':>12}{'pass ms':>18}{'of f32':>8}"
        f"{'decoding tok/s':>20}{'of f32':>8}  int8 products, all, int8 to int32"
    )
    first = [statistics.median(seconds[0]) for seconds in times]
    new = arguments.new * arguments.batch
    for i, form in enumerate(forms):
        passed, decoded = (seconds[i] for seconds in times)
        rates = [new / s for s in decoded]
        stored = stored_bytes(form.params) / (2 if form.name == "bfloat16" else 1)
        print(
            f"{form.name:10}{stored / 1e6:10.1f}{held[i] / 1e6:12.1f}"
            f"{_spread([s * 1e3 for s in passed]):>18}{first[0] / statistics.median(passed):8.2f}"
            f"{_spread(rates):>20}{first[1] / statistics.median(decoded):8.2f}"
            f"  {', '.join(map(str, programs[i]))}",
            flush=True,
        )


def _wait(
    compiled: Callable[[Params, jax.Array], jax.Array], params: Params, tokens_BT: jax.Array
) -> jax.Array:
    return jax.block_until_ready(compiled(params, tokens_BT))


def _alternating(contenders: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:
        contender()  # compiles, warms up
    for _ in range(rounds):
        for i, contender in enumerate(contenders):
            began = time.perf_counter()
            contender()
            seconds[i].append(time.perf_counter() - began)
    return seconds


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _products(text: str) -> tuple[int, int, int]:
    """Counts integer products, all products, and conversions of int8 to int32 in a program."""
    integers = products = conversions = 0
    types: dict[str, str] = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            types = {}  # names are unique only inside one computation
        if not (result := _RESULT.match(line)):
            continue
        types[result[1]] = result[2]
        if product := _PRODUCT.search(line):
            operands = {types.get(name) for name in product.groups()}
            products += 1
            integers += operands <= {"s8", "s4"} and result[2] == "s32"
        if (made := _CONVERSION.search(line)) and types.get(made[1]) == "s8":
            conversions += result[2] == "s32"
    return integers, products, conversions


def _compile_for_tpu(forms: list[Form], arguments: argparse.Namespace) -> None:
    [device, *_] = topology_devices(parse_topology(arguments.topology))
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    tokens_BT = abstract((1, arguments.tokens), jnp.int32)
    print(
        f"{'form':10}{'M cycles':>10}{'MB arguments':>14}{'MB temporaries':>16}  int8 products, all"
    )
    for form in forms:
        is_float = form.name in _FLOATS
        types = jax.tree.map(lambda x: form.name if is_float else x.dtype, form.params)  # noqa: B023
        params = jax.tree.map(lambda x, dtype: abstract(x.shape, dtype), form.params, types)
        # A TPU computes in bfloat16 between the integer products.
        dtype: ComputeDtype = "float32" if form.name == "float32" else "bfloat16"
        config = dataclasses.replace(form.config, compute_dtype=dtype)
        compiled = _pass.lower(params, tokens_BT, config).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text is not None and memory is not None, "libtpu provides both"
        integers, products, _ = _products(text)
        cycles = read_program(text).estimated_cycles or 0
        print(
            f"{form.name:10}{cycles / 1e6:10.2f}{memory.argument_size_in_bytes / 1e6:14.1f}"
            f"{memory.temp_size_in_bytes / 1e6:16.1f}  {integers}, {products}",
            flush=True,
        )


def _print_losses(checkpoint: str, text: Path, schemes: list[str]) -> None:
    opened = open_model(checkpoint)
    content = text.read_bytes().decode("utf-8")
    forms = [Form("float32", opened.config, opened.params)]
    forms += [_quantized(name, opened.config, opened.params) for name in schemes]
    print(f"{opened.origin} on {text}")
    print(f"{'form':10}{'bits':>7}{'bytes':>14}{'loss':>10}{'of float32':>12}{'tok/s':>9}")
    first = None
    cut = CutText.cut(opened.tokenizer, content, opened.config.max_seq_len, None)
    for form in forms:
        measure = functools.partial(perplexity, jax_engine(form.config, form.params), cut)
        measure()  # compiles
        began = time.perf_counter()
        result = measure()
        rate = result.tokens / (time.perf_counter() - began)
        first = result.loss if first is None else first
        print(
            f"{form.name:10}{bits_per_weight(form.params):7.2f}{stored_bytes(form.params):14,}"
            f"{result.loss:10.4f}{result.loss - first:+12.4f}{rate:9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
