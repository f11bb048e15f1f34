"""The device mesh, and which axis of it each logical axis of an array is split over.

One device is a mesh of one. Where devices come in slices that only a slower network joins (TPU
slices, GPU hosts: DCN), `mesh.dcn_data` copies the mesh onto each of them along `data`, so that
gradients alone cross that network, once per step.

Modules name logical axes only; `logical_rules` maps them to the mesh axes (`data`, `fsdp`,
`tensor`, `sequence`). Every trace of a model (initialisation, step, evaluation) happens inside
`use`: flax looks the mesh up in JAX's ambient mesh and the rules in a context of its own, neither
is part of jit's cache key, and without them every constraint vanishes without a word.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, cast

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from mobilellm_jax.config import Config, ConfigError, MeshConfig, ModelConfig
from mobilellm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")
P = ParamSpec("P")
Result = TypeVar("Result")
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def mesh_shape(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the devices along each axis, with -1 replaced by what is left.

    `data` counts the slices too: it is `mesh.dcn_data` times the `mesh.data` of one slice.

    Raises:
      ConfigError: if the sizes do not multiply to `num_devices`.
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = int(np.prod([s for s in sizes.values() if s != -1])) * mesh.dcn_data
    if -1 in sizes.values() and num_devices % fixed == 0:
        sizes = {a: num_devices // fixed if s == -1 else s for a, s in sizes.items()}
    if int(np.prod(list(sizes.values()))) * mesh.dcn_data != num_devices:
        written = " x ".join(f"mesh.{a}={s}" for a, s in sizes.items())
        if mesh.dcn_data > 1:
            written = f"mesh.dcn_data={mesh.dcn_data} x {written}"
        raise ConfigError(
            f"{written} must use all {num_devices} devices; set one axis to -1 to take what is "
            "left, or choose sizes whose product is the number of devices."
        )
    return {**sizes, "data": sizes["data"] * mesh.dcn_data}


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices`, by default all there are.

    Its axes are `Auto`: linen needs the compiler's.

    Raises:
      ConfigError: if the sizes do not fit the devices, or `mesh.dcn_data` not their slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(mesh, len(devices))
    inner = (shape["data"] // mesh.dcn_data, *(shape[axis] for axis in AXES[1:]))
    parts = [
        mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
        for part in _parts(mesh.dcn_data, devices)
    ]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Returns the number of groups of devices that only DCN joins; 1 where none are known."""
    return len({getattr(device, "slice_index", None) for device in devices})


def _parts(dcn_data: int, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Returns the devices of each part of a mesh with a DCN axis: one slice each.

    CPU devices stand in for slices of any size, in order, for tests and plans.
    """
    if dcn_data == 1:
        return [list(devices)]
    slices = count_slices(devices)
    if slices != dcn_data and not (slices == 1 and devices[0].platform == "cpu"):
        raise ConfigError(
            f"mesh.dcn_data={dcn_data} must be the number of slices that the devices come in, "
            f"which is {slices}; set --config.mesh.dcn_data={slices}, or 1 for a mesh that takes "
            "no notice of them."
        )
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", None) or 0, d.id))
    size = len(ordered) // dcn_data
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def logical_rules(model: ModelConfig, shape: Mapping[str, int]) -> Rules:
    """Returns logical axis -> mesh axis for a model on a mesh of this shape.

    Heads are split over `tensor` only when both kinds divide: padding 9 heads to 12 would cost
    more than copying the smallest matrices of the block. The feed-forward and the vocabulary, where
    most of a small model's weights are, must divide.

    Raises:
      ConfigError: if `fsdp` or `tensor` does not divide the axes it splits.
    """
    wrong = [
        f"model.{field}={getattr(model, field)} must be a multiple of mesh.{axis}={shape[axis]}."
        for field, axis in (("embed_dim", "fsdp"), ("ffn_dim", "tensor"), ("vocab_size", "tensor"))
        if getattr(model, field) % shape[axis]
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    divides = model.num_heads % shape["tensor"] == 0 and model.num_kv_heads % shape["tensor"] == 0
    heads = "tensor" if divides else None
    return (
        ("batch", BATCH_AXES),
        ("length", "sequence"),
        ("activation_embed", None),
        ("embed", "fsdp"),
        ("heads", heads),
        ("kv_heads", heads),
        ("head_dim", None),
        ("mlp", "tensor"),
        ("vocab", "tensor"),
        ("norm", None),
        ("blocks", None),
    )


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Makes `mesh` and `rules` the ones that every trace inside the block sees."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def with_rules(function: Callable[P, Result], rules: Rules) -> Callable[P, Result]:
    """Returns the function with `rules` inside it, for jit.

    The ambient mesh is part of jit's cache key and rules are not: with the rules around the call
    only, a trace made once under the mesh without them would serve every later call.
    """

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> Result:
        with nn.logical_axis_rules(rules):
            return function(*args, **kwargs)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a [batch, length] array."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def batch_violations(config: Config, mesh: Mesh) -> list[str]:
    """Returns why the config's batches cannot be spread over the mesh, one message per reason."""
    train, shards = config.train, batch_shards(mesh)
    violations = []
    if train.global_batch % (shards * train.accumulation_steps):
        violations.append(
            f"train.global_batch={train.global_batch} must be a multiple of mesh.data x mesh.fsdp "
            f"({shards}) x train.accumulation_steps ({train.accumulation_steps}); choose a "
            f"multiple of {shards * train.accumulation_steps}."
        )
    if config.data.seq_len % mesh.shape["sequence"]:
        violations.append(
            f"data.seq_len={config.data.seq_len} must be a multiple of "
            f"mesh.sequence={mesh.shape['sequence']}."
        )
    return violations


def local_rows(mesh: Mesh, global_batch: int) -> NDArray[np.int64]:
    """Returns the rows of every global batch that this process feeds, ascending.

    They follow from the sharding, not from the number of processes: where the batch is not split
    over processes, each of them must feed the same rows, and where a host's devices lie scattered
    in the mesh (a TPU's torus), its rows have gaps.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    indices = sharding.addressable_devices_indices_map((global_batch,)).values()
    rows = [np.arange(global_batch)[index] for index in indices if index is not None]
    return np.unique(np.concatenate(rows))


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, global_batch: int
) -> dict[str, jax.Array]:
    """Returns the global arrays of which this process holds the rows in `batch`.

    Raises:
      UserError: if those cannot be the rows that `local_rows` asks for.
    """
    sharding = batch_sharding(mesh)
    own = local_rows(mesh, global_batch)

    def spread(name: str, rows_BT: np.ndarray) -> jax.Array:
        if len(rows_BT) != len(own):
            raise UserError(
                f"batch[{name!r}] has {len(rows_BT)} rows, and this process feeds {len(own)} of "
                f"{global_batch}; read them with rows=local_rows(...)."
            )

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "jax asks for the parts of this process's devices only"
            start, stop, _ = index[0].indices(global_batch)
            first = int(np.searchsorted(own, start))
            return rows_BT[first : first + stop - start, index[1]]

        shape = (global_batch, *rows_BT.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: spread(name, rows_BT) for name, rows_BT in batch.items()}


def place(value: jax.Array | np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array that every process holds whole, spread like `like`."""
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, like.sharding, lambda index: whole[index])


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that each device holds of a tree of (abstract) arrays."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    sizes = [int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves]
    return sum(sizes)


@dataclasses.dataclass(frozen=True)
class UnderMesh(Generic[Result]):
    """A jitted function that is always traced under its own mesh and rules.

    `lower` returns the program without running it.
    """

    jitted: jax.stages.Wrapped
    mesh: Mesh
    rules: Rules

    def __call__(self, *arguments: Any) -> Result:
        with use(self.mesh, self.rules):
            return cast(Result, self.jitted(*arguments))

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        with use(self.mesh, self.rules):
            return self.jitted.lower(*arguments)
