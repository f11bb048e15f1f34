"""Compares our training step with PyTorch's, with the same shape and device, in one run.

    pip install torch transformers                    # for PyTorch
    python benchmarks/train_step.py                   # 125M: CPU 2 x 512 tokens, GPU 16 x 2,048
    python benchmarks/train_step.py --model=mobilellm_350m --rows=8

PyTorch runs Hugging Face's Llama of the same shape with SDPA attention, `clip_grad_norm_` and fused
AdamW, both eager and through `torch.compile`. The types are float32, and bfloat16 with float32
master weights (autocast in PyTorch). Both sides update weights, read random tokens and copy the
loss to the host once per round.

Every contender is a process that stays alive. In each round the contenders run their steps one
after the other, while the others wait. The results are medians over rounds. Peak memory is the
process's resident memory on a CPU and the allocator's peak on a GPU. FLOPs are 6 x matmul weights
per token (with the head) + causal attention (`model/size.py`). MFU refers to the dense bf16 peak in
the maker's data sheet.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm_jax.config import Config

Run = Callable[[int], float]
"""Runs a number of steps and returns the loss of the last step."""

_BETAS, _EPS, _DECAY, _CLIP, _RATE = (0.9, 0.95), 1e-8, 0.1, 1.0, 1e-4


@dataclasses.dataclass
class Contender:
    """A process that holds one model and runs steps on request."""

    name: str
    dtype: str
    process: "subprocess.Popen[str]"
    start_sec: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    loss: float = 0.0

    def ask(self, steps: int) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} {self.dtype} ended with {self.process.wait()}")
        found: dict[str, float] = json.loads(answer)
        return found


def main(arguments: Sequence[str]) -> int:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="mobilellm_125m", help="a file of configs/")
    parser.add_argument("--rows", type=int, default=0, help="default: 2 on CPU, 16 on GPU")
    parser.add_argument("--seq_len", type=int, default=0, help="default: 512 on CPU, 2048 on GPU")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--peers", default="ours,eager,compiled")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=0, help="per round; default: 1 on CPU, 10")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        help="an override of our config, as for `train`: --set=model.remat=full",
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options)

    platform, peak = find_device()
    on_gpu = platform == "gpu"
    options.rows = options.rows or (16 if on_gpu else 2)
    options.seq_len = options.seq_len or (2048 if on_gpu else 512)
    options.steps = options.steps or (10 if on_gpu else 1)
    contenders = [
        start(options, name, dtype)
        for dtype in options.dtypes.split(",")
        for name in options.peers.split(",")
    ]
    for index in range(options.rounds):
        for one in contenders:
            answer = one.ask(options.steps)
            one.seconds.append(answer["seconds"] / options.steps)
            one.peak_bytes, one.loss = int(answer["peak_bytes"]), answer["loss"]
        times = "  ".join(f"{c.name} {c.dtype} {c.seconds[-1]:.3f}" for c in contenders)
        print(f"round {index + 1}: s/step  {times}", flush=True)
    for one in contenders:
        assert one.process.stdin is not None
        one.process.stdin.close()
        one.process.wait()
    report(options, contenders, peak)
    return 0


def start(options: argparse.Namespace, name: str, dtype: str) -> Contender:
    """Starts a contender and lets it compile and warm up alone."""
    command = [
        *(sys.executable, __file__, f"--worker={name}", f"--dtypes={dtype}"),
        *(f"--model={options.model}", f"--rows={options.rows}", f"--seq_len={options.seq_len}"),
        *(f"--set={text}" for text in options.set),
    ]
    # Several processes share the GPU, so none of them may reserve all its memory.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    one = Contender(name, dtype, process)
    one.start_sec = one.ask(2)["seconds"]
    print(f"{name} {dtype}: compiled and warm after {one.start_sec:.0f} s", flush=True)
    return one


def report(
    options: argparse.Namespace, contenders: Sequence[Contender], peak: float | None
) -> None:
    """Prints medians, rates, memory and our ratios."""
    from mobilellm_jax.model.size import flops_per_token

    tokens = options.rows * options.seq_len
    flops = flops_per_token(our_config(options, "float32").model, options.seq_len) * tokens
    print(f"\n{options.model}, {options.rows} x {options.seq_len} tokens, {flops / 1e12:.2f} TFLOP")
    print(
        f"{'':<20}{'s/step':>9}{'tokens/s':>11}{'GFLOP/s':>10}{'MFU':>8}{'peak GiB':>10}{'loss':>9}"
    )
    medians = {}
    for one in contenders:
        median = statistics.median(one.seconds)
        medians[one.name, one.dtype] = median
        share = f"{flops / median / peak:.1%}" if peak else "n/a"
        print(
            f"{one.name + ' ' + one.dtype:<20}{median:>9.3f}{tokens / median:>11,.0f}"
            f"{flops / median / 1e9:>10,.0f}{share:>8}{one.peak_bytes / 2**30:>10.2f}"
            f"{one.loss:>9.3f}"
        )
    for dtype in options.dtypes.split(","):
        ours = medians.get(("ours", dtype))
        peers = [medians[n, dtype] for n in ("eager", "compiled") if (n, dtype) in medians]
        if ours and peers:
            print(f"{dtype}: faster PyTorch / ours {min(peers) / ours:.2f}")


def work(options: argparse.Namespace) -> int:
    """Runs a contender, which reads numbers of steps and answers with seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print to stdout
    name, dtype = options.worker, options.dtypes
    make = ours if name == "ours" else torch_model
    run, memory = make(options, dtype)
    for line in sys.stdin:
        began = time.perf_counter()
        loss = run(int(line))
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "peak_bytes": memory(), "loss": loss}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def our_config(options: argparse.Namespace, dtype: str) -> "Config":
    """Returns the config of `train` on one device with a fixed batch."""
    from mobilellm_jax.cli.config_flags import load_config

    fixed = [
        *("optimizer.warmup_steps=1", "train.steps=1000000", f"optimizer.peak_lr={_RATE}"),
        *(f"train.global_batch={options.rows}", f"data.seq_len={options.seq_len}"),
        *(f"model.compute_dtype={dtype}", f"model.max_seq_len={max(2048, options.seq_len)}"),
    ]
    root = Path(__file__).parent.parent
    return load_config(root / f"configs/{options.model}.py", [*fixed, *options.set])


def ours(options: argparse.Namespace, dtype: str) -> tuple[Run, Callable[[], int]]:
    """Returns our step, set up as in `train`, and a function for its peak memory."""
    config = our_config(options, dtype)
    from mobilellm_jax.startup.host_memory import keep_freed_memory, share_one_heap
    from mobilellm_jax.startup.xla_flags import set_xla_flags

    share_one_heap()
    set_xla_flags(deterministic=config.train.deterministic)
    import jax
    import numpy as np

    from mobilellm_jax.model.on_device import settle
    from mobilellm_jax.sharding import put_batch
    from mobilellm_jax.train.optimizer import make_optimizer
    from mobilellm_jax.train.state import init_state, mesh_of
    from mobilellm_jax.train.step import make_train_step

    device = jax.devices()[0]
    if device.platform == "cpu":
        keep_freed_memory()
    config = settle(config, device)
    print(f"ours {dtype}: attention {config.model.attention}, remat {config.model.remat}")
    mesh, rules = mesh_of(config, [device])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(config, optimizer, mesh, rules)
    step = make_train_step(config, optimizer, mesh, rules, state)
    random = np.random.default_rng(0)

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            tokens, targets = random_batch(random, options, config.model.vocab_size)
            batch = {"tokens": tokens, "targets": targets}
            batch["weights"] = np.ones(tokens.shape, np.float32)
            placed = put_batch(batch, mesh, config.train.global_batch)
            state, metrics = step(state, placed)
        return float(metrics["loss"])

    def memory() -> int:
        statistics_ = device.memory_stats() or {}
        return statistics_.get("peak_bytes_in_use", 0) or resident_peak()

    return run, memory


def torch_model(options: argparse.Namespace, dtype: str) -> tuple[Run, Callable[[], int]]:
    """Returns the step of Hugging Face's Llama, and a function for its peak memory."""
    model_config = our_config(options, dtype).model
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")  # no TF32, as in our step
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model_config.vocab_size,
            hidden_size=model_config.embed_dim,
            intermediate_size=model_config.ffn_dim,
            num_hidden_layers=model_config.num_blocks,
            num_attention_heads=model_config.num_heads,
            num_key_value_heads=model_config.num_kv_heads,
            head_dim=model_config.head_dim,
            max_position_embeddings=model_config.max_seq_len,
            tie_word_embeddings=model_config.tie_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": _DECAY},
        {"params": scales, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=_BETAS, eps=_EPS, fused=True)
    forward = torch.compile(model) if options.worker == "compiled" else model
    random = np.random.default_rng(0)

    def run(steps: int) -> float:
        for _ in range(steps):
            tokens, targets = (
                torch.from_numpy(ids).long().to(device)
                for ids in random_batch(random, options, model_config.vocab_size)
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                # With `shift_labels`, the targets stand at the same places as their tokens.
                loss = forward(input_ids=tokens, shift_labels=targets, labels=targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def memory() -> int:
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()

    return run, memory


def random_batch(random: Any, options: argparse.Namespace, vocab_size: int) -> tuple[Any, Any]:
    """Returns (tokens, targets); all contenders get the same sequence of batches."""
    ids = random.integers(0, vocab_size, (options.rows, options.seq_len + 1), dtype="int32")
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def resident_peak() -> int:
    """Returns the peak of this process's resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def find_device() -> tuple[str, float | None]:
    """Returns the device's platform and, if known, its dense bf16 peak in FLOP/s."""
    # A separate process asks, because this process must not hold the GPU.
    code = (
        "import jax; from mobilellm_jax.train.metrics import peak_flops; "
        "device = jax.devices()[0]; print(device.platform, peak_flops(device) or 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    platform, peak = found.stdout.split()
    return platform, float(peak) or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
