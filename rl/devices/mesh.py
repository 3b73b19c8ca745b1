"""The device mesh, and where every array of the toolkit lies on it.

In: the `mesh` section of the config and logical axis names. Out: a `jax.sharding.Mesh` and `NamedSharding`s. This is
the one module that spells mesh axis names. How processes find each other is `rl.devices.hosts`.
"""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rl.config.sections import MeshSection

AXES = ("data", "fsdp", "tensor")  # a configuration may add more, between the last two
ROWS = "batch"  # the logical axis of the rows of a batch
LOGICAL_AXES = (ROWS, "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "norm", "lora")  # of Tandem's models
_LARGE = 2**20  # bytes on a device; a smaller array need not be shared
_HOST, _DEVICE = "pinned_host", "device"  # kinds of memory

Rule = Sequence[str] | Sequence[Sequence[str]]  # mesh axes, or alternative lists of axes: the first that fits counts
Rules = Mapping[str, Rule]  # by logical axis


def no_implicit_transfers() -> contextlib.AbstractContextManager:
    """A context in which numbers move between host and devices by `jax.device_put` and `jax.device_get` only; any other
    transfer, such as a numpy array given to a compiled function, raises.
    """
    return jax.transfer_guard("disallow")


def axis_sizes(section: MeshSection) -> dict[str, int]:
    """The number of devices on every axis, -1 where it is open. The axis with the least communication comes first.

    Raises:
      ValueError: an extra axis has the name of another axis, or a name that is no identifier.
    """
    for axis in section.axes:
        if axis in AXES or not axis.isidentifier():
            raise ValueError(f"mesh.axes must name axes beside {list(AXES)}, like expert, got {axis!r}")
    outer, inner = AXES[:-1], AXES[-1:]
    sizes = {axis: getattr(section, axis) for axis in outer}
    return {**sizes, **section.axes, **{axis: getattr(section, axis) for axis in inner}}


def create_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, extra axes, tensor) over the first `section.num_devices` (None: all) of the devices.

    On TPU, neighbours on an axis are neighbours on the chips' own network. A slower network joins several slices;
    `section.dcn` says which axes cross it.

    Raises:
      ValueError: more devices are asked for than there are, or fewer than the processes need; the sizes do not multiply
        to the number of devices; more than one size is -1, or one is below 1; a rule names an axis that does not exist;
        the slices do not fit the axes.
    """
    devices = list(jax.devices() if devices is None else devices)
    if section.num_devices is not None and section.num_devices > len(devices):
        raise ValueError(f"mesh.num_devices must be <= {len(devices)}, the devices present, got {section.num_devices}")
    is_part = section.num_devices not in (None, len(devices))
    devices = devices[: section.num_devices]
    if is_part and all(device.process_index != jax.process_index() for device in devices):
        raise ValueError(
            f"mesh.num_devices must leave each of {jax.process_count()} processes a device, got {section.num_devices}, "
            f"none of which belong to process {jax.process_index()}; start fewer processes, or leave it out"
        )
    sizes = axis_sizes(section)
    for key, rules in (("rules", section.rules), ("rollout_rules", section.rollout_rules)):
        for logical, rule in rules.items():
            _check_rule(f"mesh.{key}.{logical}", rule, list(sizes))
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
    grid = _arrange(devices, sizes, section, is_part)
    # Auto axes: jax.make_mesh would give Explicit ones, where sharded matrix products need an output sharding spelled
    # out.
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check_rule(key: str, rule: Rule, names: list[str]) -> None:
    """ValueError for an axis that does not exist or is listed twice, and for an alternative that is never taken."""
    lists = _lists_of(rule)
    for number, axes in enumerate(lists):
        for axis in axes:
            if axis not in names:
                raise ValueError(f"{key} must name mesh axes out of {names}, got {axis!r}")
            if axes.count(axis) > 1:
                raise ValueError(f"{key} must name each mesh axis once, got {axes}")
        for earlier in lists[:number]:
            if set(earlier) <= set(axes):  # which divides and is free wherever the later one does
                raise ValueError(
                    f"{key} must have its longer alternatives first, got {axes} behind {earlier}, which fits wherever "
                    "that does and comes first; swap them, or leave one out"
                )


def _lists_of(rule: Rule) -> list[list[str]]:
    """The alternatives of a rule; a flat list is its only alternative."""
    return [list(axes) for axes in rule] if _has_alternatives(rule) else [[*map(str, rule)]]


def _has_alternatives(rule: Rule) -> bool:
    return bool(rule) and not isinstance(rule[0], str)


def _arrange(devices: Sequence[Any], sizes: Mapping[str, int], section: MeshSection, is_part: bool) -> np.ndarray:
    """The devices as an array with one dim per axis."""
    counts = collections.Counter(_slice_of(device, section) for device in devices)
    across = _slices_per_axis(sizes, section.dcn, counts)
    inside = [size // across[axis] for axis, size in sizes.items()]
    if len(counts) > 1:
        return mesh_utils.create_hybrid_device_mesh(
            inside,
            list(across.values()),
            devices,
            process_is_granule=section.slice_is == "process",
            allow_split_physical_axes=True,
        )
    # The devices in use need not form a block of the chips' network.
    if devices[0].platform == "tpu" and not is_part:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(inside)


def _slice_of(device: Any, section: MeshSection) -> int:
    if section.slice_is == "process":
        return device.process_index
    return getattr(device, "slice_index", 0)  # not all platforms know of slices


def _slices_per_axis(sizes: Mapping[str, int], dcn: Mapping[str, int], counts: Mapping[int, int]) -> dict[str, int]:
    """{axis: number of slices that it crosses}. Without `dcn`, each axis in turn crosses as many slices as it can."""
    num_slices = len(counts)
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"each slice must have equally many devices of the mesh, got {sorted(counts.values())}; set "
            "mesh.num_devices to null, or mesh.slice_is to what really is a slice"
        )
    across = dict.fromkeys(sizes, 1)
    if not dcn:
        left = num_slices
        for axis, size in sizes.items():
            across[axis] = math.gcd(size, left)
            left //= across[axis]
        assert left == 1, (sizes, num_slices)
        return across
    for axis, count in dcn.items():
        if axis not in sizes:
            raise ValueError(f"mesh.dcn must name mesh axes out of {list(sizes)}, got {axis!r}")
        if count < 1 or sizes[axis] % count:
            raise ValueError(f"mesh.dcn.{axis} must divide the size of that axis, {sizes[axis]}, got {count}")
    if math.prod(dcn.values()) != num_slices:
        raise ValueError(
            f"mesh.dcn must multiply to the number of slices, {num_slices}, got {dict(dcn)}; {{}} leaves it to Tandem"
        )
    return {**across, **dcn}


def partition_spec(logical_axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """Mesh axes for each dim of an array, by the rule of its logical axis.

    A flat rule gives, in its order, the axes that divide the dim and serve no other dim. A rule with alternatives gives
    the first alternative whose axes all divide the dim and are all free; where none fits, the dim stays whole.

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
        taken = _axes_that_fit(rules[name], size, mesh, used) if name is not None else []
        used.update(taken)
        spec.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*spec)


def _axes_that_fit(rule: Rule, size: int, mesh: Mesh, used: set[str]) -> list[str]:
    """Mesh axes, of size above 1, for a dim of `size`. The axes in `used` belong to other dims of the array."""
    for axes in _lists_of(rule):
        taken: list[str] = []
        for axis in axes:
            parts = math.prod(mesh.shape[a] for a in (*taken, axis))
            if mesh.shape[axis] > 1 and axis not in used and size % parts == 0:
                taken.append(axis)
        if not _has_alternatives(rule) or len(taken) == sum(mesh.shape[axis] > 1 for axis in axes):
            return taken
    return []


def tree_shardings(abstract: Any, logical_axes: Any, mesh: Mesh, rules: Rules) -> Any:
    """A `NamedSharding` for every leaf of `abstract` (arrays or ShapeDtypeStructs). `logical_axes` is the same tree
    with a tuple of names for each leaf.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, rules)), abstract, logical_axes
    )


def check_rules_are_used(logical_axes: Any, rules: Rules, key: str = "mesh.rules") -> None:
    """ValueError for a rule of `key` that no array uses: its name is misspelt, or the model has no such axis."""
    used = {name for names in jax.tree.leaves(logical_axes, is_leaf=_is_names) for name in names}
    unused = [name for name in rules if name not in {*LOGICAL_AXES, *used}]
    if unused:
        raise ValueError(
            f"{key}.{unused[0]} must name a logical axis of the model, which has {sorted(used - {None})}; "
            f"rows of a batch are 'batch'"
        )


def _is_names(tree: Any) -> bool:
    return type(tree) is tuple and all(name is None or isinstance(name, str) for name in tree)


def check_sharded(shapes: Any, shardings: Any, section: MeshSection, mesh: Mesh) -> None:
    """ValueError when devices that should share a state hold too much of it more than once.

    An array's excess is its bytes on one device, less the bytes there if all devices shared it evenly. Axes that copy
    by design do not count (`_copied_axes`), nor do arrays with less than a MiB on a device.
    """
    num_parts = mesh.size // math.prod(mesh.shape[axis] for axis in _copied_axes(section))
    held: dict[str, tuple[int, float]] = {}  # bytes on a device, and how many of them others could hold
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        here, whole = (math.prod(s) * leaf.dtype.itemsize for s in (sharding.shard_shape(leaf.shape), leaf.shape))
        excess = max(here - whole / num_parts, 0.0) if here >= _LARGE else 0.0
        held[jax.tree_util.keystr(path)] = here, excess
    share = sum(excess for _, excess in held.values()) / sum(here for here, _ in held.values())
    if share > section.max_unsharded_share:
        worst = sorted(((path, *sizes) for path, sizes in held.items() if sizes[1]), key=lambda item: -item[2])
        text = ", ".join(f"{path} ({here / 2**20:.1f} MiB)" for path, here, _ in worst[:5])
        axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"mesh.max_unsharded_share must be at least the share of a device's state that other devices hold as well, "
            f"{share:.3f} on the mesh {axes}, got {section.max_unsharded_share}; largest of {len(worst)} such arrays: "
            f"{text}, each on one device. Choose axis sizes that divide their dims, or name these axes in mesh.rules; "
            "raise the bound if this is meant"
        )


def _copied_axes(section: MeshSection) -> tuple[str, ...]:
    """Axes along which devices hold the same parameters by design: `data`, and extra axes that only the rule of the
    rows names.
    """
    named = {name: set().union(*_lists_of(rule)) for name, rule in section.rules.items()}
    of_parameters = set().union(*(axes for name, axes in named.items() if name != ROWS))
    return (AXES[0], *(axis for axis in section.axes if axis in named[ROWS] - of_parameters))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds in full, such as scalars."""
    return NamedSharding(mesh, PartitionSpec())


def in_host_memory(sharding: NamedSharding) -> NamedSharding:
    """The same sharding, in the memory of the devices' hosts.

    Raises:
      ValueError: the devices cannot reach that memory.
    """
    # Devices of other processes, and devices of a topology, list no memories.
    devices = sharding.mesh.devices
    assert devices is not None, sharding
    for device in set(devices.flat) & set(jax.local_devices()):
        if _HOST not in {memory.kind for memory in device.addressable_memories()}:
            raise ValueError(
                f"optimizer.offload must be false on {device.platform}, got true; it has no memory {_HOST}"
            )
    return sharding.with_memory_kind(_HOST)


def from_host_memory(tree: Any, shardings: Any) -> Any:
    """Inside jit: brings arrays whose sharding is in the hosts' memory to their devices, and leaves the others."""
    return jax.tree.map(
        lambda x, sharding: jax.device_put(x, sharding.with_memory_kind(_DEVICE)) if on_host(sharding) else x,
        tree,
        shardings,
    )


def on_host(sharding: NamedSharding) -> bool:
    """Whether arrays of this sharding lie in the memory of the devices' hosts."""
    return sharding.memory_kind == _HOST


def input_sharding(logical_axes: Sequence[str | None], mesh: Mesh, rules: Rules) -> NamedSharding:
    """The sharding of an input by its logical axes, through the rules that lay out the state.

    The toolkit makes its inputs in sizes that the axes divide (`num_row_shards`), so no shape is needed.

    Raises:
      ValueError: a logical axis without a rule.
    """
    divisible = (0,) * len(logical_axes)  # by any number of devices
    return NamedSharding(mesh, partition_spec(logical_axes, divisible, mesh, rules))


def row_axes(mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """Mesh axes, of size above 1, over which the rows of a batch are spread."""
    (axes,) = partition_spec((ROWS,), (0,), mesh, rules)  # rows are made in sizes that they divide
    return (axes,) if isinstance(axes, str) else axes or ()


def num_row_shards(mesh: Mesh, rules: Rules) -> int:
    """Number of pieces into which the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh, rules))


def is_on_cpu(mesh: Mesh) -> bool:
    """Whether its devices are CPUs; an abstract mesh has no devices."""
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def row_sharding(mesh: Mesh, rules: Rules, dim: int = 0) -> NamedSharding:
    """The sharding of an array whose dim `dim` runs over rows of a batch; its other dims are whole on every device."""
    return input_sharding((*[None] * dim, ROWS), mesh, rules)


@dataclasses.dataclass(frozen=True)
class RowExchange:
    """Moves looked-up embeddings from the layout of the table (columns cut over devices) to that of a batch (rows cut).

    Both layouts are named, so that devices exchange only what each needs, forwards and for the gradient. By default XLA
    for TPU gives every device the gradient of all rows and columns: 3 GiB for a piece of a 70B model on 256 chips.

    Attributes:
      by_column, by_row: layouts of [B, T, D].
    """

    by_column: NamedSharding
    by_row: NamedSharding

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x, laid out by row. Where the rows do not divide among the devices, x is returned unchanged."""
        try:
            self.by_row.shard_shape(x_BTD.shape)
        except ValueError:
            return x_BTD
        x_BTD = jax.lax.with_sharding_constraint(x_BTD, self.by_column)
        return jax.lax.with_sharding_constraint(x_BTD, self.by_row)


def embedding_exchange(mesh: Mesh, rules: Rules, hidden_size: int) -> RowExchange | None:
    """The exchange between the embedding table [V, D] and rows of a batch; None where no axis cuts both."""
    (columns,) = partition_spec(("embed",), (hidden_size,), mesh, rules)
    columns = (columns,) if isinstance(columns, str) else columns or ()
    rows = row_axes(mesh, rules)
    if not set(columns) & set(rows):
        return None
    left = tuple(axis for axis in rows if axis not in columns)
    by_column = NamedSharding(mesh, PartitionSpec(left or None, None, columns))
    return RowExchange(by_column, NamedSharding(mesh, PartitionSpec(rows)))


def shard_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes of one device's share of a tree, without arrays in the host's memory."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    here = [(sharding.shard_shape(x.shape), x.dtype.itemsize) for x, sharding in leaves if not on_host(sharding)]
    return sum(int(np.prod(shape)) * itemsize for shape, itemsize in here)


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory of one device; on CPU, an equal share of the machine's memory."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
