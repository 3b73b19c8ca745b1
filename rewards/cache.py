"""Answers that are kept by their content, in a folder that workers and runs share.

In: a key, or a function and the arguments of a call. Out: what was kept under it, if anything. An answer is written
whole or not at all, and the oldest are dropped beyond a bound. What a folder holds is not trusted: what is no answer
counts as none.

`FunctionCache` serves any reward function whose entry names a folder (`cache`). The key is a hash of the function's own
source file (of its bytes, where it was given as an object), its name, and the arguments: of those that the run injects,
such as the step or a seed, the ones that the function spells out. A function that draws without a seed must not ask for
a cache, for that would repeat one draw.
"""

import functools
import hashlib
import inspect
import json
import os
import pathlib
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rewards.contract import BoundReward, RewardSpec
from rewards.logged import MAX_NAMES, Sums, add_sums, read_logged, read_sums
from rewards.protocol import encode

_EVICTED_EVERY = 64  # writes
_OWN_NAME = re.compile(r"[0-9a-f]{64}\.json|.*\.tmp")
_OBJECTS = ("log_metric", "log_extra")  # arguments that say nothing of what is judged
_SPELLED_OUT = ("trainer_state", "completion_ids")  # which functions with **columns get without asking for them


class AnswerCache:
    """JSON values by key, in `folder`/answers. most_mb: the most that they take."""

    def __init__(self, folder: str | os.PathLike[str], most_mb: float):
        self._most, self._answers = most_mb, pathlib.Path(folder).expanduser() / "answers"
        self._answers.mkdir(parents=True, exist_ok=True)

    def answer(self, key: str) -> Any:
        """The value that is kept under a key; None without one."""
        path = self._answers / f"{key}.json"
        try:
            value = json.loads(path.read_text())
            os.utime(path)  # the oldest are dropped first
        except (OSError, ValueError, RecursionError):
            return None
        return value

    def keep(self, key: str, value: Any) -> None:
        """Keeps a value, and now and then drops the oldest."""
        path = self._answers / f"{key}.json"
        if path.exists():
            return
        handle, draft = tempfile.mkstemp(dir=self._answers, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(value, file)
        os.replace(draft, path)
        if random.SystemRandom().randrange(_EVICTED_EVERY) == 0:  # not `random`, which a user's code may have seeded
            self.evict()

    def evict(self) -> None:
        """Drops the oldest values beyond the bound."""
        files = []
        for entry in os.scandir(self._answers):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another worker dropped it
                continue
            if _OWN_NAME.fullmatch(entry.name):
                files.append((status.st_mtime, status.st_size, entry.path))
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= self._most * 1e6:
                return
            pathlib.Path(path).unlink(missing_ok=True)
            left -= size


class Kept(NamedTuple):
    """What a call came to: a reward for each completion, what is kept with each, and the metrics."""

    rewards: list[float | None]
    logged: list[dict[str, Any]]
    sums: Sums


class FunctionCache:
    """The answers of one reward function.

    Args:
      identity: of the function, see `identity_of`.
    """

    def __init__(self, answers: AnswerCache, identity: str, bound: BoundReward):
        self._answers, self._identity = answers, identity
        self._spelled_out, self._retries_itself = bound.parameters, bound.retries_itself

    def look_up(self, arguments: Mapping[str, Any], size: int) -> "Lookup":
        """For a call with these arguments, which are for `size` completions."""
        left_out = {*_OBJECTS, *(name for name in _SPELLED_OUT if name not in self._spelled_out)}
        told = {name: value for name, value in arguments.items() if name not in left_out}
        if "trainer_state" in told:
            told["trainer_state"] = vars(told["trainer_state"])
        text = json.dumps([self._identity, size, encode(told, "cache")], sort_keys=True)
        return Lookup(self._answers, hashlib.sha256(text.encode()).hexdigest(), size, self._retries_itself)


class Lookup:
    """One call: `found`, if it was made before, and `keep` for what it came to. It counts in the metric `cached`."""

    def __init__(self, answers: AnswerCache, key: str, size: int, retries_itself: bool):
        self._answers, self._key, self._retries_itself = answers, key, retries_itself
        self.found = _read(answers.answer(key), size)
        if self.found is not None:
            self._count(self.found.sums, 1.0)

    def keep(self, rewards: list[float | None], logged: list[dict[str, Any]], sums: Sums) -> None:
        """Keeps what the call came to, see `Kept`. Its metrics gain `cached`."""
        kept = {name: values for name, values in sums.items() if name != "retries" or not self._retries_itself}
        self._answers.keep(self._key, Kept(rewards, logged, kept)._asdict())
        self._count(sums, 0.0)

    def _count(self, sums: Sums, value: float) -> None:
        add_sums(sums, {"cached": (value, 1)}, MAX_NAMES)


def open_cache(spec: RewardSpec, function: Callable[..., Any], bound: BoundReward) -> FunctionCache:
    """The cache of a function whose spec names a folder.

    Raises ValueError where the function is called with whole batches, is in no file, or the folder cannot be made.
    """
    label = f"reward {spec.name!r}"
    if bound.calls == "whole_batch":
        raise ValueError(
            f"{label}: cache must be null for a function that is called with whole batches, got {spec.cache!r}, for no "
            "batch comes twice; say elementwise: true if it judges each completion by itself"
        )
    try:
        answers = AnswerCache(str(spec.cache), spec.cache_mb)
    except OSError as error:
        raise ValueError(f"{label}: cache must be a folder that can be made, got {spec.cache!r}: {error}") from error
    try:
        return FunctionCache(answers, identity_of(function, spec.function, spec.pickled), bound)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def identity_of(function: Callable[..., Any], name: str, pickled: bytes | None) -> str:
    """A text that changes with the function: its name and the hash of its file, or of its bytes.

    Raises ValueError where it is in no file that can be read.
    """
    if pickled is not None:
        return f"{name} {hashlib.sha256(pickled).hexdigest()}"
    held: Any = inspect.unwrap(function)
    while isinstance(held, functools.partial):
        held = inspect.unwrap(held.func)
    if not (inspect.isroutine(held) or inspect.isclass(held)):
        held = type(held)
    try:
        source = inspect.getsourcefile(held)
    except TypeError:
        source = None
    if source is None:
        raise ValueError("cache needs a function whose source is in a file, so that it is asked again when it changes")
    return f"{name} {hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()}"


def _read(value: Any, size: int) -> Kept | None:
    """What was kept for `size` completions; None for anything else."""
    if not isinstance(value, dict) or value.keys() != {*Kept._fields}:
        return None
    rewards, logged, sums = (value[name] for name in Kept._fields)
    if not _is_list(rewards, size) or not _is_list(logged, size) or read_sums(sums) is None:
        return None
    if not all(reward is None or type(reward) is float for reward in rewards) or None in map(read_logged, logged):
        return None
    return Kept(rewards, logged, sums)


def _is_list(value: Any, size: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == size
