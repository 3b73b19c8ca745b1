"""Compiled programs in a file: written by `grpo compile --save`, called by training (`compiled_file`).

In: programs compiled for a mesh. Out: one file, or the calls rebuilt from it. The file has a JSON header (what the
programs were compiled for and with, their arguments and results) and the runtime's own serialised executables. Nothing
is pickled or unpickled. Checksums find damage, not malice: an executable is machine code, to be trusted like any
program.

Layout: MAGIC, the header's length (8 bytes, little endian), its sha256 (32 bytes), the header, the executables.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxlib import xla_client

from rl.config.load import Config, program_keys
from rl.config.user_files import COMPILED_KEYS, file_hashes
from rl.devices.programs import Program, stored_programs
from rl.models.policy import Policy

MAGIC = b"tandem compiled programs 1\n"
MAX_NAMED = 8  # the most differences that a message lists
# Calls of Python on CPU and GPU, and on TPU. On TPU, transfers between slices go through the hosts as well.
_CALLS_PYTHON = re.compile(r'python_\w*callback|is_host_transfer ?= ?true(?!.*"xla_megascale_runtime")')


class LoadedProgram:
    """A program's executable, called like the function from which it was compiled.

    Arguments must have the shapes, dtypes and shardings that it was compiled for; a small one may be anywhere. Donated
    arguments are gone afterwards.
    """

    def __init__(self, name: str, program: Program, executable: Any, entry: Mapping[str, Any]) -> None:
        self._name, self._program, self._executable, self._entry = name, program, executable, entry
        self._inputs: tuple[Any, list[Sharding]] | None = None
        self._outputs: tuple[Any, list[Any], list[Sharding]] | None = None

    def __call__(self, *arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        if self._inputs is None or self._outputs is None:
            self._inputs, self._outputs = self._check(arguments, tree)
        in_tree, in_shardings = self._inputs
        out_tree, out_shapes, out_shardings = self._outputs
        assert tree == in_tree, f"{self._name}: arguments of another structure than before"
        buffers = [_placed(leaf, sharding) for leaf, sharding in zip(leaves, in_shardings, strict=True)]
        results = self._executable.execute_sharded(buffers).disassemble_into_single_device_arrays()
        out = [_whole(*parts) for parts in zip(out_shapes, out_shardings, results, strict=True)]
        return jax.tree.unflatten(out_tree, out)

    def _check(self, arguments: tuple, tree: Any) -> tuple[tuple, tuple]:
        """Trees and shardings of arguments and results. ValueError where they differ from the file's."""
        results = jax.eval_shape(self._program.function, *arguments)
        in_shardings = _per_leaf(self._program.in_shardings, arguments)
        out_shardings = _per_leaf(self._program.out_shardings, results)
        for what, values, shardings in (("arguments", arguments, in_shardings), ("results", results, out_shardings)):
            refuse_differences(f"{what} of program {self._name!r}", _leaf_texts(values, shardings), self._entry[what])
        out_shapes, out_tree = jax.tree.flatten(results)
        return (tree, in_shardings), (out_tree, out_shapes, out_shardings)


@dataclasses.dataclass(frozen=True)
class CompiledPrograms:
    """The programs of a file. Without a file there are none, and the caller compiles.

    Attributes:
      prompt_length, device_memory: the numbers with which shapes were planned, and with which the run must plan; None:
        no file.
    """

    prompt_length: int | None = None
    device_memory: int | None = None
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    executables: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    devices: tuple[Any, ...] = ()

    def get(self, name: str, program: Program) -> Callable[..., Any] | None:
        """The function to call for the program `name`; None when the file does not have it."""
        if name not in self.executables:
            return None
        devices = xla_client.DeviceList(self.devices)
        executable = self.devices[0].client.deserialize_executable(self.executables[name], executable_devices=devices)
        return LoadedProgram(name, program, executable, self.entries[name])


@contextlib.contextmanager
def use_compiled(config: Config, policy: Policy, mesh: Mesh) -> Iterator[CompiledPrograms]:
    """A context in which the programs of `open_compiled` are called where they would be compiled."""
    compiled = open_compiled(config, policy, mesh)
    with stored_programs(compiled.get):
        yield compiled


def open_compiled(config: Config, policy: Policy, mesh: Mesh) -> CompiledPrograms:
    """The checked programs of `config.compiled_file`; no programs without a file.

    Raises:
      ValueError: the file is missing, damaged, or compiled for something else (the message names what differs); or
        several processes run on CPU.
    """
    if config.compiled_file is None:
        return CompiledPrograms()
    path = pathlib.Path(config.compiled_file)
    if jax.process_count() > 1 and mesh.devices.flat[0].platform == "cpu":
        raise ValueError(
            "compiled_file must be null for several processes on CPU, whose devices have numbers of their own that "
            f"`grpo compile`, one process, cannot compile for, got {str(path)!r}; leave it out"
        )
    header, executables = read_file(path)
    refuse_differences(f"compiled_file {str(path)!r}", fingerprint(config, policy, mesh), header["made_for"])
    return CompiledPrograms(
        header["prompt_length"],
        header["device_memory"],
        header["programs"],
        executables,
        tuple(mesh.devices.flat),
    )


def save_compiled(
    path: str | os.PathLike,
    config: Config,
    policy: Policy,
    mesh: Mesh,
    device_memory: int,
    programs: Iterable[tuple[str, Program, tuple, jax.stages.Compiled]],
) -> None:
    """Writes programs, each as (name, program, abstract arguments, compiled form), to one file, atomically.

    Raises:
      ValueError: the back end cannot serialise its executables, or a program calls Python.
    """
    path = pathlib.Path(path)
    entries, blobs, offset = {}, [], 0
    for name, program, arguments, compiled in programs:
        blob = _serialized(name, program, arguments, compiled)
        results = jax.eval_shape(program.function, *arguments)
        entries[name] = {
            "arguments": _leaf_texts(arguments, _per_leaf(program.in_shardings, arguments)),
            "results": _leaf_texts(results, _per_leaf(program.out_shardings, results)),
            "offset": offset,
            "bytes": len(blob),
            "sha256": hashlib.sha256(blob).hexdigest(),
        }
        blobs.append(blob)
        offset += len(blob)
    header = json.dumps(
        {
            "made_for": fingerprint(config, policy, mesh),
            "prompt_length": config.data.max_prompt_length,
            "device_memory": device_memory,
            "programs": entries,
        }
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header)
        for blob in blobs:
            file.write(blob)
    unfinished.replace(path)


def read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(header, {name: executable}) of a file. ValueError where it is missing, of another kind, or damaged."""
    if not path.is_file():
        raise ValueError(f"compiled_file must be a file that `grpo compile --save` wrote, got {str(path)!r}: not there")
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise ValueError(f"compiled_file {str(path)!r} must begin with {MAGIC.decode().strip()!r}, got another file")
    start = len(MAGIC) + 40
    size = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 8], "little")
    header = data[start : start + size]
    if hashlib.sha256(header).digest() != data[len(MAGIC) + 8 : start]:
        raise ValueError(
            f"compiled_file {str(path)!r} is damaged: its header does not have its checksum; write it anew"
        )
    content = json.loads(header)
    executables = {}
    for name, entry in content["programs"].items():
        first = start + size + entry["offset"]
        executables[name] = data[first : first + entry["bytes"]]
        if hashlib.sha256(executables[name]).hexdigest() != entry["sha256"]:
            raise ValueError(
                f"compiled_file {str(path)!r} is damaged: program {name!r} does not have its checksum; write it anew"
            )
    return content, executables


def fingerprint(config: Config, policy: Policy, mesh: Mesh) -> dict[str, Any]:
    """Everything on which compiled programs depend: {field: JSON value}."""
    device = mesh.devices.flat[0]
    fields = {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": device.platform,
        "libtpu": _libtpu_version() if device.platform == "tpu" else None,
        "device_kind": device.device_kind,
        "num_devices": mesh.size,
        "device_ids": [int(device.id) for device in mesh.devices.flat],
        "mesh": {str(name): int(size) for name, size in mesh.shape.items()},
        "host_cpu": _cpu_features() if device.platform == "cpu" else None,
        "x64": bool(jax.config.read("jax_enable_x64")),
        "model": dataclasses.asdict(policy.config),
        "code of the toolkit": _code_hash(),
        **file_hashes(config, COMPILED_KEYS),
    }
    keys = program_keys(config)
    fields["config_hash"] = hashlib.sha256(json.dumps(keys, sort_keys=True, default=str).encode()).hexdigest()
    fields |= keys
    return json.loads(json.dumps(fields, default=str))


def refuse_differences(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """ValueError that names each field which differs, what it must be and what it is."""
    problems = []
    for name in [*here, *(name for name in there if name not in here)]:
        if name != "config_hash" and here.get(name) != there.get(name):
            problems.append(f"{name} must be {here.get(name)!r}, got {there.get(name)!r}")
    if here.get("config_hash") != there.get("config_hash") and not problems:
        problems.append(f"config_hash must be {here.get('config_hash')!r}, got {there.get('config_hash')!r}")
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError(
            f"{what} must be made for this run, and it is not: {'; '.join(problems[:MAX_NAMED])}{more}. "
            "Write it anew with `grpo compile --save`, or leave compiled_file out"
        )


def _serialized(name: str, program: Program, arguments: tuple, compiled: jax.stages.Compiled) -> bytes:
    if _CALLS_PYTHON.search(_text(program, arguments, compiled)):
        raise ValueError(
            f"--save must have programs that a runtime can run by itself, and {name!r} calls Python (jax.debug.print, "
            "jax.pure_callback or the like), which exists in this process only; take that out of your own code, or "
            "leave --save out"
        )
    try:
        executable: Any = compiled.runtime_executable()
        blob = None if executable is None else bytes(executable.serialize())
    # Both a status of the runtime and jax's error for a back end without an executable are of this class.
    except RuntimeError as error:
        raise ValueError(_refusal(name, error)) from error
    if blob is None:  # as jax documents it for a back end without executables
        raise ValueError(_refusal(name, "it has no executable of its own"))
    return blob


def _refusal(name: str, reason: object) -> str:
    return (
        f"--save must have a back end that serialises its executables, and this one does not for {name!r}: {reason}; "
        "leave --save out; logging.compilation_cache keeps compiled programs between runs as well"
    )


def _text(program: Program, arguments: tuple, compiled: jax.stages.Compiled) -> str:
    """The text of the program's operations: compiled, or as lowered where jaxlib cannot read the compiled ones."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return program.jit().lower(*arguments).as_text()


def _placed(leaf: Any, sharding: Sharding) -> jax.Array:
    if not isinstance(leaf, jax.Array) or not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        leaf = jax.device_put(leaf, sharding)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _whole(shape: jax.ShapeDtypeStruct, sharding: Sharding, shards: list[jax.Array]) -> jax.Array:
    """One array, made of its parts on this process's devices."""
    if not jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.make_array_from_single_device_arrays(shape.shape, sharding, shards)
    data = jax.eval_shape(jax.random.key_data, shape)
    return jax.random.wrap_key_data(jax.make_array_from_single_device_arrays(data.shape, sharding, shards))


def _per_leaf(shardings: Any, tree: Any) -> list[Sharding]:
    """A sharding for every leaf of `tree`. `shardings` is a tree like it, or a prefix of it."""
    spread = jax.tree.map(
        lambda sharding, branch: jax.tree.map(lambda _: sharding, branch),
        shardings,
        tree,
        is_leaf=lambda x: isinstance(x, Sharding),
    )
    return jax.tree.leaves(spread)


def _leaf_texts(tree: Any, shardings: list[Sharding]) -> dict[str, str]:
    """{path: dtype, shape and shape on one device} of every leaf, as text."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path): f"{_dtype(x)}{list(np.shape(x))} of {list(sharding.shard_shape(np.shape(x)))}"
        for (path, x), sharding in zip(leaves, shardings, strict=True)
    }


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else str(np.result_type(leaf))


def _libtpu_version() -> str | None:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _code_hash() -> str:
    """A hash over every module of the package, because another version may compute something else in the same
    shapes.
    """
    digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent.parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    """A short hash of the features of the CPU that compiled code needs."""
    flags = platform.machine() + platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        flags += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
