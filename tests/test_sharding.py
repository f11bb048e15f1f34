"""Tests the mesh and its rules. A run trains the same on every mesh."""

import contextlib
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from mobilellm_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mobilellm_jax.model.transformer import Transformer
from mobilellm_jax.sharding import (
    AXES,
    Rules,
    batch_shards,
    bytes_per_device,
    local_rows,
    logical_rules,
    make_mesh,
    mesh_shape,
    put_batch,
    replicated,
)
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import TrainState, abstract_state, init_state
from mobilellm_jax.train.step import make_loss_sums, make_train_step

STEPS = 20
CONFIG = Config(
    model=ModelConfig(
        vocab_size=32,
        embed_dim=24,
        num_blocks=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        ffn_dim=32,
        max_seq_len=16,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=16),
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2),
    train=TrainConfig(steps=STEPS, global_batch=8),
)


def rules_of(model: ModelConfig, **shape: int) -> dict[str, Any]:
    return dict(logical_rules(model, {axis: shape.get(axis, 1) for axis in AXES}))


@pytest.mark.parametrize(
    ("sizes", "num_devices", "shape"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, 8, (1, 4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 1, "sequence": 3}, 12, (2, 2, 1, 3)),
        ({"dcn_data": 2}, 8, (8, 1, 1, 1)),
        ({"dcn_data": 2, "fsdp": 4}, 8, (2, 4, 1, 1)),
        ({"dcn_data": 4, "data": 3, "fsdp": -1}, 24, (12, 2, 1, 1)),
    ],
)
def test_mesh_takes_what_is_left(
    sizes: dict[str, int], num_devices: int, shape: tuple[int, ...]
) -> None:
    found = mesh_shape(MeshConfig(**sizes), num_devices)
    assert list(found.items()) == list(zip(AXES, shape, strict=True))


@pytest.mark.parametrize(
    ("sizes", "written"),
    [
        ({"data": 4}, "mesh.data=4 x mesh.fsdp=1"),  # too few
        ({"data": 8, "tensor": 2}, "mesh.data=8 x mesh.fsdp=1 x mesh.tensor=2"),  # too many
        ({"fsdp": 3}, "mesh.data=-1 x mesh.fsdp=3"),  # 3 does not divide 8 devices
        # twice the devices of this machine
        ({"data": 8, "dcn_data": 2}, "mesh.dcn_data=2 x mesh.data=8"),
        ({"dcn_data": 3}, "mesh.dcn_data=3 x mesh.data=-1"),
    ],
)
def test_mesh_must_use_all_devices(sizes: dict[str, int], written: str) -> None:
    with pytest.raises(ConfigError) as error:
        mesh_shape(MeshConfig(**sizes), 8)
    message = str(error.value)
    assert written in message
    assert "all 8 devices" in message
    assert "set one axis to -1" in message


def test_mesh_is_over_all_devices() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 2}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert batch_shards(mesh) == 4


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Returns as many devices as a mesh asks for."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "fake"
    process_index: int = 0


def accelerators(slices: int, count: int = 8) -> list[Any]:
    """Returns devices that alternate between slices, an order that no mesh should have."""
    return [Accelerator(i, i % slices) for i in range(count)]


def test_each_slice_holds_one_copy_of_the_inner_mesh() -> None:
    mesh = make_mesh(MeshConfig(dcn_data=2, data=2, tensor=2), accelerators(2))
    assert tuple(mesh.shape.values()) == (4, 1, 2, 1)
    assert set(mesh.axis_types) == {AxisType.Auto}
    slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert len({d.id for d in mesh.devices.flat}) == 8


def test_simulated_devices_stand_in_for_slices() -> None:
    mesh = make_mesh(MeshConfig(dcn_data=2, fsdp=2, tensor=2))
    assert tuple(mesh.shape.values()) == (2, 2, 2, 1)
    assert [{d.id for d in half.flat} for half in mesh.devices] == [{0, 1, 2, 3}, {4, 5, 6, 7}]


@pytest.mark.parametrize(("dcn_data", "slices"), [(2, 4), (4, 2), (2, 1)])
def test_dcn_axis_must_be_the_slices_there_are(dcn_data: int, slices: int) -> None:
    with pytest.raises(ConfigError, match=rf"dcn_data={dcn_data} must.* {slices}; set") as error:
        make_mesh(MeshConfig(dcn_data=dcn_data), accelerators(slices))
    assert f"--config.mesh.dcn_data={slices}" in str(error.value)
    # Without a DCN axis, slices do not matter.
    mesh = make_mesh(MeshConfig(fsdp=4), accelerators(slices))
    assert tuple(mesh.shape.values()) == (2, 4, 1, 1)


def test_heads_are_split_only_where_both_kinds_divide() -> None:
    paper = ModelConfig(vocab_size=36_000)  # 9 heads on 3 devices
    for tensor, heads in ((1, "tensor"), (2, None), (3, "tensor"), (4, None)):
        rules = rules_of(paper, tensor=tensor)
        assert (rules["heads"], rules["kv_heads"]) == (heads, heads)
        assert (rules["mlp"], rules["vocab"]) == ("tensor", "tensor")
    eight_over_one = dataclasses.replace(paper, num_heads=8, num_kv_heads=1)
    assert rules_of(eight_over_one, tensor=2)["heads"] is None


def test_embedding_axis_is_split_over_fsdp_and_activations_are_not() -> None:
    rules = rules_of(ModelConfig(), fsdp=2)
    assert (rules["embed"], rules["activation_embed"]) == ("fsdp", None)
    assert (rules["batch"], rules["length"]) == (("data", "fsdp"), "sequence")


def test_every_indivisible_axis_is_named() -> None:
    model = ModelConfig(embed_dim=30, ffn_dim=50, vocab_size=70)
    with pytest.raises(ConfigError) as error:
        rules_of(model, fsdp=4, tensor=4)
    assert str(error.value).splitlines() == [
        "model.embed_dim=30 must be a multiple of mesh.fsdp=4.",
        "model.ffn_dim=50 must be a multiple of mesh.tensor=4.",
        "model.vocab_size=70 must be a multiple of mesh.tensor=4.",
    ]
    assert rules_of(model, fsdp=5, tensor=2)["mlp"] == "tensor"


class _OneOfTwoProcesses:
    """Returns a batch sharding as seen from the process that holds devices 4 to 7."""

    def __init__(self, mesh: Mesh, spec: PartitionSpec) -> None:
        self._whole = jax.sharding.NamedSharding(mesh, spec)

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Any]:
        indices = self._whole.devices_indices_map(shape)
        return {device: index for device, index in indices.items() if device.id >= 4}


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({}, range(8, 16)),
        ({"data": 2, "fsdp": 4}, range(8, 16)),
        # The second process holds other weights and the same rows.
        ({"data": 1, "fsdp": 1, "tensor": 8}, range(16)),
        ({"data": 2, "tensor": 4}, range(8, 16)),
    ],
)
def test_a_process_feeds_the_rows_of_its_devices(
    sizes: dict[str, int], rows: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(MeshConfig(**sizes))
    assert local_rows(mesh, 16).tolist() == list(range(16))  # a single process feeds all rows
    monkeypatch.setattr("mobilellm_jax.sharding.NamedSharding", _OneOfTwoProcesses)
    assert local_rows(mesh, 16).tolist() == list(rows)


def test_rows_of_scattered_devices_have_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = np.array(jax.devices())[[0, 1, 4, 5, 2, 3, 6, 7]].reshape(8, 1, 1, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)
    monkeypatch.setattr("mobilellm_jax.sharding.NamedSharding", _OneOfTwoProcesses)
    assert local_rows(mesh, 16).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def mesh_of(*shape: int) -> Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


ONE = (1, 1, 1, 1)
OPTIMIZER = make_optimizer(CONFIG.optimizer, STEPS)


@functools.cache
def batches() -> list[dict[str, np.ndarray]]:
    """Returns tokens that fix the next token four times in five, so that a model can learn."""
    rng = np.random.default_rng(0)
    follows = rng.permutation(CONFIG.model.vocab_size).astype(np.int32)
    found = []
    for _ in range(STEPS):
        tokens = np.empty((8, 17), np.int32)
        tokens[:, 0] = rng.integers(0, 32, 8)
        for t in range(16):
            random = rng.integers(0, 32, 8)
            tokens[:, t + 1] = np.where(rng.random(8) < 0.2, random, follows[tokens[:, t]])
        weights = (rng.random((8, 16)) < 0.8).astype(np.float32)
        found.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    return found


@functools.cache
def initial_state() -> TrainState:
    mesh = mesh_of(*ONE)
    state: TrainState = jax.device_get(
        init_state(CONFIG, OPTIMIZER, mesh, logical_rules(CONFIG.model, mesh.shape))
    )
    return state


def run_on(mesh: Mesh) -> tuple[TrainState, list[float]]:
    """Returns the state after `STEPS` steps from one initial state, and the losses."""
    rules: Rules = logical_rules(CONFIG.model, mesh.shape)
    abstract = abstract_state(CONFIG, OPTIMIZER, mesh, rules)
    state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), initial_state(), abstract)
    step_fn = make_train_step(CONFIG, OPTIMIZER, mesh, rules, abstract)
    losses = []
    for batch in batches():
        state, metrics = step_fn(state, put_batch(batch, mesh, 8))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def on_one_device() -> tuple[TrainState, list[float]]:
    return run_on(mesh_of(*ONE))


MESHES = {
    "data8": MeshConfig(),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "fsdp4_tensor2": MeshConfig(data=1, fsdp=4, tensor=2),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data4_sequence2": MeshConfig(data=4, sequence=2),
    "dcn2_fsdp2_tensor2": MeshConfig(dcn_data=2, fsdp=2, tensor=2),
}


@pytest.mark.parametrize(
    "name",
    [
        *("fsdp4_tensor2", "data4_sequence2", "dcn2_fsdp2_tensor2"),
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in ("data8", "fsdp8", "data2_fsdp2_tensor2")
        ),
    ],
)
def test_a_run_is_the_same_on_every_mesh(name: str) -> None:
    one_state, one_losses = on_one_device()
    mesh = make_mesh(MESHES[name])
    assert mesh.size == 8
    state, losses = run_on(mesh)
    # Only the order of float32 sums differs.
    np.testing.assert_allclose(losses, one_losses, rtol=1e-5)
    assert losses[0] - losses[-1] > 0.1
    flat, one_flat = (dict(jax.tree_util.tree_leaves_with_path(s)) for s in (state, one_state))
    for path, leaf in flat.items():
        np.testing.assert_allclose(leaf, one_flat[path], atol=1e-5, err_msg=str(path))
    for tree in (state.params, state.optimizer[1][0].mu, state.optimizer[1][0].nu):
        assert_split(tree, *mesh.shape.values())
        assert_bytes_are_counted(tree, mesh)


def assert_bytes_are_counted(tree: Any, mesh: Mesh) -> None:
    """The log shows the bytes that each device holds."""
    held = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {bytes_per_device(tree)}
    # All parameters except the norms are split over fsdp and tensor.
    norms = 4 * 24 * (2 * 2 + 1)
    split = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) - norms
    assert bytes_per_device(tree) == norms + split // (mesh.shape["fsdp"] * mesh.shape["tensor"])


def assert_split(params: Any, data: int, fsdp: int, tensor: int, sequence: int) -> None:
    """Every device holds only its part of every parameter."""
    del data, sequence  # copies
    shapes = {
        "embedding": {"table": (32 // tensor, 24 // fsdp)},
        "blocks": {
            "attention_norm": {"scale": (2, 24)},
            "attention": {
                "query": (2, 24 // fsdp, 4 // tensor, 6),
                "key": (2, 24 // fsdp, 2 // tensor, 6),
                "value": (2, 24 // fsdp, 2 // tensor, 6),
                "output": (2, 4 // tensor, 6, 24 // fsdp),
            },
            "feed_forward_norm": {"scale": (2, 24)},
            "feed_forward": {
                "gate": (2, 24 // fsdp, 32 // tensor),
                "up": (2, 24 // fsdp, 32 // tensor),
                "down": (2, 32 // tensor, 24 // fsdp),
            },
        },
        "final_norm": {"scale": (24,)},
    }
    found = jax.tree.map(lambda x: {s.data.shape for s in x.addressable_shards}, params)
    assert found == jax.tree.map(lambda s: {s}, shapes, is_leaf=lambda s: isinstance(s, tuple))


MESH = MeshConfig(data=1, fsdp=4, tensor=2)


@functools.cache
def on_mesh() -> tuple[Mesh, Rules, TrainState]:
    """Returns a mesh on which the constraints matter, its rules, and the run's state."""
    mesh = make_mesh(MESH)
    rules = logical_rules(CONFIG.model, mesh.shape)
    return mesh, rules, abstract_state(CONFIG, OPTIMIZER, mesh, rules)


def constraints(entered: Any, *arguments: Any) -> int:
    """Returns the sharding constraints in the lowered program of a function."""
    return int(entered.lower(*arguments).as_text().count("sdy.sharding_constraint"))


def step_constraints(config: Config = CONFIG, rules: Rules | None = None) -> int:
    mesh, own, abstract = on_mesh()
    step_fn = make_train_step(config, OPTIMIZER, mesh, own if rules is None else rules, abstract)
    return constraints(step_fn, abstract, batches()[0])


def loss_constraints(rules: Rules | None = None) -> int:
    mesh, own, abstract = on_mesh()
    loss_sums = make_loss_sums(CONFIG, mesh, own if rules is None else rules, 8)
    return constraints(loss_sums, abstract.params, batches()[0])


# The embedding table and its rows, and queries, feed-forward and output in the scanned block.
IN_MODEL = 2 + 3
IN_LOSS = IN_MODEL + 1  # the head, gathered
# Once forward, once for the gradient; then the sum of the head's gradients before the first chunk,
# after each and after the last.
IN_STEP = 2 * IN_MODEL + 1 + 3


@pytest.mark.filterwarnings("ignore:.with mesh.:DeprecationWarning")
@pytest.mark.parametrize("around", ["nothing", "another mesh", "another legacy mesh", "no rules"])
def test_constraints_reach_the_program_whatever_surrounds_the_call(around: str) -> None:
    """Flax silently leaves the constraints out if it finds no mesh or no rules."""
    assert jax.sharding.get_abstract_mesh().empty
    surroundings: dict[str, Any] = {
        "nothing": contextlib.nullcontext(),
        "another mesh": jax.set_mesh(mesh_of(*ONE)) if around == "another mesh" else None,
        "another legacy mesh": mesh_of(*ONE),
        "no rules": nn.logical_axis_rules(()),
    }
    with surroundings[around]:
        assert step_constraints() == IN_STEP
        assert loss_constraints() == IN_LOSS
        if around == "nothing":
            # Each input of a micro-batch stays on the device that holds its rows.
            train = dataclasses.replace(CONFIG.train, accumulation_steps=2)
            parts = dataclasses.replace(CONFIG, train=train)
            assert step_constraints(parts) == IN_STEP + len(batches()[0])


def test_constraints_reach_the_program_after_a_trace_without_rules() -> None:
    """A trace without rules must not serve a later call with rules."""
    assert step_constraints(rules=()) == 0
    assert loss_constraints(rules=()) == 0
    assert step_constraints() == IN_STEP
    assert loss_constraints() == IN_LOSS
    mesh, rules, abstract = on_mesh()
    step_fn = make_train_step(CONFIG, OPTIMIZER, mesh, rules, abstract)
    loss_sums = make_loss_sums(CONFIG, mesh, rules, 8)
    with jax.set_mesh(mesh):  # the same mesh, so that only the rules differ
        step_fn.jitted.lower(abstract, batches()[0])
        loss_sums.jitted.lower(abstract.params, batches()[0])
    assert constraints(step_fn, abstract, batches()[0]) == IN_STEP
    assert constraints(loss_sums, abstract.params, batches()[0]) == IN_LOSS


def test_constraints_reach_the_program_that_runs() -> None:
    """Tests the first call after the same model ran with no mesh around, as sampling does."""
    mesh, rules, abstract = on_mesh()
    model = Transformer(CONFIG.model)
    jax.jit(lambda p, t: model.apply({"params": p}, t))(
        initial_state().params, batches()[0]["tokens"]
    )
    state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), initial_state(), abstract)
    batch = put_batch(batches()[0], mesh, 8)
    step_fn = make_train_step(CONFIG, OPTIMIZER, mesh, rules, abstract)
    state, _ = step_fn(state, batch)
    assert constraints(step_fn, state, batch) == IN_STEP  # jit kept the trace of this call
    for shards in jax.tree.leaves(state.params["blocks"]["feed_forward"]):
        assert {shard.data.size for shard in shards.addressable_shards} == {shards.size // 8}


def test_an_initial_state_is_the_same_on_every_mesh() -> None:
    mesh = mesh_of(1, 4, 2, 1)
    state = init_state(CONFIG, OPTIMIZER, mesh, logical_rules(CONFIG.model, mesh.shape))
    assert_split(state.params, *mesh.shape.values())
    # XLA may compute the normal distribution differently on arrays of another shape.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
        jax.device_get(state),
        initial_state(),
    )


def test_batch_is_split_over_data_fsdp_and_sequence() -> None:
    mesh = mesh_of(2, 2, 1, 2)
    rows = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
    placed = put_batch({"tokens": rows}, mesh, 8)["tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 8)}
    whole = jax.device_put(rows, replicated(mesh))
    assert {s.data.shape for s in whole.addressable_shards} == {(8, 16)}
    with pytest.raises(ValueError, match="has 4 rows, and this process feeds 8 of 8"):
        put_batch({"tokens": rows[:4]}, mesh, 8)
