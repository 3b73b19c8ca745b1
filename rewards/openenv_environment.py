"""Environments of OpenEnv 0.10, which a server plays: `rollout.environment: "openenv:http://127.0.0.1:8000"`.

In: the URL of a server. Out: a player for each episode, with a session of its own on the server. The policy's turn
becomes an action: where the server's schema requires one field, the turn is its value; otherwise the turn must be the
action in JSON. An observation becomes a message of the user: its text where it has one field of text, else its JSON.
Only this URL is asked, without proxies and redirects.
"""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, Never

from rewards.environment import Message, Step
from rewards.extras import import_extra
from rewards.in_worker import Rejected, short

INSTALL = "tandem-grpo[openenv]"
_SECONDS = 10.0  # for the schema, and to connect
_INVALID = "(code: VALIDATION_ERROR)"  # at the end of the client's error
_NOT_SHOWN = ("metadata", "done", "reward")  # of an observation


def read_schema(url: str, label: str) -> dict[str, Any]:
    """The JSON schema of the server's actions. ValueError, beginning with `label`, for what is no server of OpenEnv."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{label}: an OpenEnv server is named as openenv:http://HOST:PORT, got {url!r}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    try:
        with opener.open(f"{url.rstrip('/')}/schema", timeout=_SECONDS) as answer:
            schema = json.loads(answer.read(1 << 20))["action"]
            _fields(schema)
            return schema
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{label}: the server {url} does not answer ({reason}); start it first") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{label}: {url}/schema must give the schema of actions, as a server of OpenEnv 0.10 does, got something "
            f"else ({type(error).__name__}: {error})"
        ) from error


def import_client(label: str) -> Any:
    """`GenericEnvClient`. ValueError, beginning with `label`, where it is not installed."""
    os.environ["WEBSOCKETS_MAX_REDIRECTS"] = "1"  # the number of tries
    try:
        return import_extra("openenv.core", INSTALL, "an OpenEnv server").GenericEnvClient
    except ModuleNotFoundError as error:
        raise ValueError(f"{label}: {error}") from error


class OpenEnvPlayer:
    """One episode. client: the class of the client. instance: the client, once it is reset."""

    def __init__(self, client: Any, url: str, schema: Mapping[str, Any]):
        self._client, self._url, self._schema = client, url, schema
        self.functions: Mapping[str, Any] = {}
        self.instance: Any = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        """The prompt of the row, and the first observation at its end. The server's `reset` gets seed and columns, as
        far as it takes arguments of their names.
        """
        # A worker limits each call itself.
        client = self._client(base_url=self._url, connect_timeout_s=_SECONDS, message_timeout_s=1e6, mode="simulation")
        self.instance = client
        await client.connect()
        columns = {name: value for name, value in row.items() if name != "prompt"}
        result = await client.reset(**{**columns, "seed": seed})
        return opened(row, observation_text(result.observation))

    async def step(self, message: Message) -> Step:
        """Sends an action. One that is none is answered with what is wrong, and counted."""
        try:
            action = action_of(message["content"], self._schema)
        except ValueError as error:
            return _refused(error)
        try:
            result = await self.instance.step(action)
        except RuntimeError as error:
            if not str(error).endswith(_INVALID):
                raise
            return _refused(ValueError(f"the action must fit the schema {json.dumps(_fields(self._schema))}"))
        said = observation_text(result.observation)
        messages = [{"role": "user", "content": said}] if said else []
        return Step(messages, result.reward, result.done, {"bad_actions": 0})

    async def finish(self) -> tuple[Any, Any]:
        """Nothing: rewards come with steps."""
        return None, {}

    async def close(self, reason: str | None) -> None:
        """Ends the session on the server."""
        if self.instance is not None:
            await self.instance.close()


def action_of(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The action that a turn stands for. ValueError, for the policy, where it is none."""
    required, fields = schema.get("required", []), _fields(schema)
    if len(required) == 1:
        (name,) = required
        kind = fields.get(name)
        return {name: text if kind in ("string", None) else _json(text, f"{name}, a JSON value of type {kind}")}
    action = _json(text, f"a JSON object with {', '.join(required or fields)}")
    if not isinstance(action, dict):
        raise ValueError(f"the turn must be a JSON object with {', '.join(required or fields)}")
    return action


def observation_text(observation: Any) -> str:
    """An observation as the policy reads it."""
    if not isinstance(observation, Mapping):
        raise Rejected("not_a_step", f"the server's observation is {short(observation)}, must be an object")
    fields = {name: value for name, value in observation.items() if name not in _NOT_SHOWN and value is not None}
    if len(fields) == 1 and isinstance(only := next(iter(fields.values())), str):
        return only
    return json.dumps(fields, ensure_ascii=False) if fields else ""


def opened(row: Mapping[str, Any], said: str) -> str | list[Message]:
    """The prompt of a row, with what an environment says first at the end of its last message."""
    prompt = row.get("prompt", [{"role": "user", "content": ""}])
    if isinstance(prompt, str):
        return "\n\n".join(filter(None, (prompt, said)))
    *before, last = prompt
    return [*before, {**last, "content": "\n\n".join(filter(None, (last.get("content"), said)))}]


def _refused(error: ValueError) -> Step:
    return Step([{"role": "user", "content": f"error: {error}"}], metrics={"bad_actions": 1})


def _fields(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The type of each field, without those that every action has."""
    fields = schema.get("properties", {}).items()
    return {name: about.get("type") for name, about in fields if name != "metadata"}


def _json(text: str, what: str) -> Any:
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.strip("`").removeprefix("json")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the turn must be {what} ({str(error) or 'too deep'})") from error


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """No other place is asked."""
