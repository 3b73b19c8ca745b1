"""`grpo checkpoint bench`: how fast checkpoints of a run are written and read here (MaxText:
`standalone_checkpointer`).

In: a configuration, or a run's checkpoint. Out: seconds and GB/s of the init or restore at the start, of filling the
moments, and of each save and restore, through the same `rl.state.checkpoint` as training. Moments are filled with
random bits, because zeros would be compressed away. Files are written beside the run folder, on its disk, and removed.
A round reads what was just written, which may still be in memory. A restore from the disk itself, like the one at the
start, can be slower.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rl.config.load import Config, load_config
from rl.devices.programs import use_compilation_cache
from rl.models.lora import split
from rl.models.policy import Params
from rl.models.train_state import PureState
from rl.run_folder.folder import check_trust, is_run_folder
from rl.run_folder.trust import TO_SAMPLE
from rl.state.checkpoint import Checkpoints, create_checkpoint_manager
from rl.state.checkpoint_files import folder_size
from rl.state.origin import find_origin, pretrained_params, tokenizer_from_config
from rl.state.states import frozen_base, setup_training_state
from rl.tools.trained import training_setup

T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds of one round.

    Attributes:
      blocking: seconds until `save` returned and training could go on.
      complete: seconds until the checkpoint was complete on disk, from the same start.
      restore: seconds until the state was on the devices again.
    """

    blocking: float
    complete: float
    restore: float


class Phase(NamedTuple):
    """Something that is done once: its seconds until its arrays were on the devices, and the bytes of these arrays."""

    name: str
    seconds: float
    num_bytes: int


class BenchResult(NamedTuple):
    """The measurements.

    Attributes:
      source: the origin of the state, in words.
      num_bytes, num_disk_bytes: bytes of the arrays and of the files of one checkpoint.
      phases: before the first round: "init" (with compilation and reading of weights) or "restore", then "fill" (the
        moments).
      timings: one for each round.
    """

    source: str
    num_bytes: int
    num_disk_bytes: int
    phases: list[Phase]
    timings: list[Timing]


def bench(
    source: str | pathlib.Path, num_rounds: int = 3, overrides: tuple[str, ...] = (), trust: bool = False
) -> BenchResult:
    """Saves and restores the state of a run (its newest checkpoint) or of a recipe (a fresh state) `num_rounds` times.

    `trust`: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: there is no such run or recipe, the disk has too little room, or `num_rounds` is below 1.
    """
    if num_rounds < 1:
        raise ValueError(f"--steps must be >= 1, got {num_rounds}")
    path = pathlib.Path(source)
    is_run = is_run_folder(path)
    config = load_config(path / "config.yml" if is_run else path, overrides)
    check_trust(source, config, overrides, TO_SAMPLE, trust)
    use_compilation_cache(config)
    origin = find_origin(config, tokenizer_from_config(config))
    mesh, init_state_fn = training_setup(config, origin)
    with _scratch_folder(path if is_run else pathlib.Path(config.output_dir or "run")) as scratch:
        checkpoints = create_checkpoint_manager(_at(config, scratch), mesh, init_state_fn)
        with contextlib.closing(checkpoints):
            checkpoints.check_disk_space()
            if is_run:
                base = frozen_base(config, mesh, init_state_fn, origin)
                reader = create_checkpoint_manager(_at(config, path), mesh, init_state_fn, read_only=True)
                with contextlib.closing(reader):
                    (state, loop), seconds = _timed(lambda: reader.restore(base=base))
                words = f"step {loop['step']} of {path}"
            else:

                def init() -> PureState:
                    params = pretrained_params(origin, checkpoints.abstract.shardings.params)
                    return setup_training_state(config, mesh, init_state_fn, params)[0]

                state, seconds = _timed(init)
                words = f"the state at the start of {path}"
            trained, frozen = split(init_state_fn.policy.config, state.params)
            num_bytes = _num_bytes(state._replace(params=trained))
            start = Phase("restore", seconds, num_bytes) if is_run else Phase("init", seconds, _num_bytes(state))
            state, seconds = _timed(lambda: fill_moments(state))
            fill = Phase("fill", seconds, _num_bytes(_moments(state)))
            timings = [_round(checkpoints, state, step, frozen) for step in range(1, num_rounds + 1)]
        num_disk_bytes = folder_size(scratch / "checkpoints" / str(num_rounds))
    return BenchResult(words, num_bytes, num_disk_bytes, [start, fill], timings)


def fill_moments(state: PureState) -> PureState:
    """The state with random bits in the optimizer's arrays, on their devices: finite numbers between -2 and 2.

    All bits except the highest of the exponent are random, so that a compressor gains one bit at most. Counts stay.
    """
    leaves, tree = jax.tree.flatten(state.opt_state)
    filled = [_random_like(i, leaf) if _is_moment(leaf) else leaf for i, leaf in enumerate(leaves)]
    return state._replace(opt_state=tree.unflatten(filled))


def _moments(state: PureState) -> list[jax.Array]:
    """The arrays that `fill_moments` fills."""
    return [leaf for leaf in jax.tree.leaves(state.opt_state) if _is_moment(leaf)]


def _is_moment(leaf: jax.Array) -> bool:
    return leaf.ndim > 0 and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _random_like(seed: int, leaf: jax.Array) -> jax.Array:
    unsigned = np.dtype(f"uint{8 * leaf.dtype.itemsize}")
    highest_exponent_bit = unsigned.type(1 << (8 * leaf.dtype.itemsize - 2))
    bits = np.frombuffer(np.random.default_rng(seed).bytes(leaf.nbytes), unsigned) & ~highest_exponent_bit
    return jax.device_put(bits.view(leaf.dtype).reshape(leaf.shape), leaf.sharding)


def report(result: BenchResult) -> list[str]:
    """The result as lines of a table, the median of the rounds last."""
    lines = [
        f"{result.source}: {result.num_bytes / 1e9:.3f} GB of arrays, {result.num_disk_bytes / 1e9:.3f} GB of files",
        *(f"{phase.name:>8}{_speed(phase.seconds, phase.num_bytes)}" for phase in result.phases),
        f"{'round':>8}" + "".join(f"{phase:>24}" for phase in ("save, blocking", "save, complete", "restore")),
    ]
    medians = Timing(*(statistics.median(phase) for phase in zip(*result.timings, strict=True)))
    for name, timing in [*enumerate(result.timings, 1), ("median", medians)]:
        lines.append(f"{name:>8}" + "".join(_speed(seconds, result.num_bytes) for seconds in timing))
    return lines


def to_json(result: BenchResult) -> dict[str, Any]:
    """The result as an object for JSON: every phase in seconds and GB/s, the rounds in both as well."""
    phases = [phase._asdict() | {"gigabytes_per_second": _rate(*phase[1:])} for phase in result.phases]
    rates = [{name: _rate(s, result.num_bytes) for name, s in round_._asdict().items()} for round_ in result.timings]
    seconds = [timing._asdict() for timing in result.timings]
    return result._asdict() | {"phases": phases, "timings": seconds, "gigabytes_per_second": rates}


def _rate(seconds: float, num_bytes: int) -> float:
    return num_bytes / 1e9 / seconds


def _speed(seconds: float, num_bytes: int) -> str:
    return f"{seconds:>11.3f} s {_rate(seconds, num_bytes):>6.2f} GB/s"


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    """(result of `function`, seconds until all arrays in it were computed)."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - start


def _round(checkpoints: Checkpoints, state: PureState, step: int, frozen: Params) -> Timing:
    jax.block_until_ready(state)
    start = time.perf_counter()
    checkpoints.save(step, state, {"step": step})
    blocking = time.perf_counter() - start
    checkpoints.wait()
    complete = time.perf_counter() - start
    _, restore = _timed(lambda: checkpoints.restore(step, frozen))
    return Timing(blocking, complete, restore)


@contextlib.contextmanager
def _scratch_folder(run: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside a run's folder, and so on its disk, which is removed afterwards, also after Ctrl-C."""
    run.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.parent, prefix=f".{run.name}.bench-") as scratch:
        yield pathlib.Path(scratch)


def _at(config: Config, folder: pathlib.Path) -> Config:
    checkpoint = dataclasses.replace(config.checkpoint, keep=1)
    return dataclasses.replace(config, output_dir=str(folder), checkpoint=checkpoint)
