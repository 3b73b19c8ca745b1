"""A run folder in a store: worked on in a local staging folder, and uploaded from there.

In: an output_dir that is a URL. Out: `run_path`, the local folder that stands for it everywhere else, and `Mirror`,
which fetches the run into that folder at the start and uploads every complete checkpoint. Local paths pass through both
unchanged. In the store the run has the same names as on disk, and three more kinds of objects:

    lease.json                      who may write, see `rl.run_folder.lease`
    uploads.json                    what the run has written, see `rl.run_folder.ledger`; nothing else is ever touched
    checkpoints/STEP/uploaded.json  the marker, written last and removed first: a step without it is no step

The marker holds the run's id, and the size and hash of every file of the step. They decide whether a start continues
from the staging folder or from the store, never times: see `rl.run_folder.settle`.
"""

import json
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from rl.config.load import Config, require
from rl.devices import hosts
from rl.files.local_files import UNFINISHED, file_hash, lock_file
from rl.files.stores import Store, cache_folder, download_all, file_names, is_remote, open_store, short_name
from rl.run_folder.contents import (
    CURVES,
    EVALUATIONS,
    HASHES,
    IDENTITY,
    JOURNAL,
    LOCK,
    LOG,
    LOG_BEFORE,
    REPORT,
    evaluation_files,
    recorded_best,
)
from rl.run_folder.lease import LEASE, Lease
from rl.run_folder.ledger import LEDGER, Ledger, read_ledger
from rl.run_folder.remote_steps import FILES, MARKER, STEPS, DamagedStepError, Marker, fetch_step, read_markers, step_of
from rl.run_folder.settle import Record, local_steps, read_record, settle, write_record

# Files of a run folder that are not copied: they have a meaning only on their machine, or only in the store.
_UNSHARED = (LOCK, CURVES, REPORT, LEASE, LEDGER)
_GONE_ON_WITH = (*FILES, JOURNAL, LOG, LOG_BEFORE)  # files that a run needs to resume, beside its checkpoints
_POLL_SECONDS = 0.05


def run_path(config: Config) -> pathlib.Path:
    """The local folder of a run: `output_dir` itself, or run/ in the staging folder of a URL."""
    output_dir = require(config.output_dir, "output_dir", "runs/my_run")
    return _staging(config) / "run" if is_remote(output_dir) else pathlib.Path(output_dir)


def _staging(config: Config) -> pathlib.Path:
    assert config.output_dir is not None
    parent = config.checkpoint.staging
    folder = cache_folder() / "staging" if parent is None else pathlib.Path(parent).expanduser()
    return folder / short_name(config.output_dir)


class Mirror:
    """The store's side of a run folder; for a local folder it does nothing. A context, entered before the run folder.

    Entering it takes the lease and brings the staging folder up to date. The rest of the store stays unchanged until
    `begin`. The first process of the run does all this, and the others wait for it. With `check_only` the store is only
    read.
    """

    def __init__(self, config: Config, say: Callable[[str], None], check_only: bool = False):
        self._say, self._config, self._check_only = say, config, check_only
        self._store: Store | None = None
        self._is_active = is_remote(require(config.output_dir, "output_dir", "runs/my_run"))

    def __enter__(self) -> "Mirror":
        if self._is_active:
            hosts.from_first(self._open)
        return self

    def _open(self) -> None:
        assert self._config.output_dir is not None
        if self._check_only:
            store = open_store(self._config.output_dir)
            _check_own(store)
            markers = read_markers(store)
            _check_overwrite(store, _staging(self._config), markers, self._config.checkpoint.overwrite)
            self._say(f"{store.url} holds {f'step {max(markers)} of a run' if markers else 'no step of a run'}")
            return
        self._store = open_store(self._config.output_dir)
        self._staging = Staging(self._store, _staging(self._config), self._config.checkpoint.keep)
        message = self._staging.open(self._config.checkpoint.overwrite)
        self._staging.lease.start()
        self._say(message)

    @property
    def run_id(self) -> str | None:
        """The id of the run in the store; None without a store. Only the first process knows it."""
        return None if self._store is None else self._staging.run_id

    def begin(self) -> None:
        """To be called when the folder is this run's: uploads, in the background, what the store lacks."""
        if self._store is not None:
            self._staging.begin()

    def check(self) -> None:
        """ValueError where the lease is lost."""
        if self._store is not None:
            self._staging.lease.check()

    def before_save(self) -> None:
        """Waits until the previous step is uploaded, so that at most one step waits. ValueError where its upload
        failed.
        """
        if self._is_active and not self._check_only:
            hosts.from_first(lambda: self._staging.wait())

    def saved(self, step: int) -> None:
        """To be called when a checkpoint is being written: uploads it, in the background, once it is complete."""
        if self._store is not None:
            self._staging.saved(step)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._store is None:
            return
        try:
            self._staging.close(abandon=kind is not None and not issubclass(kind, Exception))
        except ValueError as error:
            if kind is None:
                raise
            self._say(str(error))


def _check_own(store: Store) -> None:
    """ValueError where the store holds more than a lease and no ledger, which a run uploads first."""
    names = [name for name in store.stats() if name != LEASE]
    if names and read_ledger(store) is None:
        raise ValueError(
            f"output_dir must be empty or hold a run that was uploaded, got {store.url} with {names[:5]} and "
            f"without the {LEDGER} of one; choose another output_dir"
        )


def _check_overwrite(store: Store, root: pathlib.Path, markers: Mapping[int, Marker], overwrite: bool) -> None:
    if overwrite and markers:
        raise ValueError(
            f"checkpoint.overwrite must be false while {store.url} holds a run (step {max(markers)}), got true: what "
            f"is in a store is never replaced; choose another output_dir, or remove that folder and {root} first"
        )


class Staging:
    """A staging folder and the store that it is uploaded to.

    `root` holds run/ (the run folder), record.json, a lock and, while a run is fetched, fetch/ and old/.
    """

    def __init__(self, store: Store, root: pathlib.Path, keep: int, now: Callable[[], float] = time.time):
        self._store, self._root, self._keep, self._now = store, root, keep, now
        self.run = root / "run"
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._sent: dict[str, tuple[int, int]] = {}  # {file outside checkpoints/: (size, time) when it was uploaded}
        self._has_begun = False
        self._lock: int | None = None

    def open(self, overwrite: bool = False) -> str:
        """Locks the folder, takes the lease and brings the folder up to date. Returns what was done, in words.

        Raises:
          ValueError: another process holds the folder or the lease, or `settle` refuses.
        """
        self._lock = _lock(self._root)
        try:
            self._record = read_record(self._root)
            _check_own(self._store)
            self.lease = Lease(self._store, self._record.token, self._now)
            self.lease.take()
            try:
                return self._settle(overwrite)
            except BaseException:
                self.lease.release(is_unused=True)
                raise
        except BaseException:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _settle(self, overwrite: bool) -> str:
        ledger, markers = read_ledger(self._store), read_markers(self._store)
        _check_overwrite(self._store, self._root, markers, overwrite)
        for name in ("fetch", "old"):  # left by a kill during a fetch
            if (self._root / name).exists():
                shutil.rmtree(self._root / name)
        self._ledger = ledger or Ledger(self._store, self._record.run)
        if self._ledger.run != self._record.run:
            self._record = self._record._replace(damaged=())
        local, said = local_steps(self.run), ""
        # Damaged steps up to the folder's newest stay aside. A later one may have been mended, and is checked again.
        aside = {step for step in self._record.damaged if local and step <= max(local)}
        while True:
            good = {step: marker for step, marker in markers.items() if step not in aside} or markers
            run = None if ledger is None else ledger.run
            message, step = settle(self._store.url, self._root, run, good, local, self._record)
            try:
                if step is not None or self._ledger.run != self._record.run:
                    self._fetch(step, markers)
                return said + message
            except DamagedStepError as error:
                assert step is not None
                aside.add(step)
                if aside >= markers.keys():
                    raise
                self._record = self._record._replace(damaged=sorted({*self._record.damaged, step}))
                write_record(self._root, self._record)
                said += f"step {step} is left out, and the one before is taken: {error}. "

    def _fetch(self, step: int | None, markers: Mapping[int, Marker]) -> None:
        """Replaces run/ by the run in the store at `step`; None: the run has no step yet."""
        draft = self._root / "fetch"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        there = self._store.stats()
        files = [name for name in _GONE_ON_WITH if name in there and name in self._ledger.files]
        if step is not None:
            fetch_step(self._store, step, markers[step], draft / STEPS / str(step))
        download_all(self._store, {name: draft / name for name in files})
        if step is not None:
            # The record first: after a kill the folder counts as behind, and is fetched again.
            self._note(step, markers[step])
        if self.run.exists():
            os.rename(self.run, self._root / "old")
        os.rename(draft, self.run)
        if step is None:
            # The record last: after a kill the folder counts as another run's, and is fetched again.
            self._record = Record(self._record.token, self._ledger.run, None, None)
            write_record(self._root, self._record)
        shutil.rmtree(self._root / "old", ignore_errors=True)

    @property
    def run_id(self) -> str:
        """The id of the run in the store and the folder."""
        return self._record.run

    def begin(self) -> None:
        """Uploads what is newer here and removes what a kill left in the store, both in the background."""
        self._pool = ThreadPoolExecutor(1, "upload")
        self._has_begun = True
        if steps := local_steps(self.run):
            self.saved(max(steps))

    def saved(self, step: int) -> None:
        """Uploads a step in the background, once it is complete."""
        assert self._pool is not None
        self._pending = self._pool.submit(self._upload_when_complete, step)

    def wait(self) -> None:
        """Waits until nothing is being uploaded. ValueError where an upload failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        self.lease.check()

    def close(self, abandon: bool = False) -> None:
        """Uploads the files that changed since the last upload, then releases the lease and the folder.

        Args:
          abandon: whether to leave unfinished uploads to the next start.

        Raises:
          ValueError: something could not be uploaded.
        """
        try:
            self._closing.set()
            if abandon:
                self._abandoned.set()
            if self._has_begun:
                self.wait()
                if not abandon and self._record.step is not None:
                    self._upload_files(self._claim_files())
        finally:
            if self._pool is not None:
                self._abandoned.set()
                self._pool.shutdown()
            try:
                self.lease.release(is_unused=not self._has_begun or self._ledger.is_new)
            finally:
                self._unlock()

    def _upload_when_complete(self, step: int) -> None:
        folder = self.run / STEPS / str(step)
        while not (folder / HASHES).is_file():  # Orbax renames a step to its final name when it is complete
            if self._closing.wait(_POLL_SECONDS):
                return
        try:
            self.upload(step)
        except OSError as error:
            raise ValueError(f"step {step} could not be read from {folder} for its upload: {error}") from error

    def upload(self, step: int) -> None:
        """Uploads a complete step: the run's other files, the step's, the marker; then removes what is beyond `keep`.

        Raises:
          ValueError: the store cannot be written, an object that the run did not write is in the way, or the lease is
            lost.
        """
        folder = self.run / STEPS / str(step)
        self.lease.renew()  # nothing is removed without the lease
        markers = read_markers(self._store)
        # Left by an upload or a removal that a kill interrupted.
        self._remove([name for name in self._ledger.files if step_of(name) not in (None, *markers)])
        is_other = step in markers and markers[step].digest != file_hash(folder / HASHES)
        if step in markers and (is_other or step in self._record.damaged):
            # The step was damaged, so the run went back to an earlier one and has reached this step again.
            self._remove_step(step)
            del markers[step]
        if step not in markers:
            marker = markers[step] = _marker_of(self._record.run, folder)
            self._upload_files(self._claim_files(f"{STEPS}{step}/{name}" for name in (*marker.files, MARKER)))
            for name in marker.files:
                if self._abandoned.is_set():
                    return
                self._store.upload(folder / name, f"{STEPS}{step}/{name}")
            self.lease.renew()  # no marker is written without the lease
            text = json.dumps(marker._asdict(), indent=1) + "\n"
            self._store.write(f"{STEPS}{step}/{MARKER}", text.encode())
        damaged = {old for old in self._record.damaged if old < step}
        for old in sorted(damaged & markers.keys()):
            self._remove_step(old)
        self._note(step, markers[step])
        best = recorded_best(folder)
        for old in sorted(markers.keys() - damaged)[: -self._keep]:
            if old != best:
                self._remove_step(old)
        self._remove_evaluations()

    def _claim_files(self, others: Iterable[str] = ()) -> list[str]:
        """The run's files beside its checkpoints, in the order of upload. They and `others` are claimed in
        the ledger.
        """
        names = [name for name in file_names(self.run) if not name.startswith(STEPS) and _is_shared(name)]
        self._ledger.claim([*names, *others])
        # First the files that show the folder to be a run's, last the file that makes a folder a model.
        return sorted(names, key=lambda name: (name != IDENTITY, name.endswith("config.json")))

    def _upload_files(self, names: Iterable[str]) -> None:
        """Uploads the files beside the checkpoints that changed. Copies are uploaded, because the run goes on
        writing.
        """
        outgoing = self._root / "outgoing"
        outgoing.unlink(missing_ok=True)
        for name in names:
            path = self.run / name
            try:
                status = path.stat()
                stamp = status.st_size, status.st_mtime_ns
                if self._sent.get(name) == stamp:
                    continue
                shutil.copyfile(path, outgoing)
            except FileNotFoundError:
                continue  # the run has just replaced or removed the file
            self._store.upload(outgoing, name)
            self._sent[name] = stamp

    def _remove_evaluations(self) -> None:
        """Removes the samples of evaluations that are older than those that the run has kept."""
        kept, prefix = evaluation_files(self.run), f"{EVALUATIONS}/"
        oldest = int(kept[0].stem) if kept else 0
        names = [name for name in self._ledger.files if name.startswith(prefix)]
        steps = {name: name.removeprefix(prefix).removesuffix(".jsonl") for name in names}
        old = [name for name, step in steps.items() if step.isdecimal() and int(step) < oldest]
        if old:
            there = self._store.stats(prefix)
            self._store.remove([name for name in old if name in there])
            self._ledger.forget(old)

    def _remove_step(self, step: int) -> None:
        self._remove([name for name in self._ledger.files if step_of(name) == step])

    def _remove(self, names: Sequence[str]) -> None:
        """Removes objects of steps that the run has uploaded, markers first."""
        if not names:
            return
        there = self._store.stats(STEPS)
        names = sorted(names, key=lambda name: (not name.endswith(f"/{MARKER}"), name))
        self._store.remove([name for name in names if name in there])
        self._ledger.forget(names)

    def _note(self, step: int, marker: Marker) -> None:
        damaged = [other for other in self._record.damaged if other > step]
        self._record = Record(self._record.token, marker.run, step, marker.digest, damaged)
        write_record(self._root, self._record)


def _marker_of(run: str, folder: pathlib.Path) -> Marker:
    """The marker of a complete step."""
    names = [name for name in file_names(folder) if name != MARKER]
    files = {name: ((folder / name).stat().st_size, file_hash(folder / name)) for name in names}
    return Marker(run, files[HASHES][1], files)


def _is_shared(name: str) -> bool:
    return name not in _UNSHARED and not any(part.startswith(UNFINISHED) for part in name.split("/"))


def _lock(root: pathlib.Path) -> int:
    """Creates a staging folder and locks it until the process ends."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return lock_file(
            root / LOCK,
            f"the staging folder {root} is in use by another process with this output_dir; stop that one or choose "
            "another output_dir",
        )
    except OSError as error:
        raise ValueError(
            f"checkpoint.staging must be a folder that can be written, got {root.parent}: {error}; set it to one"
        ) from error
