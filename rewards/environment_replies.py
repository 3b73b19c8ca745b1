"""Reads the replies of a worker with environments without trusting them, as `rewards.replies` does for rewards.

In: a frame from a worker's pipe. Out: typed replies; anything else raises `BrokenWorker`.

    {"nonce": n, "op": "loaded", "environments": {name: {"form", "is_async", "schemas"}}}
    {"nonce": n, "op": "refused", "error"}
    {"nonce": n, "op": "done", "messages", "prompt", "tools", "action", "reward", "done", "metrics", "num_tool_calls",
        "num_bad_tool_calls", "sequence", "judged": {function: number, null or [kind, message]}, "kind", "message",
        "seconds", "traces": [[kind, message, traceback], ...]}
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection
from typing import Any, NamedTuple

from rewards.environment import Message
from rewards.logged import is_plain
from rewards.messages import ROLES, is_message, is_metrics
from rewards.replies import (
    MAX_REWARD,
    MAX_SECONDS,
    BrokenWorker,
    Failure,
    Refused,
    check_fields,
    one_line,
    read_fields,
    shown,
)
from rewards.tool_calls import MAX_CALLS

LABEL = "rollout.environment"  # the beginning of messages about what a configuration names
TOOLS_LABEL = "rollout.tools"
MAX_DEPTH = 40  # of nesting in JSON schemas of an agent's tools
TOOLS_NAME = "tools"  # of the environment of a run that has tools and no other one
# What the worker may tell of, and beside it what only the runner sees: `died`, `memory`, `replay`.
KINDS = ("exception", "timeout", "not_a_step", "not_a_number", "out_of_range", "wrong_length")
FAILURES = (*KINDS, "died", "memory", "replay")


@dataclasses.dataclass(frozen=True)
class LoadedEnvironment:
    """A worker's description of an environment. schemas: of its tools, where they were asked for."""

    form: str
    is_async: bool
    schemas: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Done:
    """What a request about an episode came to; see `rewards.environment_runner.EnvironmentReply`."""

    messages: str | list[Message]
    action: Message | None
    reward: float | None
    done: bool
    metrics: dict[str, float]
    num_tool_calls: int
    num_bad_tool_calls: int
    judged: dict[str, float | Failure | None]
    failure: Failure | None
    seconds: float
    prompt: str | list[Message] | None
    tools: list[dict[str, Any]] | None
    sequence: int | None


class Trace(NamedTuple):
    """A traceback of an environment's code. failure: the error, which is the first of its sort in its worker."""

    failure: Failure
    text: str


def read_loaded(fields: dict[str, Any], names: Collection[str]) -> dict[str, LoadedEnvironment] | Refused:
    """The reply to a request to load environments of these names."""
    if fields["op"] == "refused":
        check_fields(fields, {"error": str})
        return Refused(one_line(fields["error"]))
    if fields["op"] != "loaded":
        raise BrokenWorker(f"the operation {shown(fields['op'])} where environments were to be loaded")
    check_fields(fields, {"environments": dict})
    found = fields["environments"]
    if {*found} != {*names} or not all(isinstance(told, dict) for told in found.values()):
        raise BrokenWorker(f"environments that were not asked for: {shown([*found])}")
    return {name: _loaded(told) for name, told in found.items()}


def read_done(fields: dict[str, Any], op: str) -> tuple[Done, list[Trace]]:
    """The reply to a request about an episode, and what it tells of errors, which may be those of other episodes."""
    if fields["op"] != "done":
        raise BrokenWorker(f"the operation {shown(fields['op'])} where an episode was played")
    text = (str, type(None))
    types: dict[str, type | tuple[type, ...]] = {"messages": (str, list), "action": (dict, type(None))}
    types |= {"prompt": (str, list, type(None)), "tools": (list, type(None)), "sequence": (int, type(None))}
    types |= {"reward": (float, type(None)), "done": bool, "metrics": dict, "num_tool_calls": int}
    types |= {"num_bad_tool_calls": int, "kind": text, "message": text, "seconds": float}
    check_fields(fields, types | {"traces": list, "judged": dict})
    kind, message, reward, messages = fields["kind"], fields["message"], fields["reward"], fields["messages"]
    if (kind is None) != (message is None) or kind not in (*KINDS, None):
        raise BrokenWorker(f"a failure of the kind {shown(kind)}")
    if reward is not None and not (math.isfinite(reward) and abs(reward) <= MAX_REWARD):
        raise BrokenWorker(f"the reward {shown(reward)}")
    if not 0 <= fields["num_bad_tool_calls"] <= fields["num_tool_calls"] <= MAX_CALLS + 1:
        raise BrokenWorker("numbers of tool calls that cannot be")
    if not 0 <= fields["seconds"] <= MAX_SECONDS or not is_metrics(fields["metrics"]):
        raise BrokenWorker("metrics or seconds that cannot be")
    _check_messages(messages, op)
    if fields["prompt"] is not None:
        if op != "step":
            raise BrokenWorker("a prompt that nobody asked for")
        _check_messages(fields["prompt"], "begin")
    if fields["sequence"] is not None and (op != "step" or fields["prompt"] is not None or fields["sequence"] < 0):
        raise BrokenWorker(f"the sequence {shown(fields['sequence'])}")
    if not is_plain(fields["tools"], MAX_DEPTH) or not all(isinstance(x, dict) for x in fields["tools"] or ()):
        raise BrokenWorker(f"schemas that are none: {shown(fields['tools'])}")
    if fields["action"] is not None and not is_message(fields["action"], ["assistant"]):
        raise BrokenWorker(f"the action {shown(fields['action'])}")
    told = {field.name: fields[field.name] for field in dataclasses.fields(Done) if field.name != "failure"}
    told["judged"] = {name: _judgement(value) for name, value in fields["judged"].items()}
    return Done(**told, failure=None if kind is None else (kind, one_line(message))), _traces(fields["traces"])


def asked_digest(asked: Any) -> str:
    """Tells apart what an environment has the policy read next. asked: with `messages`, `prompt`, `tools` and
    `sequence`, as in `Done`.
    """
    told = [asked.messages, asked.prompt, asked.tools, asked.sequence]
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=12).hexdigest()


def nonce_of(frame: bytes) -> tuple[str, dict[str, Any]]:
    """(The request that a frame answers, its fields)."""
    fields = read_fields(frame)
    nonce = fields.get("nonce")
    if not isinstance(nonce, str):
        raise BrokenWorker(f"a reply to nothing: {shown(frame)}")
    return nonce, fields


def _loaded(told: dict[str, Any]) -> LoadedEnvironment:
    check_fields({**told, "nonce": "", "op": ""}, {"form": str, "is_async": bool, "schemas": list})
    if not all(isinstance(schema, dict) for schema in told["schemas"]):
        raise BrokenWorker(f"schemas that are none: {shown(told['schemas'])}")
    return LoadedEnvironment(**told)


def _judgement(told: Any) -> float | Failure | None:
    if type(told) is float and math.isfinite(told) and abs(told) <= MAX_REWARD:
        return told
    if isinstance(told, list) and len(told) == 2 and told[0] in KINDS and isinstance(told[1], str):
        return told[0], one_line(told[1])
    if told is not None:
        raise BrokenWorker(f"the reward {shown(told)}")
    return None


def _traces(told: list[Any]) -> list[Trace]:
    found = []
    for one in told:
        if not (isinstance(one, list) and len(one) == 3 and all(isinstance(text, str) for text in one)):
            raise BrokenWorker(f"a traceback that is none: {shown(one)}")
        kind, message, text = one
        found.append(Trace((one_line(kind), one_line(message)), "\n".join(map(one_line, text.splitlines()))))
    return found


def _check_messages(messages: Any, op: str) -> None:
    if isinstance(messages, str):
        is_right = op == "begin" and is_message({"role": "user", "content": messages})
    else:
        is_right = all(is_message(message, None if op == "begin" else ROLES) for message in messages)
    if not is_right:
        raise BrokenWorker(f"messages that are none: {shown(messages)}")
