"""The processes of a run: how they find each other, which of them writes, and what they tell each other.

Every process runs the same program on the same numbers. It has the same data rows, makes the same decisions, and holds
the whole of every small host array. `put` brings arrays to the mesh: each process hands over its own shards only.
Reports of the devices come back as replicated arrays. `gather` shares what only one process knows: its block of the
data, the rewards of its completions, a signal, the state of the run folder. A process that is alone talks to nobody.
"""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from rl.config.load import Config, require
from rl.config.sections import DistributedSection, to_dict
from rl.devices.libtpu import quiet_libtpu
from rl.errors import TRACEBACK_VARIABLE, raised_by_tandem, status_without_stdout

T = TypeVar("T")

NAMES = ("coordinator_address", "num_processes", "process_id")  # keys of `distributed` that name the processes
_SMALLEST_MESSAGE = 1024  # bytes; lengths are rounded up to powers of two, for each is a program of its own
_LARGEST_ROUND = 1 << 26  # bytes of all processes together, which every device holds at a time


def join_processes(section: DistributedSection) -> None:
    """Joins the other processes of the run, if there are any; comes before anything that asks jax for its devices.

    The three keys name the processes. Without the keys, jax looks for a cluster (SLURM, Open MPI, Kubernetes, GKE,
    Cloud TPU), whose processes join when there is more than one. On CPU, collectives go by gloo, jax's own choice.

    Raises:
      ValueError: some of the three keys are set and others are not, or they name a process 0 that does not listen.

    jax's runtime ends the process with exit status 134 where process 0 waits for another one in vain, and where a
    process of a cluster does not reach process 0.
    """
    given, options = named(section), {}
    if given:
        for name, example in zip(NAMES, ("10.0.0.1:1234", "2", "0"), strict=True):
            if name not in given:
                require(None, f"distributed.{name}", f"{example}, as other keys of distributed are set")
        if section.process_id:
            _wait_for_the_first(section)
        options = {**given, "cluster_detection_method": "deactivate"}
    elif not is_in_a_cluster(section):
        return
    # jax's own handler of SIGTERM would swallow the signal that `rl.run.interrupt` waits for, and that should end the
    # process before a run has begun.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **options,
        heartbeat_timeout_seconds=section.heartbeat_timeout_seconds,
        initialization_timeout=section.initialization_timeout_seconds,
    )


def named(section: DistributedSection) -> dict[str, Any]:
    """Those of the three keys that are set."""
    return {name: getattr(section, name) for name in NAMES if getattr(section, name) is not None}


def check_alone(section: DistributedSection) -> None:
    """ValueError where keys name processes to a command that runs in one process only."""
    for name, value in named(section).items():
        raise ValueError(
            f"distributed.{name} must be null for a command of one process (train, sft, eval and data passrate run in "
            f"several), got {value!r}; leave it out"
        )


def _wait_for_the_first(section: DistributedSection) -> None:
    """Returns when process 0 listens. Without this wait jax's client would time out and abort with a stack dump."""
    address, seconds = section.coordinator_address, section.initialization_timeout_seconds
    assert address is not None
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            remaining = max(deadline - time.monotonic(), 0.1)
            socket.create_connection((host.strip("[]"), int(port)), timeout=remaining).close()
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
            if time.monotonic() >= deadline:
                raise ValueError(
                    "distributed.coordinator_address must be where process 0 listens within "
                    f"distributed.initialization_timeout_seconds ({seconds}), got {address!r}, which says: {error}; "
                    "start process 0, or check host, port and firewall"
                ) from error
        time.sleep(0.1)


@contextlib.contextmanager
def joined(section: DistributedSection) -> Iterator[None]:
    """A context in which this process is joined to the others, see `join_processes`; all of them leave it together.

    A process with an error prints it and ends at once, because an ordinary exit would wait for the others, and they for
    it.
    """
    quiet_libtpu()
    join_processes(section)
    try:
        if jax.distributed.is_initialized() and jax.default_backend() == "cpu":
            _connect_quietly()
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        os._exit(_report(error))
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _connect_quietly() -> None:
    """Has the processes meet for the first time while nothing goes to standard output: gloo writes a line about its
    connections there, past Python.
    """
    sys.stdout.flush()
    try:
        before = os.dup(1)
    except OSError:  # closed by the parent process
        multihost_utils.sync_global_devices("joined")
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        multihost_utils.sync_global_devices("joined")
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)


def _report(error: BaseException) -> int:
    """Prints what ended this process. Returns the exit status of a run with one process."""
    if (status := status_without_stdout(error)) is not None:
        return status
    is_plain = isinstance(error, ValueError) and raised_by_tandem(error) and not os.environ.get(TRACEBACK_VARIABLE)
    if is_plain:
        print(f"error: process {jax.process_index()}: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return 2 if is_plain else 130 if isinstance(error, KeyboardInterrupt) else 1


def is_in_a_cluster(section: DistributedSection) -> bool:
    """Whether jax's own detection finds more than one process; False where `distributed.auto` is off."""
    if not section.auto:
        return False
    from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks; there is no public way to ask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a pod that is no part of a job lacks the Kubernetes client, and needs none
        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and kind.is_env_present()]
    return bool(kinds) and kinds[0].get_process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes: logs, metrics, samples, the identity of the run."""
    return jax.process_index() == 0


def console_stream() -> TextIO | None:
    """The stream of this process's console: None (standard output) for the first process, else the null device."""
    return None if is_first() else open(os.devnull, "w")


def put(tree: Any, shardings: Any) -> Any:
    """Puts a tree of host arrays, the same in every process, on the devices. `shardings` may be a prefix tree."""
    if num_processes() == 1:
        return jax.device_put(tree, shardings)

    def place(sharding: jax.sharding.Sharding, part: Any) -> Any:
        return jax.tree.map(lambda array: _place(np.asarray(array), sharding), part)

    return jax.tree.map(place, shardings, tree)


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # `jax.device_put` would first compare the array over all processes. This transfer is as explicit.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_key(key: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """The PRNG key, moved to the devices of `sharding` unless it is there. A fresh key is on one device."""
    if key.sharding.device_set == sharding.device_set:
        return key
    return jax.random.wrap_key_data(put(jax.device_get(jax.random.key_data(key)), sharding))


def fetch(tree: Any) -> Any:
    """Arrays of any sharding as whole numpy arrays in the first process; the others get empty arrays.

    All processes must call it. One array at a time is whole in their memory.
    """
    if num_processes() == 1:
        return jax.device_get(tree)

    def whole(array: jax.Array) -> np.ndarray:
        value = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(value) if is_first() else np.empty(0)

    return jax.tree.map(whole, tree)


def gather(value: Any) -> list[Any]:
    """The JSON-able `value` of every process, in the order of processes; floats keep every digit."""
    if num_processes() == 1:
        return [value]
    return [json.loads(message) for message in gather_bytes(json.dumps(value).encode())]


def gather_bytes(message: bytes) -> list[bytes]:
    """The `message` of every process, in the order of processes; a long one goes in rounds."""
    count = num_processes()
    if count == 1:
        return [message]
    longest = max(_SMALLEST_MESSAGE, 1 << (_LARGEST_ROUND // count).bit_length() - 1)
    # As rounds and a rest, because a number of jax has 32 bits.
    rounds_and_rest = multihost_utils.process_allgather(np.array(divmod(len(message), longest), np.int32))
    sizes = [int(rounds) * longest + int(rest) for rounds, rest in rounds_and_rest]
    own, parts = np.frombuffer(message, np.uint8), [bytearray() for _ in sizes]
    for start in range(0, max(sizes), longest):
        length = min(longest, max(_SMALLEST_MESSAGE, 1 << (max(sizes) - start - 1).bit_length()))
        piece = own[start : start + length]
        received = multihost_utils.process_allgather(np.pad(piece, (0, length - piece.size)))
        for part, row, size in zip(parts, received, sizes, strict=True):
            part += row[: max(size - start, 0)].tobytes()
    return [bytes(part) for part in parts]


def num_processes() -> int:
    """The number of processes of the run. In a run of one process this does not initialise the devices."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def block(size: int) -> tuple[int, int]:
    """Start and end of this process's part of range(size). The parts of all processes follow each other."""
    count = num_processes()
    index = jax.process_index() if count > 1 else 0
    return size * index // count, size * (index + 1) // count


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    return any(gather(flag))


def from_first(function: Callable[[], T]) -> T:
    """Calls `function` in the first process only, and returns its result (JSON-able) in every process.

    No process returns before the first has finished.

    Raises:
      ValueError: the error of the first process, raised in all of them.
    """
    if num_processes() == 1:
        return function()
    value = None
    if is_first():
        try:
            value = function()
        except ValueError as error:
            gather({"error": str(error)})
            raise
    answer = gather({"value": value})[0]
    if "error" in answer:
        raise ValueError(f"process 0: {answer['error']}")
    return answer["value"]


def together(function: Callable[[], T]) -> T:
    """Calls `function` in every process and waits for all of them; each process gets its own result.

    Raises:
      ValueError: the first error among the processes, raised in all of them.
    """
    if num_processes() == 1:
        return function()
    value, problem = None, None
    try:
        value = function()
    except ValueError as error:
        problem = str(error)
    for text in gather(problem):
        if text is not None:
            raise ValueError(text)
    return cast(T, value)


def check_same(config: Config, identity: Mapping[str, Any]) -> None:
    """ValueError where configuration, data or weights of a process differ from the first process's."""
    sections = {
        f"the configuration's {name}": value for name, value in to_dict(config).items() if name != "distributed"
    }
    check_equal({**sections, **identity})


def check_equal(values: Mapping[str, Any]) -> None:
    """ValueError where one of these values ({name: JSON-able value}) differs from the first process's."""
    everywhere = gather(dict(values))
    for number, other in enumerate(everywhere):
        for name, value in everywhere[0].items():
            if other[name] != value:
                raise ValueError(
                    f"{name} must be the same in every process, got {value} in process 0 and {other[name]} in process "
                    f"{number}; give all of them the same command and the same files"
                )
