"""A reward worker: `python -m rewards.worker`, started by `rewards.runner`.

In: requests on standard input. Out: replies on standard output (frames of `rewards.protocol`). It runs the user's
functions in its main thread, where `signal.alarm` works, and turns whatever they do into a number, a None or a named
failure. What it cannot survive (a hang, a crash) the runner sees from outside. It never imports jax.

    {"op": "load", "key": k, "spec": {...}, "columns": [...], "path": [...]}
        -> "loaded" or "refused"
    {"op": "run", "key": k, "mode": m, "limit": seconds, "retries": n, "traces": whether to tell tracebacks, "prompts",
        "completions", "columns", "completion_ids", "finish_reasons", "seeds", "moment": {...},
        "groups": {"members": [...], "group_of": [...]} or null,
        "texts": [[prompt, prompt and completion], ...] or null}
        -> a "result" for each sample, then "done"

The fields of a reply are in `rewards.replies`; each repeats the nonce of its request.

Modes: "batch" is one call for all samples of the task, and its `done` may carry a failure; "each" is one call after
another; "together" runs an async function on all samples at once.

A call that fails by an error of the network (`rewards.retrying`) is made again, with new arguments and after a pause,
as long as the pause ends within its time limit. What a failed try logged is dropped.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import inspect
import os
import queue
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Mapping
from math import isfinite  # by name, before a user's code can replace it
from time import monotonic, sleep  # likewise
from typing import Any, BinaryIO, NamedTuple

from rewards.contract import BoundReward, RewardSpec, bind, load_function
from rewards.environment import missing_variable
from rewards.logged import CallLog, Sums, number_of, shortened
from rewards.moment import Moment
from rewards.protocol import HEADER, pack, unpack
from rewards.replies import MAX_RETRIES, MAX_TEXT, Done, Failure, LoadedFunction, one_line
from rewards.retrying import is_network_error, pause

# How long a hung worker may outlive its time limit, or a busy one its parent, before it ends itself.
_ORPHAN_SECONDS = 5.0
_SHARED_SECONDS = 1.0  # in which calls may begin that share one watchdog

_MAX_TRACEBACK = 1 << 14  # characters in the log
# Files in which no function of a user is.
_NOT_OF_FUNCTIONS = (CallLog.log_metric.__code__.co_filename, __file__)
_LIBRARIES = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {os.path.dirname(os.__file__) + os.sep}
)


class _Rejected(Exception):
    """A function returned something that is not a reward."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def main() -> None:
    """Serve requests until standard input closes."""
    requests, replies = _claim_pipes()
    # Ctrl-C in a terminal reaches the whole process group; the runner decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    # The runner sends this signal before it kills a hung worker: the log then shows where it hung, in C code too.
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests, inbox), daemon=True).start()
    with contextlib.ExitStack() as stack:
        worker = _Worker(stack, replies)
        while (request := inbox.get()) is not None:
            worker.handle(request)


def as_reward(value: Any) -> float | None:
    """The reward that a function's return value stands for: None, or a finite float.

    Anything with `__float__` counts (bool, int, numpy and torch scalars, Decimal). Text, complex numbers and containers
    do not, also where numpy gives them a `__float__`. How large it may be is the runner's rule.
    """
    if value is None:
        return None
    number = number_of(value)
    if number is None:
        raise _Rejected("not_a_number", f"returned {_short(value)}, a reward must be a number or None")
    if not isfinite(number):
        raise _Rejected("not_a_number", f"returned {number}, a reward must be finite")
    return number


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes for the protocol, and leave user code an empty stdin and a stdout that goes to the log."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, errors="backslashreplace")
    return requests, replies


def _read_requests(requests: BinaryIO, inbox: queue.SimpleQueue) -> None:
    buffer = bytearray()
    try:
        while chunk := os.read(requests.fileno(), 1 << 20):
            buffer += chunk
            if len(buffer) >= HEADER.size:
                for message in unpack(buffer):
                    inbox.put(message)
    finally:
        # The parent closed the pipe, or is gone; or a request cannot be read. No request will come any more: a worker
        # that ends is noticed and replaced, one that waited for ever would cost the time limit of every call.
        inbox.put(None)
    sleep(_ORPHAN_SECONDS)
    _end_process_group()


def _end_process_group() -> None:
    """End this process and what user code started, where the runner gave it a process group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


class _Worker:
    """The functions that are loaded, and how requests are answered. `stack` closes what is opened on the way."""

    def __init__(self, stack: contextlib.ExitStack, replies: BinaryIO):
        self._stack, self._replies = stack, replies
        self._rewards: dict[int, BoundReward] = {}
        self._logged: set[tuple[str, str]] = set()  # errors whose traceback is in the log already
        self._trace = ""  # of the last error, for the reply that tells of it
        self._watchdog = _Watchdog()
        self._in_vain: set[int] = set()  # functions whose last call failed by the network after all of its retries

    def handle(self, request: Mapping[str, Any]) -> None:
        """Answer one request."""
        self._nonce = request["nonce"]
        if request["op"] == "load":
            self._load(request)
            return
        self._tells_traces = request["traces"]
        bound, moment = self._rewards[request["key"]], Moment(**request["moment"])
        request = {**request, "of_run": {"step": moment.step, "trainer_state": moment.trainer_state}}
        run = {"batch": self._run_batch, "each": self._run_each, "together": self._run_together}[request["mode"]]
        done = run(bound, request)
        self._watchdog.rest()
        kind, message = done.failure or (None, None)
        effort = {"seconds": done.seconds, "retries": done.retries, "trace": self._take_trace(kind)}
        self._reply(op="done", kind=kind, message=message, **effort)

    def _load(self, request: Mapping[str, Any]) -> None:
        sys.path.extend(entry for entry in request["path"] if entry not in sys.path)
        spec = RewardSpec(**request["spec"])
        try:
            bound = bind(load_function(spec), request["columns"], spec.kwargs, spec.name, spec.calls)
        except ValueError as error:
            self._reply(op="refused", error=f"{one_line(str(error), MAX_TEXT // 2)}{missing_variable(error)}")
            return
        self._rewards[request["key"]] = bound
        if bound.is_async:
            _ = self._loop  # now, and not in the time of the first call
        told = [field.name for field in dataclasses.fields(LoadedFunction)]
        self._reply(op="loaded", **{name: getattr(bound, name) for name in told})

    def _run_batch(self, bound: BoundReward, request: Mapping[str, Any]) -> Done:
        size = len(request["prompts"])
        tries = self._tries(bound, request, size)

        def call() -> tuple[list[Any], list[dict[str, Any]]]:
            result = self._finished(bound.function(**_arguments(bound, request, slice(None), tries.log)))
            return _batch_rewards(result, size), _kept(tries.log)

        found, failure = self._isolated(functools.partial(tries.run, call), tries.limit)
        seconds, retries = tries.end()
        if failure is None:
            for index, (value, logged) in enumerate(zip(*found, strict=True)):
                reward, lost = self._isolated(functools.partial(as_reward, value), request["limit"])
                self._report(index, _Judged(reward, logged, {} if index else tries.log.sums), lost)
        return Done(failure, seconds, retries)

    def _run_each(self, bound: BoundReward, request: Mapping[str, Any]) -> Done:
        for index in range(len(request["prompts"])):
            tries = self._tries(bound, request, 1)

            def call(index: int = index, tries: _Tries = tries) -> _Judged:
                return _judged(bound, self._finished(_call_one(bound, request, index, tries.log)), tries.log)

            judged, failure = self._isolated(functools.partial(tries.run, call), tries.limit)
            self._report(index, judged, failure, *tries.end())
        return Done(None)

    @functools.cached_property
    def _loop(self) -> Any:
        """The event loop of async functions, an `asyncio.Runner`. Importing it is half of a worker's start, which most
        functions do without.
        """
        import asyncio

        return self._stack.enter_context(asyncio.Runner())

    def _run_together(self, bound: BoundReward, request: Mapping[str, Any]) -> Done:
        import asyncio

        limit = request["limit"]

        async def answer(index: int, tries: _Tries) -> Any:
            while True:
                try:
                    result = await _call_one(bound, request, index, tries.log)
                    tries.succeeded()
                    return result
                except Exception as error:
                    if (wait := tries.pause_after(error)) is None:
                        raise
                await asyncio.sleep(wait)

        async def score(index: int) -> None:
            judged, failure, scope, tries = None, None, asyncio.timeout(limit), self._tries(bound, request, 1)
            try:
                async with scope:
                    result = await answer(index, tries)
                judged = _judged(bound, result, tries.log)
            except BaseException as error:  # noqa: BLE001  as in _isolated; SystemExit would end the loop
                late = isinstance(error, TimeoutError) and scope.expired()
                failure = ("timeout", f"no answer within {limit:g} s") if late else self._failure(error)
            self._report(index, judged, failure, *tries.end())

        async def score_all() -> None:
            await asyncio.gather(*(score(index) for index in range(len(request["prompts"]))))

        self._watchdog.watch(limit)
        self._loop.run(score_all())
        return Done(None)

    def _tries(self, bound: BoundReward, request: Mapping[str, Any], size: int) -> "_Tries":
        return _Tries(bound, request, size, self._in_vain)

    def _finished(self, result: Any) -> Any:
        """The result itself, or what an async function's coroutine comes to."""
        if not inspect.isawaitable(result):
            return result

        async def wait() -> Any:
            return await result

        return self._loop.run(wait())

    def _isolated(self, call: Callable[[], Any], limit: float) -> tuple[Any, Failure | None]:
        """What user code returns, or how it failed."""
        self._watchdog.watch(limit)
        try:
            return call(), None
        except BaseException as error:  # noqa: BLE001  user code raises what it likes; it is counted, shown
            return None, self._failure(error)

    def _failure(self, error: BaseException) -> Failure:
        """Kind and one-line message of a failure. The traceback goes to the log once per kind of error and place."""
        if isinstance(error, _Rejected):
            return error.kind, str(error)
        last_line = traceback.format_exception_only(error)[-1].strip()
        place, trace = _place(error), _own_trace(error)
        if (type(error).__name__, place) not in self._logged:
            self._logged.add((type(error).__name__, place))
            print(trace, end="", file=sys.stderr)
        self._trace = trace
        return "exception", f"{one_line(last_line, MAX_TEXT // 2)} ({place}){missing_variable(error)}"

    def _report(
        self, index: int, judged: "_Judged | None", failure: Failure | None, seconds: float = 0.0, retries: int = 0
    ) -> None:
        value, logged, sums = judged or _Judged(None, {}, {})
        kind, message = failure or (None, None)
        told = {"value": value, "kind": kind, "message": message and one_line(message), "logged": logged, "sums": sums}
        self._reply(op="result", index=index, **told, seconds=seconds, retries=retries, trace=self._take_trace(kind))

    def _take_trace(self, kind: str | None) -> str:
        """The traceback of the failure that is told now, where the runner wants it and it has one."""
        trace, self._trace = self._trace, ""
        return trace if kind == "exception" and self._tells_traces else ""

    def _reply(self, **message: Any) -> None:
        frame = memoryview(pack({"nonce": self._nonce, **message}))
        while frame:
            frame = frame[os.write(self._replies.fileno(), frame) :]


class _Tries:
    """The tries of one call for `size` samples: what the last one logs, and how often and until when it is made again.

    in_vain: functions whose last call failed by the network after all of its retries; of these a call is made once.
    limit: seconds of all tries together.
    """

    def __init__(self, bound: BoundReward, request: Mapping[str, Any], size: int, in_vain: set[int]):
        self.limit, self.log = request["limit"] * size, CallLog(size)
        self._key, self._in_vain = request["key"], in_vain
        # Where a server is gone for good, only the first call waits for it, and not every one of a batch.
        self._most = 0 if bound.retries_itself or self._key in in_vain else request["retries"]
        self._counts_logged = bound.retries_itself
        self._retries, self._start = 0, monotonic()

    def run(self, call: Callable[[], Any]) -> Any:
        """What `call` returns, which is called again after errors of the network."""
        while True:
            try:
                result = call()
                self.succeeded()
                return result
            except Exception as error:
                if (wait := self.pause_after(error)) is None:
                    raise
            sleep(wait)

    def pause_after(self, error: Exception) -> float | None:
        """Seconds after which the call is to be made again; None: it has failed."""
        if not is_network_error(error):
            return None
        wait = pause(self._retries)
        if self._retries == self._most or monotonic() + wait - self._start >= self.limit:
            self._in_vain.add(self._key)
            return None
        self._retries, self.log = self._retries + 1, CallLog(self.log.size)
        return wait

    def succeeded(self) -> None:
        """To be called when the call has an answer: calls are made again from now on."""
        self._in_vain.discard(self._key)

    def end(self) -> tuple[float, int]:
        """Seconds and retries of the call, which is over."""
        retries = self._retries
        if self._counts_logged:
            retries = int(max(self.log.sums.pop("retries", [0.0])[0], 0.0))
        return monotonic() - self._start, min(retries, MAX_RETRIES)


def _place(error: BaseException) -> str:
    """File and line of an error: the last that is not in a library, so that it is the function's own where that calls
    one; for a function that is in a library itself, the last at all.
    """
    frames = traceback.extract_tb(error.__traceback__)
    in_python = [f for f in frames if not f.filename.startswith("<frozen ") and f.filename not in _NOT_OF_FUNCTIONS]
    of_user = [f for f in in_python if not f.filename.startswith(_LIBRARIES)]
    last = (of_user or in_python or frames)[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno}"


def _own_trace(error: BaseException) -> str:
    """The traceback of an error from the first line of the user's own code on, cut to `_MAX_TRACEBACK`."""
    frame = own = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == __file__:
            own = frame.tb_next
        frame = frame.tb_next
    trace = "".join(traceback.format_exception(type(error), error, own))
    more = len(trace) - _MAX_TRACEBACK
    return trace if more <= 0 else f"{trace[:_MAX_TRACEBACK]}... ({more} more characters were cut)\n"


class _Judged(NamedTuple):
    """The fields of a result that come from the function, see `rewards.replies.Result`."""

    value: float | None
    logged: dict[str, Any]
    sums: Sums


def _kept(log: CallLog) -> list[dict[str, Any]]:
    """The values that a call logged, for each of its completions."""
    if problem := log.problem():
        raise _Rejected("wrong_length", problem)
    return [log.of_sample(index) for index in range(log.size)]


def _arguments(bound: BoundReward, request: Mapping[str, Any], rows: slice, log: CallLog) -> dict[str, Any]:
    ids = request["completion_ids"]
    columns = {name: values[rows] for name, values in request["columns"].items()}
    of_samples = [_of_sample(request, index) for index in range(len(request["prompts"]))[rows]]
    of_run = {name: [values[name] for values in of_samples] for name in of_samples[0]}
    return bound.batch_arguments(
        request["prompts"][rows],
        request["completions"][rows],
        columns,
        None if ids is None else ids[rows],
        of_run | _of_call(request, log),
    )


def _of_call(request: Mapping[str, Any], log: CallLog) -> dict[str, Any]:
    """What is injected for a whole call, by name."""
    of_call = {"log_metric": log.log_metric, "log_extra": log.log_extra, "rewards_timeout_seconds": request["limit"]}
    return request["of_run"] | of_call


def _of_sample(request: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What is injected for one sample beside what was drawn, by name."""
    reason, groups = request["finish_reasons"][index], request["groups"]
    values = {"truncated": reason == "length", "finish_reason": reason, "seed": request["seeds"][index]}
    if groups is not None:
        values["group"] = list(groups["members"][groups["group_of"][index]])  # its own: a function may sort it
    return values


def _call_one(bound: BoundReward, request: Mapping[str, Any], index: int, log: CallLog) -> Any:
    """Call the function for one sample; a batch function gets a batch of one."""
    if bound.style == "batch":
        return bound.function(**_arguments(bound, request, slice(index, index + 1), log))
    ids = request["completion_ids"]
    row = {name: values[index] for name, values in request["columns"].items()}
    prompt, completion = request["prompts"][index], request["completions"][index]
    of_run = _of_sample(request, index) | _of_call(request, log)
    texts = None if request["texts"] is None else request["texts"][index]
    arguments = bound.sample_arguments(prompt, completion, row, None if ids is None else ids[index], of_run, texts)
    return bound.function(**arguments)


def _batch_rewards(result: Any, size: int) -> list[Any]:
    """The list that a batch function returned, of the right length; its entries are not looked at."""
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, (list, tuple)):
        raise _Rejected("wrong_length", f"returned {_short(result)}, must return a list of {size} rewards")
    if len(result) != size:
        raise _Rejected("wrong_length", f"returned {len(result)} rewards for {size} completions")
    return list(result)


def _judged(bound: BoundReward, result: Any, log: CallLog) -> _Judged:
    """What a call by `_call_one` comes to. A dict has the reward in `score`, and all of it is kept with the sample."""
    if bound.style == "batch":
        result = _batch_rewards(result, 1)[0]
    elif bound.style == "openrlhf":
        result = _openrlhf_reward(result, log)
    elif isinstance(result, Mapping):
        if "score" not in result:
            raise _Rejected("not_a_number", f"returned {_short(result)}, a dict must have the reward as its 'score'")
        log.keep(result)
        result = result["score"]
    reward = as_reward(result)
    return _Judged(reward, _kept(log)[0], log.sums)


def _openrlhf_reward(result: Any, log: CallLog) -> Any:
    """The reward in what a function of OpenRLHF 0.11 returned (`SingleTurnExecutor.execute` reads it there): lists or
    tensors of one, or numbers. `scores`, which stand for the rewards where there are none, and `extra_logs` are kept.
    """
    if not isinstance(result, Mapping) or "rewards" not in result:
        raise _Rejected("not_a_number", f"returned {_short(result)}, must return a dict with 'rewards'")
    reward = _only(result["rewards"])
    score = reward if result.get("scores") is None else _only(result["scores"])
    log.keep({"score": score} | {name: _only(value) for name, value in (result.get("extra_logs") or {}).items()})
    return reward


def _only(value: Any) -> Any:
    """The entry of a list or an array of one; another value itself."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return _only(value[0]) if isinstance(value, (list, tuple)) and len(value) == 1 else value


class _Watchdog:
    """Ends this process if a call takes much longer than the runner allows.

    The runner kills a hung worker in time; this is for a worker whose runner is gone. It needs no interpreter lock,
    so that a hang in C code ends too. Setting it starts a thread, which takes longer than most calls do, so calls that
    follow each other closely share one.
    """

    def __init__(self) -> None:
        self._limit, self._set_at = 0.0, 0.0

    def watch(self, limit: float) -> None:
        """For a call of at most `limit` seconds that begins now."""
        now = monotonic()
        if limit != self._limit or now - self._set_at > _SHARED_SECONDS:
            faulthandler.dump_traceback_later(limit + _SHARED_SECONDS + _ORPHAN_SECONDS, exit=True)
            self._limit, self._set_at = limit, now

    def rest(self) -> None:
        """Nothing is called any more."""
        faulthandler.cancel_dump_traceback_later()
        self._limit = 0.0


def _short(value: Any) -> str:
    return f"{type(value).__name__} {shortened(value)}"


if __name__ == "__main__":
    main()
