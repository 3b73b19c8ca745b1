"""The device mesh, and where every array of the toolkit lies on it.

In: the `mesh` section of the config and logical axis names. Out: a `jax.sharding.Mesh` and `NamedSharding`s. This is
the one module that spells mesh axis names. Multi-host start-up is not here.
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rl.config import MeshSection

AXES = ("data", "fsdp", "tensor")
_HOST, _DEVICE = "pinned_host", "device"  # kinds of memory


def no_implicit_transfers() -> contextlib.AbstractContextManager:
    """A context in which numbers move between host and devices by `jax.device_put` and `jax.device_get` only; any other
    transfer, such as a numpy array given to a compiled function, raises.
    """
    return jax.transfer_guard("disallow")


def create_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over the first `section.num_devices` devices (None: all), or of those given.

    Raises:
      ValueError: more devices asked for than there are, sizes that do not multiply to their number, more than one -1, a
        size below 1, or a rule that names an axis which does not exist.
    """
    devices = list(jax.devices() if devices is None else devices)
    if section.num_devices is not None and section.num_devices > len(devices):
        raise ValueError(f"mesh.num_devices must be <= {len(devices)}, the devices present, got {section.num_devices}")
    devices = devices[: section.num_devices]
    sizes = {axis: getattr(section, axis) for axis in AXES}
    for logical, axes in section.rules.items():
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"mesh.rules.{logical} must name mesh axes out of {list(AXES)}, got {axis!r}")
            if axes.count(axis) > 1:
                raise ValueError(f"mesh.rules.{logical} must name each mesh axis once, got {axes}")
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh.{axis} must be a number of devices >= 1, or -1 for what is left, got {size}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"at most one mesh axis may be -1, got -1 for {open_axes}; set all but one of them to a number"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        fits = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(
            f"mesh sizes must multiply to the {len(devices)} device(s) in use, got {shape}; each size must be one of "
            f"{fits}, and -1 on one axis takes what is left"
        )
    # Auto axes: jax.make_mesh would give Explicit ones, where sharded matrix products need an output sharding spelled
    # out.
    grid = np.array(devices).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(
    logical_axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Mapping[str, Sequence[str]]
) -> PartitionSpec:
    """Mesh axes for each dim of an array: a rule's axes are taken in order while they divide the dim and are not used
    by another dim.

    Raises:
      ValueError: a logical axis without a rule, or names that do not match the rank.
    """
    if len(logical_axes) != len(shape):
        raise ValueError(f"an array of shape {tuple(shape)} needs {len(shape)} logical axes, got {tuple(logical_axes)}")
    used: set[str] = set()
    spec = []
    for name, size in zip(logical_axes, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"mesh.rules must have an entry for the logical axis {name!r}, got only {sorted(rules)}")
        taken: list[str] = []
        for axis in rules[name] if name is not None else ():
            parts = math.prod(mesh.shape[a] for a in (*taken, axis))
            if mesh.shape[axis] > 1 and axis not in used and size % parts == 0:
                taken.append(axis)
        used.update(taken)
        spec.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*spec)


def tree_shardings(abstract: Any, logical_axes: Any, mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> Any:
    """A `NamedSharding` for every leaf of `abstract` (arrays or ShapeDtypeStructs); `logical_axes` has a tuple of names
    in its place.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, rules)), abstract, logical_axes
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and of whatever every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def in_host_memory(sharding: NamedSharding) -> NamedSharding:
    """The same sharding, in the memory of the devices' hosts.

    Raises:
      ValueError: devices that cannot reach it.
    """
    device = sharding.mesh.devices.flat[0]
    # A device that is only compiled for has no client, and so no memories to list.
    memories = device.addressable_memories() if device in jax.devices() else None
    if memories is not None and _HOST not in {memory.kind for memory in memories}:
        raise ValueError(f"optimizer.offload must be false on {device.platform}, got true; it has no memory {_HOST}")
    return sharding.with_memory_kind(_HOST)


def from_host_memory(tree: Any, shardings: Any) -> Any:
    """Inside jit: the arrays whose sharding is in the hosts' memory, brought to their devices; the others as they
    are."""
    return jax.tree.map(
        lambda x, sharding: jax.device_put(x, sharding.with_memory_kind(_DEVICE)) if _on_host(sharding) else x,
        tree,
        shardings,
    )


def _on_host(sharding: NamedSharding) -> bool:
    return sharding.memory_kind == _HOST


def row_axes(mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Mesh axes, of size above 1, over which the rows of a batch are spread."""
    return tuple(axis for axis in rules["batch"] if mesh.shape[axis] > 1)


def num_row_shards(mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> int:
    """Number of pieces into which the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh, rules))


def row_sharding(mesh: Mesh, rules: Mapping[str, Sequence[str]], dim: int = 0) -> NamedSharding:
    """The sharding of an array whose dim `dim` runs over rows of a batch; its other dims are whole on every device."""
    axes = row_axes(mesh, rules)
    return NamedSharding(mesh, PartitionSpec(*([None] * dim), axes if axes else None))


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory of one device; on CPU its share of the machine's."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
