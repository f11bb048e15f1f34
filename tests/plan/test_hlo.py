"""Reads programs with known transfers: compiled for eight CPU devices, or from a text."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mobilellm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from mobilellm_jax.plan.compiled import lower_step
from mobilellm_jax.plan.hlo import Collective, Program, read_program

DEVICES = 8
CONFIG = Config(
    model=ModelConfig(
        vocab_size=128,
        embed_dim=32,
        num_blocks=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=48,
        max_seq_len=32,
        compute_dtype="float32",
        attention="xla",
    ),
    data=DataConfig(seq_len=32),
    train=TrainConfig(global_batch=8, loss_chunk=8),  # four chunks of 8 positions
)


def line_of_devices() -> Mesh:
    return jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))


def read(function: Any, shape: tuple[int, ...], out: PartitionSpec) -> Program:
    """Returns the program of a function of one float32 array that eight devices share."""
    mesh = line_of_devices()
    split = PartitionSpec("x")
    local = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=out, check_vma=False)
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, split))
    return read_program(jax.jit(local).lower(array).compile().as_text())


# 64 x 10 float32 numbers are 2,560 bytes, and the part of a device is 320 bytes.
@pytest.mark.parametrize(
    ("kind", "function", "payload", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "x", tiled=True), 2560, 7 * 320),
        ("all-reduce", lambda x: jax.lax.psum(x, "x"), 320, 2 * 7 * 320 // 8),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "x", scatter_dimension=0, tiled=True),
            320,
            7 * 320 // 8,
        ),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), 320, 7 * 320 // 8),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            320,
            320,
        ),
    ],
)
def test_every_kind_of_transfer(kind: str, function: Any, payload: int, sent: int) -> None:
    (found,) = read(function, (64, 10), PartitionSpec("x")).collectives
    assert (found.kind, found.payload_bytes, found.times) == (kind, payload, 1)
    assert found.wire_bytes == sent
    if kind != "collective-permute":
        assert found.group == DEVICES


def test_a_transfer_counts_as_often_as_the_loops_around_it_run() -> None:
    def inner(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return jnp.sin(jax.lax.psum(total * x, "x")), None

    def outer(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        total = jnp.cos(jax.lax.pmax(total, "x"))
        return jax.lax.scan(inner, total, jnp.arange(5.0))[0], None

    def function(x: jax.Array) -> jax.Array:
        return jax.lax.scan(outer, x, jnp.arange(3.0))[0]

    program = read(function, (16, 4), PartitionSpec("x"))
    assert sorted(c.times for c in program.collectives) == [3, 3 * 5]
    assert program.unknown_loops == 0


def test_a_loop_of_unknown_length_is_counted_once_and_reported() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(
            lambda y: jnp.sum(y) < 3.0, lambda y: jax.lax.psum(y, "x") + 1.0, x
        )

    program = read(function, (16, 4), PartitionSpec("x"))
    assert [c.times for c in program.collectives if c.payload_bytes > 4] == [1]
    assert program.unknown_loops == 1


@functools.cache
def step_on(**mesh: int) -> tuple[Collective, ...]:
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(**mesh))
    lowered = lower_step(config, jax.devices())
    return read_program(lowered.compile().as_text()).collectives


def test_pure_data_parallelism_reduces_gradients_and_gathers_nothing() -> None:
    found = step_on(data=8)
    assert {c.kind for c in found} == {"all-reduce"}
    block = 32 * 8 * (2 + 1 + 1) + 2 * 8 * 32 + 3 * 32 * 48 + 2 * 32
    table, norm, targets = 128 * 32, 32, 1
    # The gradient of the table is reduced once for the embedding, and once per chunk for the head,
    # together with the loss of the chunk. There are four chunks.
    numbers = 3 * block + table + 4 * (table + 1) + norm + targets
    assert sum(c.payload_bytes * c.times for c in found) == 4 * numbers


def test_fsdp_gathers_weights_where_they_are_used_and_the_head_once() -> None:
    gathered = [c for c in step_on(data=1, fsdp=8) if c.kind == "all-gather"]
    head = [c for c in gathered if c.shape == "f32[128,32]"]
    assert sum(c.times for c in head) == 1
    matrices = {"f32[32,2,8]", "f32[32,1,8]", "f32[2,8,32]", "f32[32,48]", "f32[48,32]"}
    assert {c.shape for c in gathered} - {"f32[128,32]"} == matrices
    assert {c.times for c in gathered if c.shape in matrices} == {3}  # number of blocks
    # The 7 matrices of a block are gathered once forward and once backward.
    assert len(gathered) - len(head) == 2 * 7


TPU_TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused (p: bf16[8,16]) -> bf16[64,16] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.1 = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}, \
metadata={op_name="jit(step)/while/body/block/dot_general" stack_frame_id=1}
}

%fused.2 (p: bf16[8,16]) -> bf16[64,16] {
  %p.2 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.2 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=7, \
replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%condition (arg: (s32[], bf16[8,16])) -> pred[] {
  %arg = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %trips = s32[]{:T(128)} constant(30)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %trips), direction=LT
}

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg.2 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %g = bf16[8,16]{1,0} get-tuple-element(%arg.2), index=1
  %f.1 = bf16[64,16]{1,0} fusion(%g), kind=kOutput, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %f.2 = bf16[64,16]{1,0} fusion(%g), kind=kOutput, calls=%fused.2, \
backend_config={"window_config":{"estimated_cycles":"20"}}
  %splash_fwd.3 = bf16[8,16]{1,0} custom-call(%g), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%g, %splash_fwd.3)
}

ENTRY %main (a: bf16[8,16]) -> f32[] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (f32[4,2]{1,0}, f32[32,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
all-gather-start(%a), channel_id=9, replica_groups=[2,8]<=[16], dimensions={0}
  %done = f32[32,2]{1,0} all-gather-done(%start)
  %t = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%a, %a)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%t), condition=%condition, body=%body
  %both = (f32[6]{0:T(128)}, /*index=1*/f8e4m3fn[3]{0}, s4[2,2]{1,0}, pred[]) \
all-reduce(%a, %a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, \
backend_config={"estimated_cycles":"7"}
  ROOT %r = f32[]{:T(128)} constant(0)
}
"""


def test_a_program_for_tpus() -> None:
    """The text has trips in a condition, a transfer in two fusions, and a start with operands."""
    program = read_program(TPU_TEXT)
    assert program.estimated_cycles == 30 * (100 + 20) + 7
    assert program.kernels == {"splash_fwd": 30}
    assert program.unknown_loops == 0
    start, gathered, both = program.collectives
    assert (start.kind, start.shape, start.group, start.times) == ("all-gather", "f32[32,2]", 8, 1)
    assert start.payload_bytes == 32 * 2 * 4
    assert (gathered.shape, gathered.group, gathered.times) == ("bf16[64,16]", 8, 30)
    assert gathered.wire_bytes == 30 * 64 * 16 * 2 * 7 // 8
    assert gathered.origin == "jit(step)/while/body/block/dot_general"
    assert (both.payload_bytes, both.group) == (6 * 4 + 3 + 2 + 1, 4)
    assert both.shape == "f32[6], f8e4m3fn[3], s4[2,2], pred[]"


def test_without_estimates_the_cycles_are_none() -> None:
    assert read(lambda x: x + 1, (8, 1), PartitionSpec("x")).estimated_cycles is None


def test_text_that_is_no_program() -> None:
    with pytest.raises(ValueError, match="not an HLO module"):
        read_program("nothing of the kind")
