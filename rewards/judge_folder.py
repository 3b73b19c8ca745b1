"""What the requests of a judge share over all workers and runs: answers that are kept, and counts under a lock.

In: a folder, its limits, answers by key, and what a request may cost. Out: kept answers, turns, and reservations.

    answers/    one JSON file for each answer, by the hash of its request; the oldest make room
    spent.json  requests, tokens and dollars so far, the time of the next turn, and what is reserved

A request reserves the most that it may cost before it is sent, and settles afterwards. Reservations end at a time of
their own, so those of a worker that died go as well. Not here: what is asked and read (`rewards.judge`).
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

_EVICTED_EVERY = 64  # writes
_STALE_DRAFT = 3600.0  # seconds after which the draft of an answer belongs to nobody
_GRACE = 60.0  # seconds that a reservation outlives the time limit of its request
_MINUTE = 60  # reservations end on whole minutes, so that `spent.json` stays small
_BUDGET_PAUSE = 0.2  # seconds between looks at the budget while other requests hold what is left of it


class BudgetSpent(Exception):
    """A request would go beyond the budget."""


@dataclasses.dataclass(frozen=True)
class Reservation:
    """What a request may cost, and when that is forgotten (seconds since 1970)."""

    dollars: float
    until: int


class JudgeFolder:
    """The folder of a judge.

    cache_mb: the most that answers take. requests_per_minute, budget (dollars): of all that use the folder; None: no
    limit. Without limits, a folder that fails costs no score: it is said once.
    """

    def __init__(
        self, folder: str, *, cache_mb: float, requests_per_minute: float | None = None, budget: float | None = None
    ) -> None:
        self._folder = pathlib.Path(folder).expanduser()
        self._answers = self._folder / "answers"
        self._cache_mb, self._requests_per_minute, self._budget = cache_mb, requests_per_minute, budget

    def check(self) -> None:
        """Raises ValueError for a folder that cannot be made or written, and for counts that cannot be read."""
        try:
            self._answers.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._answers):
                pass
            self._counted(lambda spent: None)
        except (OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody
            raise ValueError(
                f"folder of a judge must be one that can be made and written, got {str(self._folder)!r}: {error}"
            ) from error

    def answer(self, key: str) -> dict[str, Any] | None:
        """The answer that is kept under a key; None without one, and for a file that holds no JSON object."""
        path = self._answers / f"{key}.json"
        try:
            kept = json.loads(path.read_bytes())
            os.utime(path)  # the oldest are dropped first
        except (OSError, ValueError, RecursionError):
            return None
        return kept if isinstance(kept, dict) else None

    def keep(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keeps an answer, whole or not at all, and now and then drops the oldest. Where that fails, it is said once:
        the answer has been paid for.
        """
        path = self._answers / f"{key}.json"
        try:
            self._answers.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=self._answers, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(answer, file)
                os.replace(draft, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(draft)
                raise
            if random.randrange(_EVICTED_EVERY) == 0:
                self._evict()
        except OSError as error:
            say_once(f"answers of the judge cannot be kept in {self._answers} ({_reason(error)}); requests repeat")

    def _evict(self) -> None:
        files = []
        for entry in os.scandir(self._answers):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another worker dropped it
                continue
            if entry.name.endswith(".json"):
                files.append((status.st_mtime, status.st_size, entry.path))
            elif entry.name.endswith(".tmp") and status.st_mtime < time.time() - _STALE_DRAFT:
                pathlib.Path(entry.path).unlink(missing_ok=True)
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= self._cache_mb * 1e6:
                return
            pathlib.Path(path).unlink(missing_ok=True)
            left -= size

    async def reserve(self, dollars: float, seconds: float) -> Reservation | None:
        """Returns when the next request may go. It then has a turn, and a part of the budget.

        dollars: the most that the request may cost. seconds: the most that it may take. While requests under way hold
        what is left of the budget, it waits until they settle, or until their reservations end.

        Raises BudgetSpent where the budget does not allow the request even then, and OSError or ValueError for a folder
        that cannot count, where there are limits. Without limits the result is None there.
        """

        def take(spent: dict[str, Any]) -> tuple[float, Reservation] | None:
            if self._budget is not None:
                held = math.fsum(of_minute[1] for of_minute in spent["reserved"].values())
                if spent["dollars"] + dollars > self._budget:
                    raise BudgetSpent(
                        f"the judge's budget of {self._budget:g} dollars is spent: {spent['dollars']:g} are gone, and "
                        f"one more request may cost {dollars:.2g} ({self._folder}/spent.json)"
                    )
                if spent["dollars"] + held + dollars > self._budget:
                    return None
            turn = max(time.time(), spent["next"])
            if self._requests_per_minute is not None:
                spent["next"] = turn + 60 / self._requests_per_minute
            spent["requests"] += 1
            until = math.ceil((turn + seconds + _GRACE) / _MINUTE) * _MINUTE
            number, sum_ = spent["reserved"].get(str(until), (0, 0.0))
            spent["reserved"][str(until)] = [number + 1, sum_ + dollars]
            return turn, Reservation(dollars, until)

        try:
            while (taken := self._counted(take)) is None:
                await asyncio.sleep(_BUDGET_PAUSE)
        except (OSError, ValueError) as error:
            if self._budget is not None or self._requests_per_minute is not None:
                raise
            say_once(f"requests of the judge cannot be counted in {self._folder} ({_reason(error)})")
            return None
        turn, reservation = taken
        try:
            await asyncio.sleep(max(turn - time.time(), 0))
        except asyncio.CancelledError:  # never sent
            self.settle(reservation, 0.0, 0)
            raise
        return reservation

    def settle(self, reservation: Reservation | None, dollars: float, tokens: int) -> None:
        """Counts what a request cost in place of what it reserved. Where that fails, it is said once: the answer has
        been paid for.
        """

        def count(spent: dict[str, Any]) -> None:
            spent["dollars"] += dollars
            spent["tokens"] += tokens
            if reservation is not None and (of_minute := spent["reserved"].get(str(reservation.until))):
                number, sum_ = of_minute
                spent["reserved"][str(reservation.until)] = [number - 1, max(sum_ - reservation.dollars, 0.0)]

        try:
            self._counted(count)
        except (OSError, ValueError) as error:
            say_once(f"what the judge cost cannot be counted in {self._folder} ({_reason(error)})")

    def _counted(self, change: Callable[[dict[str, Any]], Any]) -> Any:
        """`change` of the counts, which no other worker sees half done. ValueError for a file that holds no counts."""
        path = self._folder / "spent.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = os.fstat(handle).st_size
            spent = _counts(os.pread(handle, size, 0), path)
            result = change(spent)
            now = time.time()
            held = {until: part for until, part in spent["reserved"].items() if part[0] > 0 and float(until) > now}
            text = json.dumps(spent | {"reserved": held}).encode()
            os.pwrite(handle, text.ljust(size), 0)  # one write: whole, or as before
            return result
        finally:
            os.close(handle)


def _counts(text: bytes, path: pathlib.Path) -> dict[str, Any]:
    """The counts that `spent.json` holds, without reservations that ended."""
    spent = {"requests": 0, "tokens": 0, "dollars": 0.0, "next": 0.0}
    if not text:
        return spent | {"reserved": {}}
    try:
        read = json.loads(text)
        spent = {name: _count(read[name]) for name in spent}
        parts = {until: (_count(part[0]), _count(part[1])) for until, part in read.get("reserved", {}).items()}
        now = time.time()
        return spent | {"reserved": {until: part for until, part in parts.items() if float(until) > now}}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} must hold what judges spent, got {text[:80]!r}; remove it") from error


def _count(value: Any) -> Any:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise ValueError("a count is a finite number >= 0")
    return value


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@functools.cache
def say_once(message: str) -> None:
    """Says on stderr, which in a worker is the run's log of rewards, what costs no score."""
    print(f"rewards.judge: {message}", file=sys.stderr, flush=True)
