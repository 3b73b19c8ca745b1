"""The journal of a run: what episodes of the steps since the last checkpoint have said and drawn.

In: turns as they end, and what environments answer. Out: `journal.jsonl` in the run folder, one JSON object for each
line, and after a kill the episodes of the step that is run again. Not here: how episodes go on from there
(`rl.rollout.episodes`, `rl.rollout.recorded`).

    {"step": s, "run": id, "mark": mark}             the lines behind it are of this step, with these weights and code
    {"p": p, "s": g, "n": i, "turn": {...}}          turn i of sample g of prompt p: text, ids, log-probs
    {"p": p, "s": g, "n": i, "reply": {...}}         answer i of its environment: begin, each step, finish
    {"p": p, "s": g, "reward": name, "of": {...}}    what a reward function gave to it by itself
    {"p": p, "s": g, "again": true}                  what was there of it does not count

Lines are written and synced by a thread, as many at a time as have come meanwhile, so that decoding waits for no disk.
A kill costs the last of them. A turn that is written again cuts off what came behind it.
"""

import base64
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, BinaryIO, Self

import jax
import jax.numpy as jnp
import numpy as np

from rewards.environment import TurnTokens
from rewards.environment_runner import EnvironmentReply, reply_of
from rewards.replies import Result
from rl.config.load import Config
from rl.devices import hosts
from rl.files.local_files import write_file
from rl.files.output_file import writing
from rl.run_folder.contents import JOURNAL, checkpoint_steps, run_id
from rl.run_folder.trust import code_of, digests
from rl.sampler.contract import Completion

Key = tuple[int, int]  # prompt index, sample index: no two episodes of a step have the same, refills included
_REWARD = ("value", "logged", "sums", "seconds", "retries")  # of a `Result`
_ARRAYS = ("sampler_logprobs", "policy_logprobs", "top_ids", "top_logprobs", "kept_words")


@dataclasses.dataclass
class Recorded:
    """What is known of an episode. row: the digest of its data row and seed. said: what its environment was told of
    each turn, the text and what it took. replies: of its environment, in order: begin, each step, finish. rewards: of
    the whole episode, by function.
    """

    row: str = ""
    turns: list[Completion] = dataclasses.field(default_factory=list)
    said: list[tuple[str, TurnTokens | None]] = dataclasses.field(default_factory=list)
    replies: list[EnvironmentReply] = dataclasses.field(default_factory=list)
    rewards: dict[str, Result] = dataclasses.field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether its environment has said its last word."""
        return bool(self.replies) and (self.replies[-1].op == "finish" or self.replies[-1].failure is not None)

    def add_turn(self, number: int, turn: Completion, text: str, tokens: TurnTokens | None) -> None:
        """Adds a turn. What came behind one of this number is gone."""
        del self.turns[number:], self.said[number:], self.replies[number + 1 :]
        self.turns.append(turn)
        self.said.append((text, tokens))
        self.rewards.clear()

    def add_reply(self, number: int, reply: EnvironmentReply) -> None:
        """Adds an answer. What came behind one of this number is gone."""
        del self.replies[number:]
        self.replies.append(reply)
        self.rewards.clear()


class Journal:
    """The journal of a run, in its folder; a context manager. The first process of the run reads and writes it, and all
    of them know the same.

    folder: of the run, with run.json. code: a digest of the environments and reward functions: what others have said
      is not taken.
    """

    def __init__(self, folder: pathlib.Path, code: str = "") -> None:
        self._folder, self._path, self._code = folder, folder / JOURNAL, code
        self._run = run_id(folder)
        self._steps: dict[int, tuple[str, dict[Key, Recorded]]] = {}  # {step: (mark of weights and code, episodes)}
        self._segments: list[tuple[int, int]] = []  # (step, first byte) of what is between two headers
        self._size = self._read()
        self._file: BinaryIO | None = None
        self._writes = hosts.is_first()
        self._thread = ThreadPoolExecutor(1, "journal")
        self._written: Future[None] | None = None
        self._lines: list[bytes] = []
        self._header: int | None = None  # the step of the last header
        self.seconds = 0.0  # that the run's own thread spent here
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drops what checkpoints have made needless. After an error, what cannot be written is left out."""
        try:
            self.sync(waits=True)
            self._drop(max(checkpoint_steps(self._folder), default=0))
        except (OSError, ValueError):
            if error is None:
                raise
        finally:
            self._thread.shutdown()
            if self._file is not None:
                self._file.close()

    def step(self, step: int, params: Any) -> "StepJournal":
        """The part of a step, from 0, that is drawn with `params`. What is there of it was drawn with the same.

        Drops the steps that come before a checkpoint that is on the disk. Raises ValueError where the disk is full.
        """
        self.sync(waits=True)
        start = time.perf_counter()
        self.seconds, self.num_bytes = 0.0, 0
        self._drop(max(checkpoint_steps(self._folder), default=0))
        mark = weights_mark(params) + self._code
        known, episodes = self._steps.get(step, ("", {}))
        if known != mark:  # and so later steps were drawn with other weights, too
            episodes, self._steps = {}, {}
        self._steps = {number: kept for number, kept in self._steps.items() if number > step}
        self._header = None
        self.seconds += time.perf_counter() - start
        return StepJournal(self, step, mark, episodes)

    def add(self, step: int, mark: str, line: Mapping[str, Any]) -> None:
        """Adds a line of a step. It is written by `sync`."""
        start = time.perf_counter()
        if self._header != step:
            self._header = step
            self._segments.append((step, self._size))
            self._add({"step": step, "run": self._run, "mark": mark})
        self._add(line)
        self.seconds += time.perf_counter() - start

    def sync(self, waits: bool = False) -> None:
        """Has all lines so far written and synced, by a thread; waits for it, or returns at once. ValueError where the
        disk is full.
        """
        start = time.perf_counter()
        if waits:
            self._wait()
        if self._lines and (self._written is None or self._written.done()):
            self._wait()  # for its error
            content, self._lines = b"".join(self._lines), []
            self._written = self._thread.submit(self._write, content)
        if waits:
            self._wait()
        self.seconds += time.perf_counter() - start

    def _add(self, line: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        encoded = json.dumps(line, allow_nan=False).encode("ascii") + b"\n"
        self._lines.append(encoded)
        self._size += len(encoded)
        self.num_bytes += len(encoded)

    def _write(self, content: bytes) -> None:
        with writing(self._path):
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  open for the life of the run
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())

    def _wait(self) -> None:
        """Returns when what was handed to the thread is on the disk."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _read(self) -> int:
        """Reads the file, up to a line that is cut short or is none of this run's. Returns the bytes that stay."""

        def read() -> str:
            return self._path.read_bytes().decode("latin-1") if self._path.is_file() else ""

        content = hosts.from_first(read).encode("latin-1")
        size, now = 0, None
        for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                now = self._take(json.loads(line), now, size)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # what no run wrote
                break
            size += len(line)
        if size < len(content) and hosts.is_first():
            os.truncate(self._path, size)
        return size

    def _take(self, line: dict[str, Any], step: int | None, size: int) -> int:
        """Reads a line; returns the step of those behind it."""
        if "step" in line:
            if line["run"] != self._run:
                raise ValueError("the journal of another run")
            step, mark = int(line["step"]), str(line["mark"])
            self._segments.append((step, size))
            if self._steps.get(step, ("", {}))[0] != mark:
                self._steps[step] = mark, {}
            return step
        if step is None:
            raise ValueError("a line without a step")
        key, episodes = (int(line["p"]), int(line["s"])), self._steps[step][1]
        if "again" in line:
            episodes.pop(key, None)
            return step
        episode = episodes.setdefault(key, Recorded())
        if "reward" in line:
            episode.rewards[line["reward"]] = Result(0, failure=None, **line["of"])
            return step
        number = int(line["n"])
        if "turn" in line:
            if number > len(episode.turns):
                raise ValueError("a turn without those before it")
            tokens = line["turn"].get("tokens")
            tokens = None if tokens is None else TurnTokens(*tokens)
            episode.add_turn(number, _turn(key, line["turn"]), line["turn"]["text"], tokens)
            return step
        if number > len(episode.replies):
            raise ValueError("an answer without those before it")
        episode.row = line.get("row", episode.row)
        episode.add_reply(number, _reply(line["reply"]))
        return step

    def _drop(self, saved: int) -> None:
        """Drops steps before the one that comes after the checkpoint of `saved` steps."""
        assert not self._lines, "what is not written yet"
        ends = [*(first for _, first in self._segments), self._size][1:]
        kept = [(s, first, end) for (s, first), end in zip(self._segments, ends, strict=True) if s >= saved]
        self._steps = {step: episodes for step, episodes in self._steps.items() if step >= saved}
        if len(kept) == len(self._segments) or not self._writes:
            return
        if self._file is not None:
            self._file.close()
            self._file = None
        content = b""
        if kept:
            whole = self._path.read_bytes()
            content = b"".join(whole[first:end] for _, first, end in kept)
            write_file(self._path, content)
        else:
            self._path.unlink(missing_ok=True)
        sizes = [end - first for _, first, end in kept]
        starts = np.cumsum([0, *sizes]).tolist()
        self._segments = [(step, start) for (step, _, _), start in zip(kept, starts, strict=False)]
        self._size, self._header = len(content), None


class StepJournal:
    """The part of one step: what is known of its episodes, and what is added.

    Attributes:
      num_taken, num_continued: episodes that were there as a whole, or in part. num_again: those that are drawn again,
        because their environment answered otherwise.
    """

    def __init__(self, journal: Journal, step: int, mark: str, episodes: dict[Key, Recorded]) -> None:
        self._journal, self._step, self._mark, self._episodes = journal, step, mark, episodes
        self.num_taken = self.num_continued = self.num_again = 0
        self._noted: collections.deque[tuple[Key, str, Result]] = collections.deque()

    def episode(self, key: Key, row: str) -> Recorded:
        """What is known of an episode; nothing where its data row or its seed were others."""
        found = self._episodes.setdefault(key, Recorded(row))
        if not found.replies or found.row != row:
            if found.turns or found.replies:
                self._add(key, {"again": True})
            found = self._episodes[key] = Recorded(row)
        elif found.is_over:
            self.num_taken += 1
        else:
            self.num_continued += 1
        return found

    def forget(self, key: Key) -> Recorded:
        """Begins an episode again, whose environment answers otherwise than it did."""
        self._add(key, {"again": True})
        self.num_continued, self.num_again = self.num_continued - 1, self.num_again + 1
        self._episodes[key] = Recorded(self._episodes[key].row)
        return self._episodes[key]

    def recorded_turn(self, key: Key, number: int) -> Completion | None:
        """A turn of an episode; None where it is not known."""
        turns = self._episodes[key].turns
        return turns[number] if number < len(turns) else None

    def add_turn(self, key: Key, number: int, turn: Completion, text: str, tokens: TurnTokens | None = None) -> None:
        """Adds a turn that was drawn, unless the same one is there."""
        known = self.recorded_turn(key, number)
        if known is not None and np.array_equal(known.token_ids, turn.token_ids):
            return
        self._episodes[key].add_turn(number, turn, text, tokens)
        told = {"text": text, "tokens": None if tokens is None else dataclasses.astuple(tokens)}
        self._add(key, {"n": number, "turn": {**told, **_of_turn(turn)}})

    def add_reply(self, key: Key, reply: EnvironmentReply) -> None:
        """Adds the next answer of an episode's environment."""
        episode = self._episodes[key]
        line = {"n": len(episode.replies), "reply": _of_reply(reply)}
        episode.add_reply(len(episode.replies), reply)
        self._add(key, line if reply.op != "begin" else {**line, "row": episode.row})

    def rewards(self, key: Key) -> Mapping[str, Result]:
        """What reward functions gave to an episode as it is now, by name."""
        return dict(self._episodes[key].rewards)

    def note_reward(self, key: Key, name: str, result: Result) -> None:
        """Adds what a reward function gave to a whole episode; from any thread. It is written by `sync`."""
        self._noted.append((key, name, result))

    def sync(self, waits: bool = False) -> None:
        """See `Journal.sync`."""
        while self._noted:
            key, name, result = self._noted.popleft()
            self._episodes[key].rewards[name] = result
            self._add(key, {"reward": name, "of": {field: getattr(result, field) for field in _REWARD}})
        self._journal.sync(waits)

    def metrics(self) -> dict[str, float]:
        """What the journal took, for metrics.jsonl: seconds of the run's own thread, and megabytes."""
        found = {"journal/seconds": self._journal.seconds, "journal/mb": self._journal.num_bytes / 1e6}
        return found | ({"journal/drawn_again": float(self.num_again)} if self.num_again else {})

    def told(self) -> list[str]:
        """What to say of a step that was begun earlier."""
        if not self.num_taken + self.num_continued + self.num_again:
            return []
        begun = f"{self.num_taken} whole episodes and {self.num_continued} begun ones"
        again = f"; {self.num_again} began again, for their environments answered otherwise" if self.num_again else ""
        return [f"step {self._step + 1}: {begun} are from the journal{again}"]

    def _add(self, key: Key, line: Mapping[str, Any]) -> None:
        self._journal.add(self._step, self._mark, {"p": key[0], "s": key[1], **line})


def weights_mark(params: Any) -> str:
    """A mark of these weights, which does not depend on where they lie: equal bits have equal marks, and others hardly
    ever.
    """
    sums = jax.device_get(_sums_of_bits(params))
    return hashlib.blake2b(np.array(sums, np.uint32).tobytes(), digest_size=16).hexdigest()


@jax.jit
def _sums_of_bits(params: Any) -> list[jax.Array]:
    """The sum of the bits of each array, as numbers that wrap around: the same in whatever order they are added."""
    return [jnp.sum(_bits(array).astype(jnp.uint32), dtype=jnp.uint32) for array in jax.tree.leaves(params)]


def _bits(array: jax.Array) -> jax.Array:
    size = array.dtype.itemsize
    if jnp.issubdtype(array.dtype, jnp.floating) and size > 1:
        return jax.lax.bitcast_convert_type(array, jnp.uint16 if size == 2 else jnp.uint32)
    return array.astype(jnp.float32).view(jnp.uint32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def code_digest(config: Config) -> str:
    """Tells environments, tools and reward functions apart, by what names them and by their files, which may be mended
    before a run goes on. What the files import is not seen.
    """
    section = config.rollout
    functions = [(entry.label, entry.function, entry.kwargs) for entry in config.rewards.functions]
    codes = [code for code in code_of(config) if code.key != "logging.trackers"]
    text = json.dumps([digests(codes), section.environments, section.tools, functions], sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def row_digest(row: Mapping[str, Any], seed: int) -> str:
    """Tells data rows and seeds of environments apart."""
    text = json.dumps([dict(row), seed], sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def same_answer(reply: EnvironmentReply, other: EnvironmentReply) -> bool:
    """Whether an environment has answered the same. Metrics may be times, so they may differ."""
    failures = [one.failure and one.failure[0] for one in (reply, other)]
    answers = [
        (one.op, one.messages, one.prompt, one.tools, one.sequence, one.action, one.reward, one.done)
        for one in (reply, other)
    ]
    return failures[0] == failures[1] and answers[0] == answers[1]


def _of_turn(turn: Completion) -> dict[str, Any]:
    arrays = {name: _of_array(getattr(turn, name)) for name in _ARRAYS}
    return {
        "ids": turn.token_ids.tolist(),
        "finish_reason": turn.finish_reason,
        "stop_reason": turn.stop_reason,
        **arrays,
    }


def _turn(key: Key, fields: Mapping[str, Any]) -> Completion:
    ids, ends = np.array(fields["ids"], np.int32), (fields["finish_reason"], fields["stop_reason"])
    arrays: Any = {name: _array(fields[name]) for name in _ARRAYS}
    return Completion(*key, ids, finish_reason=ends[0], stop_reason=ends[1], **arrays)


def _of_array(array: np.ndarray | None) -> Sequence[Any] | None:
    """Type, shape and bytes, so that every bit stays."""
    if array is None:
        return None
    array = np.ascontiguousarray(array)
    return [str(array.dtype), list(array.shape), base64.b64encode(array.tobytes()).decode()]


def _array(told: Sequence[Any] | None) -> np.ndarray | None:
    if told is None:
        return None
    dtype, shape, content = told
    return np.frombuffer(base64.b64decode(content), jnp.dtype(dtype)).reshape(shape).copy()


def _of_reply(reply: EnvironmentReply) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(reply).items() if name != "episode"}


def _reply(fields: Mapping[str, Any]) -> EnvironmentReply:
    return reply_of({**fields, "episode": -1})
