"""The folder of one run: who owns it, and whether this configuration may go on in it.

`output_dir` holds config.yml (the resolved configuration that started the run), run.json (the kind of run and the
weights it started from), metrics.jsonl, samples.jsonl, events.jsonl, rewards.log, checkpoints/, journal.jsonl while a
step of episodes is not saved, and, after `grpo sft`, export/. A folder is refused, and left as it is, if it holds
another run or is not shown to be a run's (`rl.run_folder.contents`). A start that fails before it has recorded anything
leaves the folder as it found it.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rl.config.load import (
    HORIZON,
    Config,
    cannot_branch,
    differences,
    dump_config,
    horizon,
    load_config,
    override_values,
)
from rl.config.objects import check_given
from rl.config.sections import flatten, to_dict
from rl.devices import hosts
from rl.errors import RUN, missing
from rl.files.local_files import UNFINISHED, lock_file, write_file
from rl.files.stores import is_remote
from rl.run_folder.contents import (
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    EVENTS,
    EXPORT,
    EXPORT_RECORD,
    FILES_KEY,
    HELD_OUT,
    IDENTITY,
    JOURNAL,
    LOCK,
    LOG,
    LOG_BEFORE,
    METRICS,
    RUN_KEY,
    SAMPLES,
    checkpoint_steps,
    evaluation_files,
    file_stamps,
    has_work,
    holder,
    identify,
    is_config_changed,
    is_export_record,
    is_own_export,
    is_own_identity,
    is_run_folder,
    is_start_alone,
    linked_entries,
    linked_files,
    own_entries,
    read_json,
    strange_steps,
    unfinished_evaluations,
    unfinished_steps,
)
from rl.run_folder.mirror import run_path
from rl.run_folder.replaced import (
    Replaced,
    check_way_back,
    coming_back,
    move_aside,
    recover,
    remove,
    replaced_runs,
    restore,
)
from rl.run_folder.trust import FILE_KEYS, REWARDS, TO_TRAIN, code_of, digests, untrusted, write_identity

_UNFINISHED_EXPORT = UNFINISHED + EXPORT


class RunFolder:
    """An output folder that this run owns until `close` or its end.

    Opening the folder changes nothing in it. `begin` changes it, after everything has been checked. A run that a kill
    left half-moved is read as if it were back in its place; `begin` moves it there. The first process of the run does
    all this, and the others wait for it.

    Attributes:
      path: the folder.
      resumed: whether it already held this run.
      changed: keys of a resumed run that are not as in config.yml, with their values now; in the first process.
      messages: remarks about the folder, for the console.
    """

    def __init__(
        self,
        config: Config,
        kind: str,
        origin: dict[str, Any],
        check_only: bool = False,
        trust: bool = False,
        run_id: str | None = None,
    ):
        """Opens or creates `config.output_dir`.

        Args:
          kind: "grpo" or "sft".
          origin: JSON-able identity of what the run starts from: the policy's and the reference's source and hash.
          check_only: only check whether the folder may be used, and change nothing on disk.
          trust: accept and sign a config.yml that has changed since the run wrote it.
          run_id: the id of a run that begins here; None: a new id.

        Raises:
          ValueError: the folder cannot be written, holds something else, another kind of run, a run with other settings
            or other weights, or is in use by another process.
        """
        self.path = run_path(config)
        self.messages: list[str] = []
        self.changed: dict[str, Any] = {}
        self._config, self._identity = config, {"kind": kind, **origin}
        self._check_only, self._trust, self._run_id = check_only, trust, run_id
        self._has_begun = self._has_recorded = False
        self._replaced_kind: str | None = None  # the kind of the run that this one replaces
        self._old: Replaced | None = None  # the replaced run, after it was moved
        self._to_sign: tuple[Config, dict[str, Any]] | None = None  # set where a resumed run has no valid signature
        self.resumed = hosts.from_first(self._open)
        if not check_only and not (self.path / LOCK).exists():
            key = "checkpoint.staging" if is_remote(str(config.output_dir)) else "output_dir"
            raise ValueError(
                f"{key} must be on a disk that all processes of the run share, got {self.path}, which process 0 "
                "has opened and this one cannot see"
            )

    def _open(self) -> bool:
        """Takes the folder. Returns whether it holds this run."""
        for folder in (self.path, *self.path.absolute().parents):
            if folder.is_symlink() and not folder.exists():
                raise ValueError(
                    f"output_dir must be a folder, or one that can be made, got {self.path}, and {folder} is a link to "
                    "nothing; remove that link, or choose another output_dir"
                )
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir must be a folder, got the file {self.path}")
        if not replaced_runs(self.path):
            self._check_ours()
        self._place = _Seen(self.path) if self._check_only else _Place(self.path)
        try:
            found = self._check_ours()  # again: now nobody else writes
            resumed = False
            if found is not None and any(map(has_work, self._places())):
                old_config, old_identity = found
                resumed = not self._config.checkpoint.overwrite
                if resumed:
                    self._check_config(old_config, old_identity)
                    _check_same_run(self.path, old_config, old_identity, self._config, self._identity)
                    self._look_at_trust(old_config, old_identity)
                    before, now = flatten(to_dict(old_config)), flatten(to_dict(self._config))
                    own = {key: value for key, value in now.items() if key != "output_dir"}
                    self.changed = {key: value for key, value in own.items() if before.get(key) != value}
                else:
                    self._replaced_kind = old_identity["kind"]
            if not resumed or coming_back(self.path) is not None:
                self._check_no_links(linked_entries(self.path, self._replaced_kind or self._identity["kind"]))
        except BaseException:
            self._place.give_back(is_used=False)
            raise
        return resumed

    def _places(self) -> list[pathlib.Path]:
        """The folders in which the run's files lie. After a kill, files may lie in the folder that it was moved to,
        until it is moved back. Changes nothing.

        Raises:
          ValueError: the run cannot be moved back.
        """
        old = coming_back(self.path)
        if old is None:
            return [self.path]
        check_way_back(self.path, old, _left_by_start(self.path) if old.phase == "moved" else ())
        return [old.path, self.path] if old.phase == "moving" else [old.path]

    def _check_no_links(self, links: Sequence[pathlib.Path]) -> None:
        if links:
            raise ValueError(
                f"output_dir must hold a run's files themselves, and {links[0]} is a link to "
                f"{os.readlink(links[0])}, where this run would write; move what it leads to into its place, remove "
                "the link, or choose another output_dir"
            )

    def _check_ours(self) -> tuple[Config, dict[str, Any]] | None:
        """Configuration and run.json of the run in the folder; None if the folder is free. ValueError where it holds
        anything else. Changes nothing.
        """
        places = self._places()
        self._check_no_links(linked_files(self.path))
        if places == [self.path] and (not self.path.exists() or is_start_alone(self.path)):
            return None
        names = sorted(entry.name for entry in self.path.iterdir())
        what = f"output_dir must be empty or hold a run, got {self.path} with {names[:5]}"
        if not (holder(IDENTITY, *places) / IDENTITY).exists():
            raise ValueError(f"{what}; choose another output_dir")
        try:
            found = identify(*places)
        except ValueError as error:
            raise ValueError(
                f"{what}, which is not shown to be a run: {error}; choose another output_dir, or remove what is not "
                "wanted by hand"
            ) from error
        if strange := [step for place in places for step in strange_steps(place)]:
            raise ValueError(
                f"{what}, and {strange[0]}, which is no checkpoint; move it away, or choose another output_dir"
            )
        return found

    def _check_config(self, config: Config, record: dict[str, Any]) -> None:
        """ValueError where config.yml, which gave `config`, is not the file that the run wrote."""
        folder = holder(CONFIG, *self._places())
        if self._trust or not is_config_changed(folder, record):
            return
        text, known = dump_config(self._config), ""
        if record[FILES_KEY][CONFIG] == hashlib.sha256(text.encode()).hexdigest():  # this one is what it wrote
            now, then = flatten(to_dict(config)), flatten(to_dict(self._config))
            changes = [f"{key} was {old!r}, is {now.get(key)!r}" for key, old in then.items() if now.get(key) != old]
            known = f" ({'; '.join(changes[:5])})"
        raise ValueError(_of_changed_config(folder, known))

    def _look_at_trust(self, config: Config, record: dict[str, Any]) -> None:
        """Decides whether the first step of a resumed run signs run.json anew: only if run.json names no code that this
        run does not use.

        Args:
          config: the configuration in the folder. record: run.json.
        """
        codes, own = code_of(config), {(code.key, code.name) for code in code_of(self._config)}
        problem = untrusted(holder(CONFIG, *self._places()), record, codes)
        if problem is None:
            return
        if strange := [code for code in codes if (code.key, code.name) not in own]:
            self.messages.append(
                f"run.json is not signed: {CONFIG} of {self.path} names {strange[0]}, which this run does not use"
            )
            return
        self._to_sign = config, record
        if codes or is_config_changed(holder(CONFIG, *self._places()), record):
            self.messages.append(f"run.json is signed anew with the first step: {problem}")

    def begin(self) -> None:
        """Makes the folder this run's.

        First a run that a kill left half-moved is moved back. A run that is resumed stays as it is. A new run writes
        config.yml and run.json, and moves a run that it replaces beside the folder.

        Raises:
          ValueError: something cannot be moved.
        """
        assert not self._check_only
        hosts.from_first(self._begin)

    def _begin(self) -> None:
        self.messages += recover(self.path, lambda: _clear_start(self.path))
        if self.resumed:
            return
        self._has_begun = True
        if self._replaced_kind is None:
            _clear_start(self.path)
        else:
            self._old = move_aside(self.path, own_entries(self.path, self._replaced_kind))
            self.messages.append(
                f"the run that was here is in {self._old.path} until this one has saved its first checkpoint"
            )
        text = dump_config(self._config)
        try:
            # run.json first: it shows the folder to be ours even if a kill comes before the rest.
            identity = {**self._identity, RUN_KEY: self._run_id or uuid.uuid4().hex}
            self._note_signature(write_identity(self.path, identity, self._config, text))
            write_file(self.path / CONFIG, text.encode())
        except OSError as error:
            raise ValueError(
                f"output_dir {self.path} must be a folder that can be written: {error}; make room, or choose another"
            ) from error

    def _note_signature(self, problem: str | None) -> None:
        if problem is not None and code_of(self._config):
            self.messages.append(f"run.json is not signed, so commands that read this run will want --trust: {problem}")

    def recorded(self) -> list[str]:
        """To be called when a step is recorded. Signs a resumed run that has no signature, and removes the replaced run
        once a checkpoint is complete. Returns remarks for the console.
        """
        self._has_recorded = True
        if not hosts.is_first():
            return []
        count = len(self.messages)
        if self._to_sign is not None:
            config, record = self._to_sign
            self._to_sign = None
            text = (self.path / CONFIG).read_text(encoding="utf-8")
            self._note_signature(write_identity(self.path, _without_file_keys(record), config, text))
        return [*self.messages[count:], *self._remove_replaced()]

    def _remove_replaced(self) -> list[str]:
        done = []
        if checkpoint_steps(self.path):
            try:
                for old in replaced_runs(self.path):
                    done += remove(self.path, old)
            except (OSError, ValueError) as error:  # no reason to end a run
                done.append(f"the run that was here before cannot be removed: {error}")
        return done

    def replace_export(self, write: Callable[[pathlib.Path], None]) -> list[str]:
        """Lets `write` fill a new folder, and puts it at export/ as a whole. An export/ that a run wrote is removed;
        any other is kept as export.old-TIME. Returns remarks for the console.
        """
        export, scratch = self.path / EXPORT, self.path / _UNFINISHED_EXPORT
        shutil.rmtree(scratch, ignore_errors=True)  # left by a start that was stopped
        scratch.mkdir()
        draft = scratch / EXPORT
        write(draft)
        said = []
        if os.path.lexists(export) and is_own_export(self.path):
            os.rename(export, scratch / "previous")
        elif os.path.lexists(export):
            kept = self.path / f"{EXPORT}.old-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
            os.rename(export, kept)
            said.append(f"{kept} is what was in {export}; it stays, for no run wrote it as it is")
        record = self.path / EXPORT_RECORD
        if record.is_file() and not is_export_record(record):
            kept = record.with_name(f"{EXPORT_RECORD}.old-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
            os.rename(record, kept)
            said.append(f"{kept} is what was {record}; it stays, for no run wrote it")
        # The record first: after a kill, an export without a record would count as a user's.
        write_file(record, f"{json.dumps(file_stamps(draft), indent=1)}\n".encode())
        os.rename(draft, export)
        shutil.rmtree(scratch, ignore_errors=True)
        return said

    def close(self) -> None:
        """Lets another run open the folder. A run that recorded nothing leaves it as it was."""
        if not hosts.is_first():
            return
        if self._has_begun and not has_work(self.path):
            _clear_start(self.path)
            if self._old is not None:
                restore(self.path, self._old)
            self._place.give_back(is_used=False)
            return
        is_used = self._has_begun or self._has_recorded
        if is_used:
            self._remove_replaced()
        self._place.give_back(is_used)


class _Place:
    """The folder on disk: made if missing, and locked. `give_back` can undo both."""

    def __init__(self, path: pathlib.Path):
        """Takes the lock. The system releases it when the process ends in any way."""
        self._path = path
        missing = [folder for folder in (path, *path.absolute().parents) if not folder.exists()]
        self._made = [folder.absolute() for folder in missing]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._had_lock = (path / LOCK).exists()
            self._lock = _lock(path)
        except OSError as error:
            self._remove_made()
            raise ValueError(
                f"output_dir must be a folder that can be written, got {path}: {error}; choose another output_dir"
            ) from error
        self._log = (path / LOG).stat() if (path / LOG).is_file() else None
        self._had_log_before = (path / LOG_BEFORE).exists()

    def give_back(self, is_used: bool) -> None:
        """Releases the lock. If the folder is not used, its log, lock and parent folders are put back as they were."""
        if not is_used:
            self._take_back_log()
            if not self._had_lock:
                (self._path / LOCK).unlink(missing_ok=True)
            self._remove_made()
        os.close(self._lock)

    def _take_back_log(self) -> None:
        """Restores the log. If the start wrote more than 10 MB, the earlier content of rewards.log.1 is lost."""
        log, older = self._path / LOG, self._path / LOG_BEFORE
        if self._log is None:
            log.unlink(missing_ok=True)
            if not self._had_log_before:
                older.unlink(missing_ok=True)
            return
        if not log.is_file() or not os.path.samestat(log.stat(), self._log):
            if not older.is_file() or not os.path.samestat(older.stat(), self._log):
                return  # the earlier log is gone
            os.replace(older, log)
        if log.stat().st_size > self._log.st_size:
            os.truncate(log, self._log.st_size)
            os.utime(log, ns=(log.stat().st_atime_ns, self._log.st_mtime_ns))

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()


class _Seen:
    """The folder for a look only: nothing is made, and the lock is held only if its file exists."""

    def __init__(self, path: pathlib.Path):
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ValueError(
                f"output_dir must be a folder that can be written, got {path}, and {nearest} is none; choose another "
                "output_dir"
            )
        self._lock = _lock(path) if (path / LOCK).exists() else None

    def give_back(self, is_used: bool) -> None:
        """Releases the lock."""
        if self._lock is not None:
            os.close(self._lock)


def read_run(path: str | os.PathLike) -> tuple[Config, dict[str, Any]]:
    """The configuration and the run.json of a run folder. ValueError where the path is no run folder."""
    folder = pathlib.Path(path)
    if not os.path.lexists(folder):
        raise missing("RUN", RUN, folder)
    if not is_run_folder(folder):
        raise ValueError(f"{str(folder)!r} must be a run folder with {CONFIG} and {IDENTITY}, and it is not")
    try:
        config, identity = identify(folder)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} must be a run folder: {error}") from error
    return config, _without_file_keys(identity)


def load_run_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """The configuration to train with. `path` is a recipe, or a run folder, whose run then continues where it is.

    Raises:
      ValueError: `path` is the config.yml of a run folder that is not the output_dir it names; it was moved or copied.
    """
    is_placed = "output_dir" in override_values(overrides)
    if is_run_folder(path):
        here = [] if is_placed else [f"output_dir={json.dumps(str(path))}"]
        return load_config(pathlib.Path(path) / CONFIG, [*here, *overrides])
    config, run = load_config(path, overrides), _run_of(path)
    if run is None or is_placed or (config.output_dir is not None and run_path(config).resolve() == run.resolve()):
        return config
    there = config.output_dir is not None and pathlib.Path(config.output_dir).exists()
    raise ValueError(
        f"{os.fspath(path)} is the configuration of the run in {run}, and its output_dir is {config.output_dir!r}, "
        f"{'another folder' if there else 'which does not exist'} (working directory {os.getcwd()}); if the run was "
        f"moved or copied, output_dir={run} goes on with it where it is; another output_dir starts a new run"
    )


def check_trust(
    path: str | os.PathLike,
    config: Config,
    overrides: Sequence[str],
    kinds: Collection[str] = TO_TRAIN,
    trust: bool = False,
) -> None:
    """Checks a configuration before anything in it is used. The arguments are those of `check_code`.

    Raises:
      ValueError: the configuration comes from a run folder and has changed since the run wrote it, or names code that
        is not shown to be what this user ran; or the command needs objects that are not given (`rl.config.objects`).
    """
    if REWARDS in kinds:
        check_given(config)
    check_code(path, config, overrides, kinds, trust)
    run = _run_of(path)
    if run is None or trust:
        return

    def check() -> None:
        if (problem := changed_config(run)) is not None:
            raise ValueError(problem)

    hosts.from_first(check)


def changed_config(run: pathlib.Path) -> str | None:
    """A message with a way out where config.yml of a run folder is not what the run wrote; None where it is, or no hash
    says.
    """
    try:
        is_changed = is_config_changed(run, read_json(run / IDENTITY))
    except ValueError:  # no readable run.json, so no hash
        return None
    return _of_changed_config(run) if is_changed else None


def check_code(
    path: str | os.PathLike,
    config: Config,
    overrides: Sequence[str],
    kinds: Collection[str] = TO_TRAIN,
    trust: bool = False,
) -> None:
    """ValueError where a configuration comes from a run folder and names code that is not shown to be what this user
    ran (`rl.run_folder.trust`).

    The first process of a run checks the signature. Every process checks the files of code on its own disk.

    Args:
      path: what the user gave: a run folder, a recipe or a model. Only a run folder, or the config.yml in one, is
        checked, because a recipe is the user's own word.
      config: the configuration read from `path`. overrides: of the command line; what they name is not checked.
      kinds: the kinds of code (`rl.run_folder.trust`) that the command runs.
      trust: whether the user said `--trust`, which allows the code.
    """
    run = _run_of(path)
    given = override_values(overrides)
    codes = [code for code in code_of(config) if code.kind in kinds and code.key not in given]
    if run is None or trust or not codes:
        return
    code = "; ".join(map(str, codes))

    def check() -> dict[str, str | None]:
        try:
            problem = untrusted(run, read_json(run / IDENTITY), codes)
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            raise ValueError(
                f"{run} names code that is not shown to be yours: {problem}. It would run {code}; look at that code, "
                "then say --trust to run it"
            )
        return digests(codes)

    signed = hosts.from_first(check)

    def compare() -> None:
        if digests(codes) != signed:
            raise ValueError(f"the code that {run} names must be the same in every process, got other files of {code}")

    hosts.together(compare)


def _of_changed_config(folder: pathlib.Path, changes: str = "") -> str:
    return (
        f"{folder / CONFIG} must be as the run wrote it, and it has changed since, by its hash in {IDENTITY}{changes}; "
        "put the old file back and change keys on the command line (key=value), copy it to another place for a recipe "
        "of its own, or say --trust to take it as it is"
    )


def _run_of(path: str | os.PathLike) -> pathlib.Path | None:
    """The run folder that `path` names, itself or by its config.yml; None for anything else."""
    path = pathlib.Path(path).expanduser()
    if is_run_folder(path):
        return path
    if not path.is_file():
        return None
    folder = path.resolve().parent
    has_traces = (folder / IDENTITY).exists() or (folder / METRICS).exists() or bool(checkpoint_steps(folder))
    return folder if path.resolve().name == CONFIG and has_traces else None


def _without_file_keys(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in FILE_KEYS}


def checkpoint_folder(path: str | os.PathLike, step: int) -> pathlib.Path:
    """The path of this step's checkpoint in a run folder."""
    return pathlib.Path(path) / CHECKPOINTS / str(step)


def _check_same_run(
    path: pathlib.Path,
    old_config: Config,
    old_identity: dict[str, Any],
    config: Config,
    identity: dict[str, Any],
) -> None:
    """ValueError, naming the difference, where the run in a folder is not the run that starts."""
    kind = identity["kind"]
    way_out = "choose another output_dir, or pass checkpoint.overwrite=true to replace that run"
    if old_identity["kind"] != kind:
        raise ValueError(f"output_dir {path} holds a run of kind {old_identity['kind']!r}, this is {kind!r}; {way_out}")
    if changed := differences(old_config, config, kind):
        raise ValueError(
            f"output_dir {path} holds another run: {_how_to_go_on(path, old_config, config, kind, changed)}"
        )
    for name, value in identity.items():
        if name == HELD_OUT and name not in old_identity:
            continue
        if old_identity.get(name) != value:
            raise ValueError(
                f"the {name} of the run in {path} was {old_identity.get(name)}, it is now {value}; "
                f"a resumed run needs the same one; {way_out}"
            )


def _how_to_go_on(
    path: pathlib.Path, old: Config, new: Config, kind: str, changed: Mapping[str, tuple[Any, Any]]
) -> str:
    """Which keys a resumed run cannot change and why, and what to do: to resume it, to branch off, to begin anew."""
    parts = [f"{key} was {then!r}, is {now!r}" for key, (then, now) in list(changed.items())[:5]]
    why, back = "which changes what a step computes", "give it the old value to resume it"
    if set(changed) <= {f"{kind}.steps", HORIZON}:
        why = f"and the {new.optimizer.schedule} schedule of the learning rate would end elsewhere"
        back = f"{HORIZON}={horizon(old, kind)} keeps the schedule of the run, to resume it"
    ways = [back]
    if not cannot_branch(old, new, kind):
        keys = " ".join(f"{key}={json.dumps(now)}" for key, (_, now) in changed.items())
        command = "train" if kind == "grpo" else kind
        ways.append(f"`grpo {command} {path} --branch FOLDER {keys}` goes on from its last checkpoint in a new folder")
    ways.append("choose another output_dir, or pass checkpoint.overwrite=true to replace that run")
    return f"{'; '.join(parts)}, {why}; {'; or '.join(ways)}"


def _lock(path: pathlib.Path) -> int:
    """The descriptor of the lock file, locked."""
    return lock_file(
        path / LOCK, f"output_dir {path} is in use by another process; stop that one or choose another output_dir"
    )


def _left_by_start(path: pathlib.Path) -> list[pathlib.Path]:
    """Paths left by a start that recorded nothing: unfinished checkpoints, its files, run.json last. Only drafts
    where run.json has not our mark.
    """
    drafts = [path / (UNFINISHED + name) for name in (IDENTITY, CONFIG)]
    if not is_own_identity(path):
        return drafts
    return [
        *unfinished_steps(path),
        *evaluation_files(path),  # of the evaluation before the first step
        *unfinished_evaluations(path),
        *drafts,
        *(path / name for name in (METRICS, SAMPLES, EVENTS, JOURNAL, CONFIG, IDENTITY)),
    ]


def _clear_start(path: pathlib.Path) -> None:
    """Removes what `_left_by_start` names, and checkpoints/ and evaluations/ of such a start if they are empty."""
    left = _left_by_start(path)
    if is_own_identity(path):
        for step in unfinished_steps(path):
            shutil.rmtree(step)
        for entry in (*evaluation_files(path), *unfinished_evaluations(path)):
            entry.unlink()
        for place in (path / CHECKPOINTS, path / EVALUATIONS):
            if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
                place.rmdir()
    for entry in left:
        entry.unlink(missing_ok=True)
