"""Checkpoints of a run: the training state and where the loop stands, written asynchronously and atomically by Orbax.

In: a `PureState`, a small JSON-able record of the loop, and the weights of a reference that moves. Out:
`output_dir/checkpoints/STEP/{state,loop}`, and `reference` where there is one, in one layout for both flavours: nested
dicts of strings down to arrays (`params`, `opt_state`, `step`, `rng`). Every array is checked by path, shape and dtype
before a restore, so that no value silently stays at its initialisation. Of a model with adapters only these are
written, with their settings in `loop`; the frozen base is read from its own source, which `run.json` identifies. The
meaning of the loop record belongs to the trainer. Each checkpoint has the hashes of its files, see
`rl.checkpoint_files`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import resource
import shutil
from collections.abc import Iterator
from typing import Any

import flax.serialization
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rl.checkpoint_files import folder_size, hash_unfinished
from rl.config import Config
from rl.models.config import ModelConfig
from rl.models.lora import join, split
from rl.models.policy import Params
from rl.models.train_state import PureState
from rl.remote_run import Mirror, run_path
from rl.states import AbstractState, InitStateFn, check_same_tree, get_abstract_state

ADAPTER = "adapter"  # the key of the loop record that holds an adapter's rank, alpha and targets


class Checkpoints:
    """The checkpoints of one run folder. `save` returns before the files are complete; `wait` and `close` finish them.

    Attributes:
      abstract: shapes, annotations and shardings of the whole state.
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
    ):
        self._folder = folder
        self._mirror = mirror
        self._with_reference = with_reference
        self.abstract = abstract
        self._keep = keep
        self._model_config = model_config
        if read_only:  # changes nothing: the half-written checkpoint that it finds may be one that a run is writing
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                enable_background_delete=True,
                # Runs in the background when all files are complete, before the step gets its name.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=functools.partial(_hash_files, folder.absolute())
                ),
            )
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "loop": ocp.JsonCheckpointHandler(),
                "reference": ocp.StandardCheckpointHandler(),
            },
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PureState, loop: dict[str, Any], reference: PureState | None = None) -> None:
        """Starts writing `state` and `loop` as checkpoint `step`; a step that is already there is left as it is.

        Args:
          reference: written as well where these checkpoints are `with_reference`.

        Raises:
          ValueError: an earlier asynchronous write failed, for instance on a full disk.
        """
        if step in self._manager.all_steps():
            return
        if self._mirror is not None:
            self._mirror.before_save()
        with _explain_write_errors(self._folder):
            tree, record = to_tree(self._trained(state)), {**loop, **self._adapter_settings()}
            items: dict[str, Any] = {"state": ocp.args.StandardSave(tree), "loop": ocp.args.JsonSave(record)}
            if self._with_reference:
                assert reference is not None
                items["reference"] = ocp.args.StandardSave(reference.params)
            self._manager.save(step, args=ocp.args.Composite(**items))
        if self._mirror is not None:
            self._mirror.saved(step)

    def restore(self, step: int | None = None, base: Params | None = None) -> tuple[PureState, dict[str, Any]]:
        """The state, placed by the shardings of this run's mesh, and the loop record of checkpoint `step` (None: the
        newest).

        Args:
          base: the frozen weights that stand beside adapters, from `rl.states.frozen_base`.

        Raises:
          ValueError: no such checkpoint, one of another model, optimizer or adapter (naming the paths or settings), or
            a damaged one.
        """
        step, folder, target = self.check(step)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target), loop=ocp.args.JsonRestore())
        with _explain_read_errors(folder):
            restored = self._manager.restore(step, args=arguments)
        state = from_tree(restored["state"], self.abstract.shapes)
        loop = {key: value for key, value in restored["loop"].items() if key != ADAPTER}
        return state._replace(params=join(state.params, base or {})), loop

    def restore_weights(self, step: int | None = None, base: Params | None = None) -> tuple[Params, Any]:
        """(weights, random key) of checkpoint `step`, placed and checked as `restore` does it: all that decoding needs.

        Nothing of the optimizer's state is compared or read, or takes memory: this run's state may be without one.
        """
        _, folder, wanted = self.check(step, parts=("params", "rng"))
        places = ocp.checkpoint_utils.construct_restore_args(wanted)
        with _explain_read_errors(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(
                folder.absolute() / "state",
                args=ocp.args.PyTreeRestore(wanted, restore_args=places, partial_restore=True),
            )
        return join(restored["params"], base or {}), restored["rng"]

    def check(
        self, step: int | None = None, parts: tuple[str, ...] | None = None
    ) -> tuple[int, pathlib.Path, dict[str, Any]]:
        """Compares what checkpoint `step` (None: the newest) says that it holds with what this run wants; reads no
        array.

        Args:
          parts: of the layout on disk (`to_tree`), those to compare and to read; None: all.

        Returns:
          Its step, its folder, and the shapes and places of the arrays to read.

        Raises:
          ValueError: as `restore`.
        """
        step, folder, target = self._find(step)
        self._check_adapter(step, folder)
        with _explain_read_errors(folder):
            written = _plain_metadata(self._manager.item_metadata(step)["state"])
        if parts is not None:
            written, target = ({name: tree[name] for name in parts if name in tree} for tree in (written, target))
        check_same_tree(written.get("params", {}), target["params"], f"the weights of {folder}")
        check_same_tree(written, target, f"the arrays of {folder}")
        return step, folder, target

    def check_reference(self, step: int | None = None) -> tuple[int, pathlib.Path, dict[str, Any]]:
        """The same for the weights of the reference."""
        step, folder, target = self._find(step)
        with _explain_read_errors(folder):
            written = _plain_metadata(self._manager.item_metadata(step)["reference"])
        check_same_tree(written, target["params"], f"the weights of the reference in {folder}")
        return step, folder, target

    def restore_reference(self, step: int | None = None) -> Any:
        """The reference's weights in checkpoint `step` (None: the newest), placed and checked as `restore` does."""
        step, folder, target = self.check_reference(step)
        arguments = ocp.args.Composite(reference=ocp.args.StandardRestore(target["params"]))
        with _explain_read_errors(folder):
            return self._manager.restore(step, args=arguments)["reference"]

    def _find(self, step: int | None) -> tuple[int, pathlib.Path, dict[str, Any]]:
        """A checkpoint's step, its folder, and the shapes and places of what is to be read from it."""
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
        """What is written of a state."""
        return state._replace(params=split(self._model_config, state.params)[0])

    def _adapter_settings(self) -> dict[str, Any]:
        lora = self._model_config.lora
        if lora is None:
            return {}
        # Through JSON, so that what is compared is what can be read back.
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
        """ValueError when the disk, or the process's file size limit, cannot hold the checkpoints that will exist at
        one time.

        Args:
          counts_existing: whether those that are there make room for those to come.
        """
        leaves = jax.tree.leaves(self._trained(self.abstract.shapes))
        if self._with_reference:
            leaves += jax.tree.leaves(self.abstract.shapes.params)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        existing = folder_size(self._folder) if counts_existing else 0
        need = max(size * (self._keep + 1) - existing, size)  # one more than is kept, while the newest is being written
        folder = self._folder.absolute()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        if need > free:
            raise ValueError(
                f"{self._folder} needs about {need / 1e9:.2f} GB free for {self._keep} + 1 checkpoints of "
                f"{size / 1e9:.2f} GB, got {free / 1e9:.2f} GB; "
                "free some space, lower checkpoint.keep, or set output_dir on another disk"
            )
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and size > limit:
            raise ValueError(
                f"files may be at most {limit / 1e9:.3f} GB here (ulimit -f), a checkpoint of {size / 1e9:.3f} GB may "
                "need more; raise the limit"
            )

    def wait(self) -> None:
        """Returns when every checkpoint asked for is complete, uploads included. ValueError when writing one failed."""
        with _explain_write_errors(self._folder):
            self._manager.wait_until_finished()
        if self._mirror is not None:
            self._mirror.before_save()

    def close(self) -> None:
        """Finishes writing and releases the folder."""
        with _explain_write_errors(self._folder):
            self._manager.close()


def _hash_files(folder: pathlib.Path) -> None:
    if jax.process_index() == 0:
        hash_unfinished(folder)


@contextlib.contextmanager
def _explain_write_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax raises when it cannot write (tensorstore's errors are ValueErrors) into an error that says what
    to do.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a checkpoint could not be written to {folder}: {error}; the complete ones there are untouched: make "
            "room, then start the same command again to go on from the newest of them"
        ) from error


@contextlib.contextmanager
def _explain_read_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax raises on a damaged checkpoint, a bare `Exception` for an array, into an error that says what to
    do.
    """
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
) -> Checkpoints:
    """The checkpoints of `config.output_dir` for the state that `init_state_fn` builds.

    Args:
      read_only: for a reader of a run that may be going on: nothing on disk is changed.
      with_reference: a reference that moves is written, too.
      abstract: that state, where it is known already; None: it is worked out.
      mirror: of the run whose checkpoints are written; None: they are not uploaded.
    """
    folder = run_path(config) / "checkpoints"
    if not read_only:
        folder.mkdir(parents=True, exist_ok=True)
    if abstract is None:
        abstract = get_abstract_state(config, mesh, init_state_fn)
    model_config = init_state_fn.policy.config
    return Checkpoints(folder, abstract, config.checkpoint.keep, model_config, read_only, with_reference, mirror)


def would_do(command: str, path: pathlib.Path, checkpoints: Checkpoints | None, num_steps: int) -> str:
    """What a run in this folder would do, in a line; `checkpoints` of the run to be resumed, if there is one.

    Raises:
      ValueError: the newest of them cannot be resumed from.
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
    """`values`, with the empty dicts of `skeleton` put back."""
    if not isinstance(skeleton, dict):
        return values
    return {key: _overlay(child, values[key]) if key in values else child for key, child in skeleton.items()}


def _plain_metadata(metadata: Any) -> Any:
    """Orbax's metadata tree as nested dicts of objects with shape and dtype."""
    tree = getattr(metadata, "tree", metadata)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype), tree, is_leaf=lambda x: hasattr(x, "dtype")
    )
