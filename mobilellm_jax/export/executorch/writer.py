"""Writes `model.pte`, an ExecuTorch program for the XNNPACK backend with a cache of fixed size.

The program has one method, `forward(tokens[1, T], start[1]) -> logits[1, T, V]`. A call takes at
most `CHUNK` tokens, which have the positions `start`, `start + 1`, ... The file contains the size
of the cache, but no cache contents. A token attends only to itself and to earlier positions, so a
call with `start` = 0 starts a new sequence and needs no cleared cache.

Tied embeddings are stored once, in the file `model.ptd`, because the embedding lookup and XNNPACK
can share weights only if these are in such a file of named data. In memory, XNNPACK keeps its own
copy of every weight.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  # Registers llama::.
from torch import Tensor, nn
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_api import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.export.source import check_groups
from mobilellm_jax.export.torch_decoder import TorchDecoder
from mobilellm_jax.model.opened import OpenedModel

CHUNK = 128
"""The largest number of tokens per call; more tokens' logits would fill a phone's memory."""

_SHORTEST = 4
_GROUP = 32  # Number of 4-bit weights in a row that have one scale together.
_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # The stubs of torch lack int4.


def write(source: OpenedModel, folder: Path, precision: str) -> int:
    """Writes the program and, if needed, `model.ptd`; returns how many blocks they contain."""
    config = source.config
    if config.max_seq_len < _SHORTEST:
        raise UserError(
            f"model.max_seq_len={config.max_seq_len} must be at least {_SHORTEST} for "
            "--format=executorch; --format=litert has no such bound."
        )
    if precision == "8da4w":
        check_groups(config, _GROUP, precision, "--quantize=8da8w")
    file = folder / "model.pte"
    program = _Program(config, TorchDecoder(config, source.params)).eval()
    _quantize(program.decoder, precision)
    with warnings.catch_warnings(action="ignore"):  # Both libraries warn about each other.
        lowered = _lowered(program, config, file.stem)
    with file.open("wb") as out:
        lowered.write_to_file(out)
    lowered.write_tensor_data_to_file(str(folder))
    return config.num_blocks


def _lowered(program: "_Program", config: ModelConfig, data: str) -> Any:
    """Returns the finished program, whose tied embeddings belong in the file `data`.ptd."""
    exported = _exported(program, config)
    if config.tie_embeddings:
        _store_beside(exported, data)
    edge: Any = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        # The validity check would refuse the llama:: operators that update and read the cache.
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    table = (config.vocab_size, config.embed_dim)

    def beside(node: Any) -> str | None:
        return data if tuple(node.meta["val"].shape) == table else None

    return edge.to_executorch(
        ExecutorchBackendConfig(
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            # Without this pass, XNNPACK treats the lookup in a quantized table as a matrix
            # multiplication, and it has no kernel for this multiplication.
            do_quant_fusion_and_const_prop=True,
            external_constants=beside if config.tie_embeddings else False,
        )
    )


class _Program(nn.Module):
    """The decoder with its cache: key and value buffers for each application of a block."""

    def __init__(self, config: ModelConfig, decoder: TorchDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.capacity = config.max_seq_len
        for slot in range(config.applied_depth):
            shape = (1, config.max_seq_len, config.num_kv_heads, config.head_dim)
            for name in ("keys", "values"):
                self.register_buffer(f"{name}_{slot}", torch.zeros(shape), persistent=False)

    def forward(self, tokens_1T: Tensor, start_1: Tensor) -> Tensor:
        start: Any = start_1[0].item()
        length = tokens_1T.shape[1]
        check: Any = torch._check  # The exporter cannot derive these bounds itself.
        check(start >= 0)
        check(start < self.capacity)
        check(start + length <= self.capacity)

        def attend(slot: int, q_1TNH: Tensor, k_1TKH: Tensor, v_1TKH: Tensor) -> Tensor:
            k_1SKH, v_1SKH = getattr(self, f"keys_{slot}"), getattr(self, f"values_{slot}")
            torch.ops.llama.update_cache(k_1TKH, k_1SKH, start)
            torch.ops.llama.update_cache(v_1TKH, v_1SKH, start)
            out_1TNH: Tensor = torch.ops.llama.custom_sdpa(
                q_1TNH, k_1SKH, v_1SKH, start, None, 0.0, True
            )
            return out_1TNH

        cos_TH = self.decoder.cos_SH.narrow(0, start, length)
        sin_TH = self.decoder.sin_SH.narrow(0, start, length)
        logits_1TV: Tensor = self.decoder(tokens_1T, cos_TH, sin_TH, attend)
        return logits_1TV


def _quantize(decoder: TorchDecoder, precision: str) -> None:
    """Quantizes the weights in place; the program quantizes activations, token by token."""
    if precision == "float32":
        return
    table = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    quantize_(decoder, table, lambda module, _: isinstance(module, nn.Embedding))
    rows = Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))
    groups = Int8DynamicActivationIntxWeightConfig(_INT4, PerGroup(_GROUP))
    blocks = {"8da8w": rows, "8da4w": groups}[precision]
    # The head has 8-bit weights, like the embedding table: in a tied model, both are one matrix.
    quantize_(decoder, rows, lambda module, _: module is decoder.head)
    quantize_(decoder.blocks, blocks)


def _exported(program: _Program, config: ModelConfig) -> torch.export.ExportedProgram:
    longest = min(CHUNK, config.max_seq_len)
    # The example has neither 1 token nor the largest number of tokens, because the exporter could
    # turn these numbers into constants.
    tokens_1T = torch.zeros(1, max(2, longest - 1), dtype=torch.long)
    length = torch.export.Dim("length", min=1, max=longest)
    with torch.no_grad():
        return torch.export.export(
            program,
            (tokens_1T, torch.zeros(1, dtype=torch.long)),
            dynamic_shapes=({1: length}, None),
        )


def _store_beside(exported: torch.export.ExportedProgram, tag: str) -> None:
    """Marks the head's weights for the file `tag`.ptd, which also holds the embedding table."""
    head = [node for node in exported.graph.nodes if node.target is torch.ops.aten.linear.default]
    pending = [head[-1].args[1]]
    while pending:  # Visits the weights and all nodes that they are computed from.
        node = pending.pop()
        node.meta.setdefault("custom", {})["delegate_constant_tag"] = tag
        pending.extend(node.all_input_nodes)
