"""A reward worker: `python -m rewards.worker`, started by `rewards.runner`.

In: requests on standard input. Out: replies on standard output (frames of `rewards.protocol`). It runs the user's
functions in its main thread, where `signal.alarm` works, and turns whatever they do into a number, a None or a named
failure. What it cannot survive (a hang, a crash) the runner sees from outside. It never imports jax.

    {"op": "load", "key": k, "spec": {...}, "columns": [...], "path": [...]}
        -> "loaded" or "refused"
    {"op": "run", "key": k, "mode": m, "limit": seconds, "retries": n, "traces": whether to tell all tracebacks,
        "prompts", "completions", "columns", "completion_ids", "finish_reasons", "seeds", "moment": {...},
        "groups": {"members": [...], "group_of": [...]} or null,
        "texts": [[prompt, prompt and completion], ...] or null, "is_trial": whether the rewards count for nothing}
        -> a "result" for each sample, then "done"

The fields of a reply are in `rewards.replies`; each repeats the nonce of its request.

Modes: "batch" is one call for all samples of the task, and its `done` may carry a failure; "each" is one call after
another; "together" runs an async function on all samples at once.

A call that fails by an error of the network (`rewards.retrying`) is made again, with new arguments and after a pause,
as long as the pause ends within its time limit. What a failed try logged is dropped.
"""

import contextlib
import dataclasses
import functools
import inspect
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from time import monotonic, sleep  # by name, before a user's code can replace it
from typing import Any, BinaryIO

from rewards.contract import BoundReward, RewardSpec, bind, load_function
from rewards.in_worker import (
    Errors,
    Watchdog,
    as_reward,
    claim_pipes,
    read_requests,
    survive_signals,
    write_frame,
)
from rewards.logged import CallLog
from rewards.moment import Moment
from rewards.protocol import pack
from rewards.replies import MAX_RETRIES, MAX_TEXT, Done, Failure, LoadedFunction, one_line
from rewards.retrying import is_network_error, pause
from rewards.reward_call import Judged, arguments, batch_rewards, call_one, judgement, kept
from rewards.worker_variables import missing_variable


def main() -> None:
    """Serve requests until standard input closes."""
    requests, replies = claim_pipes()
    survive_signals()
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(requests, inbox.put), daemon=True).start()
    with contextlib.ExitStack() as stack:
        worker = _Worker(stack, replies)
        while (request := inbox.get()) is not None:
            worker.handle(request)


class _Worker:
    """The functions that are loaded, and how requests are answered. `stack` closes what is opened on the way."""

    def __init__(self, stack: contextlib.ExitStack, replies: BinaryIO):
        self._stack, self._replies = stack, replies
        self._rewards: dict[int, BoundReward] = {}
        self._errors = Errors([__file__, call_one.__code__.co_filename], [CallLog.log_metric.__code__.co_filename])
        self._watchdog = Watchdog()
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
            result = self._finished(bound.function(**arguments(bound, request, slice(None), tries.log)))
            return batch_rewards(result, size), kept(tries.log)

        found, failure = self._isolated(functools.partial(tries.run, call), tries.limit)
        seconds, retries = tries.end()
        if failure is None:
            for index, (value, logged) in enumerate(zip(*found, strict=True)):
                reward, lost = self._isolated(functools.partial(as_reward, value), request["limit"])
                self._report(index, Judged(reward, logged, {} if index else tries.log.sums), lost)
        return Done(failure, seconds, retries)

    def _run_each(self, bound: BoundReward, request: Mapping[str, Any]) -> Done:
        for index in range(len(request["prompts"])):
            tries = self._tries(bound, request, 1)

            def call(index: int = index, tries: _Tries = tries) -> Judged:
                return judgement(bound, self._finished(call_one(bound, request, index, tries.log)), tries.log)

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
                    result = await call_one(bound, request, index, tries.log)
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
                judged = judgement(bound, result, tries.log)
            except BaseException as error:  # noqa: BLE001  as in _isolated; SystemExit would end the loop
                late = isinstance(error, TimeoutError) and scope.expired()
                failure = ("timeout", f"no answer within {limit:g} s") if late else self._errors.failure(error)
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
            return None, self._errors.failure(error)

    def _report(
        self, index: int, judged: "Judged | None", failure: Failure | None, seconds: float = 0.0, retries: int = 0
    ) -> None:
        value, logged, sums = judged or Judged(None, {}, {})
        kind, message = failure or (None, None)
        told = {"value": value, "kind": kind, "message": message and one_line(message), "logged": logged, "sums": sums}
        self._reply(op="result", index=index, **told, seconds=seconds, retries=retries, trace=self._take_trace(kind))

    def _take_trace(self, kind: str | None) -> str:
        """The traceback of the failure that is told now, if it has one: the first of its sort, which the runner puts
        into the log, and any where the runner wants all of them.
        """
        trace, self._errors.trace = self._errors.trace, ""
        return trace if kind == "exception" and (self._tells_traces or self._errors.is_new) else ""

    def _reply(self, **message: Any) -> None:
        write_frame(self._replies, pack({"nonce": self._nonce, **message}))


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


if __name__ == "__main__":
    main()
