"""The place of a run's files: its folder, the mirror of that folder in a store, and the checkpoints in it.

In: the configuration and the run's identity. Out: `RunOutput`, one context for the three. Nothing in the folder changes
before `begin`, which also moves back a run that a kill left half-moved. So whatever can be refused is refused before.
"""

import contextlib
import functools
import pathlib
from types import TracebackType
from typing import Any, Self

from jax.sharding import Mesh

from rl.config.load import Config
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.models.train_state import PureState
from rl.run.log import RunLog
from rl.run_folder.contents import LOG
from rl.run_folder.folder import RunFolder
from rl.run_folder.mirror import Mirror
from rl.state.checkpoint import Checkpoints, create_checkpoint_manager, would_do
from rl.state.export import write_folder
from rl.state.states import AbstractState, InitStateFn


class RunOutput:
    """The output_dir of one run, which this process owns inside the context.

    Attributes, from the context's start on:
      path: the folder on disk.
      resumed: whether it already held this run.
      folder, mirror: the parts.
    """

    def __init__(
        self,
        config: Config,
        kind: str,
        identity: dict[str, Any],
        log: RunLog,
        check_only: bool = False,
        trust: bool = False,
    ):
        """Arguments: see `RunFolder`. With `check_only`, `begin` changes nothing on disk either."""
        self._config, self._kind, self._identity, self._log = config, kind, identity, log
        self._check_only, self._trust = check_only, trust
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Opens the folder; ValueError where it may not be used, see `Mirror` and `RunFolder`."""
        with contextlib.ExitStack() as stack:
            self.mirror = stack.enter_context(Mirror(self._config, self._log.message, self._check_only))
            self.folder = RunFolder(
                self._config, self._kind, self._identity, self._check_only, self._trust, self.mirror.run_id
            )
            stack.callback(self.folder.close)
            self.path, self.resumed = self.folder.path, self.folder.resumed
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def rewards_log(self) -> pathlib.Path | None:
        """The file for the output of reward functions; None where nothing may be written."""
        return None if self._check_only else self.path / LOG

    def begin(
        self, mesh: Mesh, init_state_fn: InitStateFn, abstract: AbstractState, with_reference: bool = False
    ) -> Checkpoints:
        """Makes the folder this run's, and gives its checkpoints. They are closed with the context.

        Args:
          abstract: of the state that `init_state_fn` builds.
          with_reference: checkpoints hold a reference that moves, too.

        Raises:
          ValueError: the folder cannot be written, the disk has too little room, or a tracker of the user's cannot be
            made.
        """
        if not self._check_only:
            self.folder.begin()
            self.mirror.begin()
            self._log.changed = self.folder.changed
            self._stack.enter_context(self._log.tracking(self.path, self._kind, self.resumed))
        self.checkpoints = create_checkpoint_manager(
            self._config,
            mesh,
            init_state_fn,
            read_only=self._check_only,
            with_reference=with_reference,
            abstract=abstract,
            mirror=self.mirror,
            warn=self._log.warning,
        )
        self._stack.callback(self.checkpoints.close)
        self.checkpoints.check_disk_space(counts_existing=self.resumed)
        return self.checkpoints

    def would_do(self, command: str, num_steps: int) -> str:
        """What a run would do here, in a line; ValueError where its newest checkpoint cannot be resumed from."""
        step = self.checkpoints.latest_step if self.resumed else None
        text = would_do(command, self.path, self.checkpoints if self.resumed else None, num_steps)
        return text if step is None or step < num_steps else self._log.nothing_left(step)

    def save_if_due(
        self,
        step: int,
        state: PureState,
        record: dict[str, Any],
        reference: PureState | None = None,
        is_last: bool = False,
        best_step: int | None = None,
    ) -> None:
        """Starts to write a checkpoint after every `checkpoint.every` steps, after the last one and after the best one.
        To be called after each step, when its line is written.

        Args:
          step: how many steps are done.
          record: what the checkpoint remembers of the loop, from `Progress`.
          is_last: whether the run ends with this step.
          best_step: the step of the best checkpoint, which stays beside the newest ones; None: none is the best.

        Raises:
          ValueError: the run's store is another process's by now, or see `Checkpoints.save`.
        """
        self.mirror.check()  # no two runs write to one store
        self.checkpoints.best_step = best_step
        if is_last or step == best_step or step % self._config.checkpoint.every == 0:
            with self._log.timer("checkpoint"):  # counted to the next step: the line of this one is written
                self.checkpoints.save(step, state, record, reference)
        self._log.messages(self.folder.recorded())

    def wait_for_saves(self) -> None:
        """Returns when every checkpoint is whole on disk, and in the store where there is one."""
        self.checkpoints.wait()

    def export(self, model_config: Any, params: Any, tokenizer: Tokenizer) -> None:
        """Writes the policy to `export/` as a Hugging Face folder, whole and at once."""
        tokenizer.mark_prompts(self._config.data.chat)
        write = functools.partial(
            write_folder, model_config=model_config, params=hosts.fetch(params), tokenizer=tokenizer, dtype=None
        )
        self._log.messages(hosts.from_first(lambda: self.folder.replace_export(write)))
        self._log.last_word(f"policy written to {self.path / 'export'}")
