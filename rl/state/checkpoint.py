"""Checkpoints of a run: the training state and the loop record, written asynchronously and atomically by Orbax.

In: a `PureState`, a small JSON-able record of the loop, and the weights of a reference that moves. Out:
`output_dir/checkpoints/STEP/{state,loop}`, and `reference` where it moves. The layout is the same in both flavours:
nested dicts with string keys down to arrays (`params`, `opt_state`, `step`, `rng`).

Before a restore every array is checked by path, shape and dtype, so no value silently stays at its initialisation. A
model with adapters writes only the adapters, and their settings into `loop`; the frozen base is read from its own
source, which `run.json` identifies. The trainer gives the loop record its meaning.

Each checkpoint has the hashes of its files, see `rl.state.checkpoint_files`. A reader compares them while it reads, and
returns nothing before the comparison is done. If the newest checkpoint is damaged, the newest whole one before it is
taken. A run sets the damaged one aside; other readers change nothing. A damaged step that was asked for by number is
refused.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import flax.serialization
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from rl.config.load import Config
from rl.devices import hosts
from rl.devices.host_memory import return_freed
from rl.errors import TRACEBACK_VARIABLE
from rl.files.output_file import disk_trouble
from rl.models.config import ModelConfig
from rl.models.lora import join, split
from rl.models.policy import Params
from rl.models.train_state import PureState
from rl.run_folder.mirror import Mirror, run_path
from rl.state.checkpoint_files import (
    UNFINISHED,
    HashCheck,
    folder_size,
    remove_unfinished,
    set_aside,
    size_text,
    write_hashes,
    wrong_step,
)
from rl.state.states import AbstractState, InitStateFn, check_same_tree, get_abstract_state

ADAPTER = "adapter"  # the key of the loop record that holds an adapter's rank, alpha and targets
_OVERHEAD = 1 << 10, 1 << 16  # bytes of a checkpoint beside its numbers: for an array, and for a writing process
_DELETION_SECONDS = 60.0  # to wait for the deletion of an old checkpoint before a disk counts as full

T = TypeVar("T")


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint differ from what was written. `folder`: the checkpoint; `problems`: a line for
    each file.
    """

    def __init__(self, folder: pathlib.Path, problems: list[str]):
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        super().__init__(
            f"checkpoint {folder} must be whole, and {problems[0]}{more}; leave --step out, or name another one, and "
            "`grpo checkpoint verify` lists the damage"
        )
        self.folder, self.problems = folder, problems


class Checkpoints:
    """The checkpoints of one run folder. `save` returns before the files are complete; `wait` and `close` finish them.

    Attributes:
      abstract: shapes, annotations and shardings of the whole state.
      restored_step: the checkpoint that was read last.
      best_step: a checkpoint that stays, however many newer ones there are; None: none.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        abstract: AbstractState,
        keep: int,
        model_config: ModelConfig,
        read_only: bool = False,
        with_reference: bool = False,
        mirror: Mirror | None = None,
        verify: bool = True,
        warn: Callable[[str], None] | None = None,
        keeps_best: bool = False,
    ):
        self._folder = folder
        self._mirror = mirror
        self._with_reference = with_reference
        self.abstract = abstract
        self.restored_step: int | None = None
        self.best_step: int | None = None
        self._most = keep + keeps_best  # that stay
        self.keep = keep
        self._model_config = model_config
        self._read_only = read_only
        self._verify = verify
        self._warn = warn or _warn_on_stderr
        self._whole: set[int] = set()  # steps whose files were compared and are whole
        if not read_only:
            for name in ("absl", "asyncio"):
                logging.getLogger(name).addFilter(_is_news)
            _quiet_tensorstore()
            hosts.from_first(lambda: remove_unfinished(folder))
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options: dict[str, Any] = {"lightweight_initialize": True}  # otherwise one damaged step would hide the others
        if self._read_only:  # a half-written checkpoint may belong to a running process, so nothing is changed
            options |= {"read_only": True, "create": False, "save_interval_steps": 0}
            logging.getLogger("absl").addFilter(_is_unexpected)
        else:
            options |= {"preservation_policy": _NewestAndBest(self)}
            options |= {"enable_async_checkpointing": True, "enable_background_delete": True}
            options |= {"temporary_path_class": _StepPath}
        return ocp.CheckpointManager(
            self._folder.absolute(),
            options=ocp.CheckpointManagerOptions(**options),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "loop": ocp.JsonCheckpointHandler(),
                "reference": ocp.StandardCheckpointHandler(),
            },
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, damaged or not; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PureState, loop: dict[str, Any], reference: PureState | None = None) -> None:
        """Starts writing `state` and `loop` as checkpoint `step`. A step that exists is not written again.

        Args:
          reference: the weights of a reference that moves, written where these checkpoints are `with_reference`.

        Raises:
          ValueError: the disk has too little room, an earlier asynchronous write failed, or a newer step exists.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        return_freed()  # the threads that wrote the last one keep as much as it took, each in a pool of its own
        hosts.from_first(self._check_room)
        with _explain_write_errors(self._folder):
            tree, record = to_tree(self._trained(state)), {**loop, **self._adapter_settings()}
            items: dict[str, Any] = {"state": ocp.args.StandardSave(tree), "loop": ocp.args.JsonSave(record)}
            if self._with_reference:
                assert reference is not None
                items["reference"] = ocp.args.StandardSave(reference.params)
            is_begun = self._manager.save(step, args=ocp.args.Composite(**items))
        if not is_begun:
            raise ValueError(
                f"checkpoint {step} must be newer than every other in {self._folder}, and there is {self.latest_step}, "
                "so nothing was saved; move what this run did not write out of that folder, then start the same "
                "command again"
            )
        if self._mirror is not None:
            self._mirror.saved(step)

    def restore(self, step: int | None = None, base: Params | None = None) -> tuple[PureState, dict[str, Any]]:
        """The state, placed on this run's mesh, and the loop record of checkpoint `step` (None: the newest whole one).

        Args:
          base: the frozen weights beside adapters, from `rl.state.states.frozen_base`.

        Raises:
          ValueError: there is no such checkpoint, it is damaged, or it is of another model, optimizer or adapter (the
            message names the paths or settings).
        """

        def read(step: int | None) -> tuple[PureState, dict[str, Any]]:
            found, folder, target = self.check(step)
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target), loop=ocp.args.JsonRestore())
            with _explain_read_errors(folder):
                restored = self._manager.restore(found, args=arguments)
            state = from_tree(restored["state"], self.abstract.shapes)
            loop = {key: value for key, value in restored["loop"].items() if key != ADAPTER}
            return state._replace(params=join(state.params, base or {})), loop

        return self._read_whole(step, read)

    def restore_weights(self, step: int | None = None, base: Params | None = None) -> tuple[Params, Any]:
        """(weights, random key) of checkpoint `step`, placed and checked as in `restore`: all that decoding needs.

        The optimizer's state is neither compared nor read, so this run's state may be without one.
        """

        def read(step: int | None) -> tuple[Params, Any]:
            _, folder, wanted = self.check(step, parts=("params", "rng"))
            places = ocp.checkpoint_utils.construct_restore_args(wanted)
            with _explain_read_errors(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(
                    folder.absolute() / "state",
                    args=ocp.args.PyTreeRestore(wanted, restore_args=places, partial_restore=True),
                )
            return join(restored["params"], base or {}), restored["rng"]

        return self._read_whole(step, read)

    def _read_whole(self, step: int | None, read: Callable[[int | None], T]) -> T:
        """The result of `read` on checkpoint `step`, or on the newest whole one (None)."""
        candidates = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        damaged: list[DamagedCheckpointError] = []
        for candidate in candidates or [None]:
            try:
                value = self._read_compared(candidate, read)
            except DamagedCheckpointError as error:
                if step is not None:
                    raise
                damaged.append(error)
            else:
                self.restored_step = candidate
                self._leave_out(damaged)
                return value
        raise ValueError(
            f"{self._folder} must hold a checkpoint that is whole, and of steps {sorted(candidates)} none is: "
            f"{damaged[0].problems[0]}; `grpo checkpoint verify` lists the damage; put back a copy, or choose another "
            "output_dir to start again"
        )

    def _read_compared(self, step: int | None, read: Callable[[int | None], T]) -> T:
        """The result of `read` on a checkpoint, whose files are compared with their hashes meanwhile.

        Raises:
          DamagedCheckpointError: the files differ, whatever `read` returned or raised.
        """
        folder = self._folder / str(step)
        if not self._verify or step in self._whole or not folder.is_dir():
            return read(step)
        count = hosts.num_processes()
        with HashCheck(folder, jax.process_index() if count > 1 else 0, count) as check:

            def compare() -> None:
                problems = [problem for part in hosts.gather(check.problems()) for problem in part]
                if problems:
                    raise DamagedCheckpointError(folder, list(dict.fromkeys(problems)))

            if (
                count > 1
            ):  # compared first: with a damaged file, one process would wait for the others in the middle of a read
                compare()
                value = read(step)
            else:
                try:
                    value = read(step)
                except ValueError:
                    compare()  # names the damaged file, if that is the cause
                    raise
                compare()
        if check.note is not None and hosts.is_first():
            self._warn(f"checkpoint {folder} is not compared as a whole with what was written: {check.note}")
        assert step is not None
        self._whole.add(step)
        return value

    def _leave_out(self, damaged: list[DamagedCheckpointError]) -> None:
        """Reports damaged checkpoints that were skipped. A run renames them."""
        for error in damaged:
            told = f"checkpoint {error.folder} is DAMAGED and is not used: {'; '.join(error.problems[:3])}"
            if not self._read_only:
                new = hosts.from_first(lambda folder=error.folder: str(set_aside(folder)))
                told += f"; it is now {new}"
            if hosts.is_first():
                self._warn(f"{told}; checkpoint {self.restored_step} is taken in its place")
        if damaged and not self._read_only:
            self._manager.close()
            self._manager = self._open()

    def check(
        self, step: int | None = None, parts: tuple[str, ...] | None = None
    ) -> tuple[int, pathlib.Path, dict[str, Any]]:
        """Compares the metadata of checkpoint `step` (None: the newest) with what this run needs. Reads no array.

        Args:
          parts: the parts of the layout on disk (`to_tree`) to compare and to read; None: all.

        Returns:
          Its step, its folder, and the shapes and shardings of the arrays to read.

        Raises:
          ValueError: as `restore`.
        """
        step, folder, target = self._find(step)
        if (moved := wrong_step(folder)) is not None:
            raise DamagedCheckpointError(folder, [moved])
        self._check_adapter(step, folder)
        with _explain_read_errors(folder):
            written = _plain_metadata(self._manager.item_metadata(step)["state"])
        if parts is not None:
            written, target = ({name: tree[name] for name in parts if name in tree} for tree in (written, target))
        check_same_tree(written.get("params", {}), target["params"], f"the weights of {folder}")
        check_same_tree(written, target, f"the arrays of {folder}")
        return step, folder, target

    def check_reference(self, step: int | None = None) -> tuple[int, pathlib.Path, dict[str, Any]]:
        """`check` for the weights of the reference."""
        step, folder, target = self._find(step)
        with _explain_read_errors(folder):
            written = _plain_metadata(self._manager.item_metadata(step)["reference"])
        check_same_tree(written, target["params"], f"the weights of the reference in {folder}")
        return step, folder, target

    def restore_reference(self, step: int | None = None) -> Any:
        """The reference's weights in checkpoint `step`, which is chosen, placed and checked as in `restore`."""

        def read(step: int | None) -> Any:
            found, folder, target = self.check_reference(step)
            arguments = ocp.args.Composite(reference=ocp.args.StandardRestore(target["params"]))
            with _explain_read_errors(folder):
                return self._manager.restore(found, args=arguments)["reference"]

        return self._read_whole(step, read)

    def _find(self, step: int | None) -> tuple[int, pathlib.Path, dict[str, Any]]:
        """The step of a checkpoint, its folder, and the shapes and shardings of its arrays."""
        step = self.latest_step if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise ValueError(
                f"{self._folder} must hold checkpoint {step}, got steps {sorted(self._manager.all_steps())}"
            )
        target = to_tree(
            jax.tree.map(
                lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                self._trained(self.abstract.shapes),
                self._trained(self.abstract.shardings),
            )
        )
        return step, self._folder / str(step), target

    def _trained(self, state: PureState) -> PureState:
        """The part of a state that is written."""
        return state._replace(params=split(self._model_config, state.params)[0])

    def _adapter_settings(self) -> dict[str, Any]:
        lora = self._model_config.lora
        if lora is None:
            return {}
        # Through JSON, so that both sides have the form of a record that was read.
        return {ADAPTER: json.loads(json.dumps(dataclasses.asdict(lora)))}

    def _check_adapter(self, step: int, folder: pathlib.Path) -> None:
        with _explain_read_errors(folder):
            loop = self._manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))["loop"]
        written, wanted = loop.get(ADAPTER), self._adapter_settings().get(ADAPTER)
        if written != wanted:
            raise ValueError(
                f"the adapter of {folder} must have this run's settings (lora.*), {wanted}, got {written}; "
                "null stands for weights that are trained as a whole"
            )

    def check_disk_space(self, counts_existing: bool = True) -> None:
        """ValueError when the disk, or the process's file size limit, cannot hold all checkpoints that exist at one
        time.

        Args:
          counts_existing: whether the room of existing checkpoints counts, because new ones replace them.
        """
        hosts.from_first(lambda: self._check_disk_space(counts_existing))

    def _check_disk_space(self, counts_existing: bool) -> None:
        size = self._size()
        existing = sum(map(folder_size, self._steps_on_disk())) if counts_existing else 0
        need = max(size * (self._most + 1) - existing, size)  # those that stay, and the one that is being written
        folder = self._folder.absolute()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        if need > free:
            raise ValueError(
                f"{self._folder} needs about {size_text(need)} free for {self._most} + 1 checkpoints of "
                f"{size_text(size)}, got {size_text(free)}; "
                "free some space, lower checkpoint.keep, or set output_dir on another disk"
            )
        limit, largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0], self._num_bytes()
        if limit != resource.RLIM_INFINITY and largest > limit:
            raise ValueError(
                f"files may be at most {size_text(limit)} here (ulimit -f), a checkpoint of {size_text(largest)} may "
                "need more; raise the limit"
            )

    def _check_room(self) -> None:
        """ValueError when the disk has no room for one more checkpoint now."""
        size, deadline = self._size(), time.monotonic() + _DELETION_SECONDS
        while (free := shutil.disk_usage(self._folder).free) < size:
            # Checkpoints beyond `keep` are deleted in the background.
            if len(self._steps_on_disk()) <= len(self._manager.all_steps()) or time.monotonic() > deadline:
                raise ValueError(
                    f"the next checkpoint needs {size_text(size)} in {self._folder}, and {size_text(free)} are free; "
                    "the complete ones there are untouched: make room, then start the same command again to go on "
                    "from the newest of them"
                )
            time.sleep(0.02)

    def _size(self) -> int:
        """Bytes on disk of one checkpoint: those of the largest existing one, or an estimate."""
        per_array, per_process = _OVERHEAD
        estimate = self._num_bytes() + per_array * len(self._leaves()) + per_process * hosts.num_processes()
        return max(map(folder_size, self._steps_on_disk()), default=estimate)

    def _num_bytes(self) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self._leaves())

    def _leaves(self) -> list[Any]:
        """The arrays of a checkpoint."""
        leaves = jax.tree.leaves(self._trained(self.abstract.shapes))
        return leaves + (jax.tree.leaves(self.abstract.shapes.params) if self._with_reference else [])

    def _steps_on_disk(self) -> list[pathlib.Path]:
        return [path for path in self._folder.iterdir() if path.name.isdecimal()] if self._folder.is_dir() else []

    def wait(self) -> None:
        """Waits until every requested checkpoint is complete, uploads included. ValueError when writing one failed."""
        with _explain_write_errors(self._folder):
            self._manager.wait_until_finished()
        if self._mirror is not None:
            self._mirror.before_save()

    def close(self) -> None:
        """Finishes writing and releases the folder."""
        with _explain_write_errors(self._folder):
            self._manager.close()


class _NewestAndBest:
    """Which checkpoints stay: the newest `keep`, and the best one. A policy of Orbax."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each of these checkpoints stays; they come in the order of their steps."""
        newest = len(checkpoints) - self._checkpoints.keep
        best = self._checkpoints.best_step
        return [place >= newest or info.step == best for place, info in enumerate(checkpoints)]


class _StepPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's write to a temporary folder, with one more temporary name for a step, under which its hashes
    are written.
    """

    _step: pathlib.Path | None = None  # None for an item of a step

    @classmethod
    def from_final(cls, final_path: epath.Path, **options: Any) -> Self:
        if not final_path.name.isdecimal():
            return super().from_final(final_path, **options)  # pyright: ignore[reportReturnType]
        path = super().from_final(final_path.with_name(final_path.name + UNFINISHED + ".whole"), **options)
        assert isinstance(path, cls)
        path._step = pathlib.Path(final_path)
        return path

    def get_final(self) -> epath.Path:
        return super().get_final() if self._step is None else epath.Path(self._step)

    async def finalize(self) -> None:
        await super().finalize()
        if self._step is not None:
            written = pathlib.Path(super().get_final())
            write_hashes(written, self._step)
            written.rename(self._step)


def _is_unexpected(record: logging.LogRecord) -> bool:
    """False for Orbax's warning about reading only, which we ask for."""
    return not str(record.msg).startswith("Given directory is read only")


def _is_news(record: logging.LogRecord) -> bool:
    """False for log lines of Orbax and asyncio about errors that Orbax raises as well, so that a run reports
    them once.
    """
    error = record.exc_info[1] if record.exc_info else None
    if error is None or os.environ.get(TRACEBACK_VARIABLE):
        return True
    is_of_orbax = record.name == "absl" and "orbax" in record.pathname
    return not is_of_orbax and not (isinstance(error, Exception) and disk_trouble(error))


def _quiet_tensorstore() -> None:
    """Keeps messages of tensorstore's threads off stderr. After a failed write they report that nobody waits for their
    other writes.
    """
    before = sys.unraisablehook
    if getattr(before, "is_quiet", False) or os.environ.get(TRACEBACK_VARIABLE):
        return

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    hook.is_quiet = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _warn_on_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def _explain_write_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turns an error of Orbax's writing (tensorstore raises ValueErrors) into a ValueError with the way out."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = disk_trouble(error) or _first_line(error)
        raise ValueError(
            f"a checkpoint could not be written to {folder}: {reason}; the complete ones there are untouched: make "
            "room, then start the same command again to go on from the newest of them"
        ) from error


@contextlib.contextmanager
def _explain_read_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turns an error of Orbax's reading (a bare `Exception` for a damaged array) into a ValueError with the way out."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"checkpoint {folder} must be whole, but it cannot be read ({type(error).__name__}: {str(error)[:160]}); "
            "remove that folder, and the run goes on from the checkpoint before it"
        ) from error


def create_checkpoint_manager(
    config: Config,
    mesh: Mesh,
    init_state_fn: InitStateFn,
    read_only: bool = False,
    with_reference: bool = False,
    abstract: AbstractState | None = None,
    mirror: Mirror | None = None,
    warn: Callable[[str], None] | None = None,
) -> Checkpoints:
    """The checkpoints of `config.output_dir` for the state that `init_state_fn` builds.

    Args:
      read_only: change nothing on disk, because the run may be going on.
      with_reference: whether a reference that moves is written as well.
      abstract: the abstract state, where it is known already; None: it is computed.
      mirror: the mirror of the run; None: checkpoints are not uploaded.
      warn: takes a message about damaged checkpoints; None: a line on stderr.
    """
    folder = run_path(config) / "checkpoints"
    if not read_only:
        folder.mkdir(parents=True, exist_ok=True)
    if abstract is None:
        abstract = get_abstract_state(config, mesh, init_state_fn)
    model_config = init_state_fn.policy.config
    section = config.checkpoint
    return Checkpoints(
        folder,
        abstract,
        section.keep,
        model_config,
        read_only,
        with_reference,
        mirror,
        section.verify,
        warn,
        keeps_best=section.best.metric is not None,
    )


def would_do(command: str, path: pathlib.Path, checkpoints: Checkpoints | None, num_steps: int) -> str:
    """A line that says what a run in this folder would do.

    Args:
      checkpoints: those of the run to be resumed; None: there is no such run.

    Raises:
      ValueError: the run cannot resume from the newest checkpoint.
    """
    step = None if checkpoints is None else checkpoints.latest_step
    if checkpoints is None or step is None:
        return f"{command} would start a run of {num_steps} steps in {path}; nothing was written"
    checkpoints.check(step)
    return f"{command} would go on from step {step} of {num_steps} in {path}; nothing was written"


def to_tree(state: PureState) -> dict[str, Any]:
    """The layout on disk: nested dicts with string keys, without empty ones (the optax state's stateless parts)."""
    tree = {
        "step": state.step,
        "params": state.params,
        "opt_state": flax.serialization.to_state_dict(state.opt_state),
        "rng": state.rng,
    }
    return _without_empty(tree)


def from_tree(tree: dict[str, Any], shapes: PureState) -> PureState:
    """The `PureState` of a tree made by `to_tree`; `shapes` gives the structure of the optax state."""
    full = flax.serialization.to_state_dict(shapes.opt_state)
    opt_state = flax.serialization.from_state_dict(shapes.opt_state, _overlay(full, tree.get("opt_state", {})))
    return PureState(tree["step"], tree["params"], opt_state, tree["rng"])


def _without_empty(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    pruned = {key: _without_empty(value) for key, value in tree.items()}
    return {key: value for key, value in pruned.items() if not (isinstance(value, dict) and not value)}


def _overlay(skeleton: Any, values: Any) -> Any:
    """`values`, with the empty dicts of `skeleton` added."""
    if not isinstance(skeleton, dict):
        return values
    return {key: _overlay(child, values[key]) if key in values else child for key, child in skeleton.items()}


def _plain_metadata(metadata: Any) -> Any:
    """Orbax's metadata tree as nested dicts of objects with shape and dtype."""
    tree = getattr(metadata, "tree", metadata)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype), tree, is_leaf=lambda x: hasattr(x, "dtype")
    )
