"""The mesh, and where each array lives on it: path rules, so that the model says no more than `by_rows`.

Axes: `data` holds copies of the parameters, `fsdp` cuts them (and their optimizer state) up,
`tensor` splits heads and feed-forward layers. The batch is split over `data` and `fsdp`.
"""

import functools
import math
import re

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from electra_jax.config import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# First match wins; the axes belong to the last dimensions of the parameter, a scanned layer axis in front
# stays whole. What no rule names is replicated: norms, biases and the small tables.
_RULES = (
    (r"word_embeddings/embedding$", ("tensor", "fsdp")),
    (r"attention/qkv_kernel$", ("fsdp", None, "tensor")),
    (r"attention/qkv_bias$", (None, "tensor")),
    (r"attention/out/kernel$", ("tensor", "fsdp")),
    (r"ffn/in/kernel$", ("fsdp", "tensor")),
    (r"ffn/in/bias$", ("tensor",)),
    (r"ffn/out/kernel$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", None)),
)


def make_mesh(mesh, devices=None) -> Mesh:
    """Builds the mesh of the config's `mesh` section; one axis may be -1 and takes the devices left.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: mesh[axis] for axis in AXES}
    fields = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"{fields}: only one axis may be -1.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        needed = f"a multiple of {fixed}" if open_axes else f"{fixed}"
        raise UserError(f"{fields} needs {needed} devices, but there are {len(devices)}: "
                        "change one of them, or set mesh.data=-1.")
    # Auto axes: linen modules and plain jnp code let the compiler place what the rules leave open.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_divides(config, mesh: Mesh) -> None:
    """Raises UserError when the batch, heads or feed-forward width do not divide over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    accumulation = config.optimizer.accumulation_steps
    if config.data.batch_size % (shards * accumulation):
        steps = f" x optimizer.accumulation_steps={accumulation}" if accumulation > 1 else ""
        raise UserError(f"data.batch_size={config.data.batch_size} does not divide by mesh.data x mesh.fsdp = "
                        f"{shards}{steps}: change data.batch_size to a multiple of {shards * accumulation}.")
    for field in ("num_heads", "intermediate_size", "hidden_size"):
        if config.model[field] % mesh.shape["tensor"]:
            raise UserError(f"model.{field}={config.model[field]} does not divide by mesh.tensor="
                            f"{mesh.shape['tensor']}: change one of them.")
    if config.model.hidden_size % mesh.shape["fsdp"]:
        raise UserError(f"model.hidden_size={config.model.hidden_size} does not divide by mesh.fsdp="
                        f"{mesh.shape['fsdp']}: change one of them.")


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of the parameter (or its moment) at `path`.

    An axis that does not divide its dimension is left out: the narrow generator is then replicated there.
    """
    for pattern, axes in _RULES:
        if re.search(pattern, path):
            axes = (None,) * (len(shape) - len(axes)) + axes
            return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None
                                   for axis, size in zip(axes, shape, strict=True)))
    return PartitionSpec()


def path_name(path) -> str:
    """Joins a tree path into "a/b/c"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def state_shardings(abstract_state, mesh: Mesh):
    """Maps a tree of shapes (parameters, moments, counters) to a tree of NamedShardings by path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec(path_name(path), x.shape, mesh)), abstract_state)


def batch_sharding(mesh: Mesh, stacked: bool = False) -> NamedSharding:
    """Rows over `data` and `fsdp`; `stacked` batches have the steps in front, which stay whole."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES) if stacked else PartitionSpec(BATCH_AXES))


def context_mesh() -> AbstractMesh | None:
    """The mesh that a program is being traced for; None without one, or with one of the caller's own axes."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names == AXES and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if ours else None


def by_rows(x: jax.Array) -> jax.Array:
    """Says that activations [B, ...] are split by rows, as the batch is, and whole in all else; without a mesh nothing.

    Left to itself the compiler takes over the split of the first table it meets, by width under `fsdp`, and then moves
    activations where it should gather parameters.
    """
    mesh = context_mesh()
    if mesh is None or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) or not isinstance(x, jax.core.Tracer):
        return x    # outside of jit an array stays where the caller put it
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


@functools.lru_cache
def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the numbers of the rows of a global batch that this host's devices hold, ascending.

    They need not lie together, for the order of a mesh's devices follows their wires, and hosts that share a
    `tensor` axis hold the same rows.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh, stacked: bool = False) -> dict[str, jax.Array]:
    """Joins the `local_rows` [b, L] of each host into global arrays [B, L].

    With `stacked`, from [steps, b, L] into [steps, B, L].
    """
    sharding, axis = batch_sharding(mesh, stacked), int(stacked)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held = len(local_rows(mesh, shards))    # shards on this host

    def join(array: np.ndarray) -> jax.Array:
        size = array.shape[axis] // held    # of a shard, whose rows lie together, in the batch and in `array`
        shape = (*array.shape[:axis], size * shards, *array.shape[axis + 1:])
        rows = local_rows(mesh, shape[axis])
        places = sharding.addressable_devices_indices_map(shape)
        firsts = [int(np.searchsorted(rows, index[axis].start or 0)) for index in places.values()]
        # Not make_array_from_callback: that counts as a hidden transfer, which tests forbid.
        parts = jax.device_put([array[(slice(None),) * axis + (slice(first, first + size),)] for first in firsts],
                               list(places))
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(join, batch)


def everywhere(value, mesh: Mesh) -> jax.Array:
    """Puts a number on every device: an explicit transfer, where a jitted function's argument would be a hidden one."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), np.asarray(value))
