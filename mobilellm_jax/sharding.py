"""The device mesh, and which axis of it each logical axis of an array is split over.

One device is a mesh of one. Modules name logical axes only; `logical_rules` maps them to the mesh
axes (`data`, `fsdp`, `tensor`, `sequence`). Every trace of a model (initialisation, step,
evaluation) happens inside `use`: flax looks the mesh up in JAX's ambient mesh and the rules in a
context of its own, neither is part of jit's cache key, and without them every constraint vanishes
without a word.
"""

import contextlib
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mobilellm_jax.config import ConfigError, MeshConfig, ModelConfig

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def mesh_shape(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the devices along each axis, with -1 replaced by what is left.

    Raises:
      ConfigError: if the sizes do not multiply to `num_devices`.
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = int(np.prod([s for s in sizes.values() if s != -1]))
    if -1 in sizes.values() and num_devices % fixed == 0:
        sizes = {a: num_devices // fixed if s == -1 else s for a, s in sizes.items()}
    if int(np.prod(list(sizes.values()))) != num_devices:
        written = " x ".join(f"mesh.{a}={s}" for a, s in sizes.items())
        raise ConfigError(
            f"{written} must use all {num_devices} devices; set one axis to -1 to take what is "
            "left, or choose sizes whose product is the number of devices."
        )
    return sizes


def make_mesh(mesh: MeshConfig) -> Mesh:
    """Returns the mesh over all devices. Its axes are `Auto`: linen needs the compiler's."""
    shape = mesh_shape(mesh, jax.device_count())
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a [batch, length] array."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def local_rows(mesh: Mesh, global_batch: int) -> slice:
    """Returns the rows of every global batch that this process feeds.

    They follow from the sharding, not from the number of processes: where the batch is not split
    over processes, each of them must feed the same rows.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    indices = sharding.addressable_devices_indices_map((global_batch,)).values()
    rows = [index[0].indices(global_batch) for index in indices if index is not None]
    return slice(min(start for start, _, _ in rows), max(stop for _, stop, _ in rows))


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, global_batch: int
) -> dict[str, jax.Array]:
    """Returns the global arrays of which this process holds the rows in `batch`."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (global_batch, rows.shape[1]))
        for name, rows in batch.items()
    }
