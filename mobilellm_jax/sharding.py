"""The device mesh, and the rules that map logical axes of arrays to mesh axes.

A slower network (DCN) may connect slices of devices, such as TPU slices or GPU hosts. With
`mesh.dcn_data` slices, every slice holds a mesh of the same shape, and the axis `data` continues
from slice to slice. Only gradients then cross the slower network, once per step.

Modules name logical axes only; `logical_rules` maps them to the mesh axes (`data`, `fsdp`,
`tensor`, `sequence`). Every trace of a model (initialisation, step, evaluation) must happen inside
`use`, because flax reads the mesh and the rules from the context of the trace. Without this
context, flax ignores every sharding constraint silently.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from mobilellm_jax.config import ConfigError, MeshConfig, ModelConfig
from mobilellm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")
Result = TypeVar("Result")
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def mesh_shape(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the number of devices along each axis; a size of -1 takes the remaining devices.

    The returned size of `data` is `mesh.data` (for one slice) times `mesh.dcn_data`. The sizes must
    multiply to `num_devices`.
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = math.prod(s for s in sizes.values() if s != -1) * mesh.dcn_data
    if -1 in sizes.values() and num_devices % fixed == 0:
        sizes = {a: num_devices // fixed if s == -1 else s for a, s in sizes.items()}
    if math.prod(sizes.values()) * mesh.dcn_data != num_devices:
        written = " x ".join(f"mesh.{a}={s}" for a, s in sizes.items())
        if mesh.dcn_data > 1:
            written = f"mesh.dcn_data={mesh.dcn_data} x {written}"
        raise ConfigError(
            f"{written} must use all {num_devices} devices; set one axis to -1 to take the "
            "remaining devices, or choose sizes whose product is the number of devices."
        )
    return {**sizes, "data": sizes["data"] * mesh.dcn_data}


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices`, or over all devices if None.

    The axes have type `Auto`, because flax.linen leaves the sharding to the compiler. Sizes or a
    `mesh.dcn_data` that do not fit the devices raise a `ConfigError`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(mesh, len(devices))
    inner = (shape["data"] // mesh.dcn_data, *(shape[axis] for axis in AXES[1:]))
    parts = [
        mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
        for part in _parts(mesh.dcn_data, devices)
    ]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: Iterable[jax.Device]) -> int:
    """Returns the number of slices that the devices belong to; 1 if JAX reports no slices."""
    return len({getattr(device, "slice_index", None) for device in devices})


def _parts(dcn_data: int, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Returns the devices of each slice; CPU devices are divided equally, for tests and plans."""
    if dcn_data == 1:
        return [list(devices)]
    slices = count_slices(devices)
    if slices != dcn_data and not (slices == 1 and devices[0].platform == "cpu"):
        raise ConfigError(
            f"mesh.dcn_data={dcn_data} must be the number of slices of the devices, which "
            f"is {slices}; set --config.mesh.dcn_data={slices}, or 1 for a mesh that ignores the "
            "slices."
        )
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", None) or 0, d.id))
    size = len(ordered) // dcn_data
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def logical_rules(model: ModelConfig, shape: Mapping[str, int]) -> Rules:
    """Returns the mesh axis of each logical axis, for a model on a mesh of this shape.

    The mesh splits heads over `tensor` only if its size divides both `num_heads` and
    `num_kv_heads`. Otherwise every device holds all heads, because padding 9 heads to 12 would cost
    more than copies of the attention matrices. The size of `tensor` must divide `ffn_dim` and
    `vocab_size`, because the feed-forward and vocabulary matrices hold most weights of a small
    model.

    Raises:
      ConfigError: if `fsdp` or `tensor` does not divide an axis that it must split.
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
    """Sets the mesh and the rules for all functions that jax traces inside the `with` statement."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a [batch, length] array."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: Mesh, global_batch: int) -> NDArray[np.int64]:
    """Returns the numbers of the rows that this process feeds to a global batch, ascending.

    The sharding determines the rows; the number of processes alone does not. All processes feed the
    same rows if the mesh does not split the batch between processes. The row numbers have gaps if
    the devices of the process are not neighbours in the mesh, as on a TPU torus.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    indices = sharding.addressable_devices_indices_map((global_batch,)).values()
    rows = [np.arange(global_batch)[index] for index in indices if index is not None]
    return np.unique(np.concatenate(rows))


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, global_batch: int
) -> dict[str, jax.Array]:
    """Returns global arrays from this process's rows, whose numbers `local_rows` returns."""
    own = len(local_rows(mesh, global_batch))
    placed = {}
    for name, rows_BT in batch.items():
        if len(rows_BT) != own:
            raise UserError(
                f"batch[{name!r}] has {len(rows_BT)} rows, and this process feeds {own} of "
                f"{global_batch}; read them with rows=local_rows(...)."
            )
        placed[name] = jax.make_array_from_process_local_data(
            batch_sharding(mesh), rows_BT, (global_batch, *rows_BT.shape[1:])
        )
    return placed


def place(value: jax.Array | np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array with the sharding of `like`; every process passes the whole value."""
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, like.sharding, lambda index: whole[index])


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes per device of a tree of arrays or abstract arrays."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


@dataclasses.dataclass(frozen=True)
class UnderMesh(Generic[Result]):
    """A jitted function that is always traced under its own mesh."""

    jitted: jax.stages.Wrapped
    mesh: Mesh

    def __call__(self, *arguments: Any) -> Result:
        with jax.set_mesh(self.mesh):
            return cast(Result, self.jitted(*arguments))

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*arguments)


def jit_under(
    mesh: Mesh, rules: Rules, function: Callable[..., Result], **options: Any
) -> UnderMesh[Result]:
    """Compiles a function by `jax.jit(function, **options)` for a mesh and its rules.

    `jax.jit` distinguishes cached traces by their mesh, but not by their rules. If only the caller
    set the rules, `jax.jit` could reuse an earlier trace without the rules. So the traced function
    sets the rules itself.
    """

    @functools.wraps(function)
    def traced(*arguments: Any) -> Result:
        with nn.logical_axis_rules(rules):
            return function(*arguments)

    return UnderMesh(jax.jit(traced, **options), mesh)
