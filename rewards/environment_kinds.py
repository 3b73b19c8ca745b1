"""The forms in which an environment may be written, each turned into the protocol of `rewards.environment`.

In: what `file.py:Class` names. Out: a `Kind`, which makes a `Player` for each episode. The form is told apart by the
methods:

    own     reset(row, seed), step(message), close(), see `rewards.environment`
    trl     TRL 1.16's environment_factory: reset(**row), public methods as tools, maybe get_reward()
    skyrl   SkyRL-Gym 0.4: Env(env_config, extras), init(prompt), step(action), close()
    agent   a function that asks the policy itself (`rewards.agent`)
    openenv, textarena  a server by its URL, and a game by its name (`rewards.openenv_environment`,
            `rewards.textarena_environment`)
    tools   none at all, for `rollout.tools` alone: the episode is over when a turn calls nothing

TRL's instances are pooled and reset again, as TRL does it. Of the others one is made for each episode.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rewards.agent import AgentPlayer, check_agent
from rewards.agent_server import AgentServer
from rewards.calling import call
from rewards.environment import AGENT, OPENENV, TEXTARENA, Message, Step
from rewards.importing import USER_ERRORS, import_function
from rewards.in_worker import Rejected, short
from rewards.openenv_environment import OpenEnvPlayer, import_client, read_schema
from rewards.text import message_text
from rewards.textarena_environment import TextArenaPlayer, import_game
from rewards.tools import Functions, add_tool, is_async

_FORMS = (
    "reset(row, seed), step(message) and close(), or those of TRL's environment_factory (reset(**row)) or of SkyRL-Gym "
    "(init(prompt), step(action))"
)


class Player(Protocol):
    """One episode of an environment. functions: tools that are run for it, beside those of the run. instance: of the
    user's class, once it is reset.
    """

    functions: Functions
    instance: Any

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        """The whole prompt, not yet checked."""
        ...

    async def step(self, message: Message) -> Step:
        """Answers a turn whose calls are not run for it."""
        ...

    async def finish(self) -> tuple[Any, Any]:
        """(The reward of the whole episode or None, metrics), not yet checked."""
        ...

    async def close(self, reason: str | None) -> None:
        """The end. reason: why the episode ends; None: it failed."""
        ...


class Kind:
    """What an environment's name stands for. form: see the module. has_own_tools: whether `step` answers calls itself;
    then `schema_sources` are its tools, functions or schemas, else the functions that are run for it.
    """

    def __init__(
        self,
        form: str,
        is_async: bool,
        make_player: Callable[[], Player],
        schema_sources: Sequence[Any] = (),
        *,
        has_own_tools: bool = False,
    ):
        self.form, self.is_async, self.make_player = form, is_async, make_player
        self.schema_sources, self.has_own_tools = schema_sources, has_own_tools


async def load_kind(reference: str, label: str, server: AgentServer, *, is_one_of_several: bool) -> Kind:
    """The environment that `file.py:Class` names. server: for agents, started where there is one. is_one_of_several:
    whether the row's column `environment` chooses it.

    Raises ValueError, which begins with `label`, for what does not import or has none of the forms.
    """
    if reference.startswith(AGENT):
        label = "rollout.agent"
        run = import_function(reference.removeprefix(AGENT), label)
        check_agent(run, label)
        try:
            await server.start()
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from error
        return Kind("agent", True, lambda: AgentPlayer(run, server))
    if reference.startswith(OPENENV):
        url = reference.removeprefix(OPENENV)
        client, schema = import_client(label), read_schema(url, label)
        return Kind("openenv", True, lambda: OpenEnvPlayer(client, url, schema))
    if reference.startswith(TEXTARENA):
        make = import_game(reference.removeprefix(TEXTARENA), label)
        return Kind("textarena", False, lambda: TextArenaPlayer(make))
    target = import_function(reference, label)
    if isinstance(target, type):
        if _has(target, "init", "step"):
            asynchronous = _some_async(target, ("init", "step", "close", "get_metrics"))
            return Kind("skyrl", asynchronous, lambda: _SkyRL(target))
        if _is_own(target):
            _check_arguments(target, f"{label}: {reference!r}")
            return _own(target, target)
    try:
        instance = await call(target)
    except USER_ERRORS as error:
        raise ValueError(
            f"{label}: {reference!r} cannot be made without arguments: {type(error).__name__}: {error}; an environment "
            f"must have {_FORMS}"
        ) from error
    made = type(instance)
    if _is_own(made):
        await call(instance.close)
        return _own(target, made)
    if _has(made, "reset", "step") and _takes_row_and_seed(made):
        raise ValueError(
            f"{label}: {reference!r} must have close() beside reset(row, seed) and step(message), got none; add "
            "`def close(self): pass`"
        )
    if not _has(made, "reset"):
        raise ValueError(f"{label}: {reference!r} gives {short(instance)}, an environment must have {_FORMS}")
    pool = [instance]
    methods = [getattr(instance, name) for name in _tool_names(made)]
    asynchronous = any(is_async(method) for method in methods) or _some_async(made, ("reset", "get_reward"))
    return Kind("trl", asynchronous, lambda: _Trl(target, pool, is_one_of_several), methods)


def tools_alone() -> Kind:
    """The environment of a run that has tools and no other one."""
    return Kind("tools", False, _ToolsAlone)


def _own(make: Callable[[], Any], made: type) -> Kind:
    tools = getattr(made, "tools", ())
    tools = tools if isinstance(tools, (list, tuple)) else ()
    asynchronous = _some_async(made, ("reset", "step", "close"))
    return Kind("own", asynchronous, lambda: _Own(make), tools, has_own_tools=bool(tools))


class _Own:
    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self.functions: Functions = {}
        self.instance: Any = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        self.instance = await call(self._make)
        return await call(self.instance.reset, row, seed)

    async def step(self, message: Message) -> Step:
        step = await call(self.instance.step, message)
        if not isinstance(step, Step):
            raise Rejected("not_a_step", f"step returned {short(step)}, must return a rewards.environment.Step")
        return step

    async def finish(self) -> tuple[Any, Any]:
        return None, {}

    async def close(self, reason: str | None) -> None:
        if self.instance is not None:
            close = self.instance.close
            await call(close, *([reason or "failure"] if inspect.signature(close).parameters else []))


class _ToolsAlone:
    def __init__(self) -> None:
        self.functions: Functions = {}
        self.instance = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        return _prompt_of(row)

    async def step(self, message: Message) -> Step:
        return Step(done=True)

    async def finish(self) -> tuple[Any, Any]:
        return None, {}

    async def close(self, reason: str | None) -> None:
        pass


class _Trl:
    """As `GRPOTrainer` of TRL 1.16 plays it: `_generate_and_score_completions` and `_tool_call_loop`."""

    def __init__(self, make: Callable[[], Any], pool: list[Any], is_one_of_several: bool):
        self._make, self._pool, self._is_one_of_several = make, pool, is_one_of_several
        self.instance: Any = None
        self.functions: Functions = {}

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        self.instance = self._pool.pop() if self._pool else await call(self._make)
        functions: dict[str, Callable[..., Any]] = {}
        for name in _tool_names(type(self.instance)):
            add_tool(functions, name, getattr(self.instance, name), "the environment")
        self.functions = functions
        # With several environments the column that chooses one is no argument, as in TRL.
        arguments = {
            name: value for name, value in row.items() if not (self._is_one_of_several and name == "environment")
        }
        said = await call(self.instance.reset, **arguments)
        prompt = _prompt_of(row)
        if said is None:
            return prompt
        if not isinstance(said, str):
            said = _text_of_parts(said)
        if isinstance(prompt, str):
            return prompt + said
        last = prompt[-1]
        content = last.get("content") or ""
        whole = content + said if isinstance(content, str) else [*content, {"type": "text", "text": said}]
        return [*prompt[:-1], {**last, "content": whole}]

    async def step(self, message: Message) -> Step:
        return Step(done=True)

    async def finish(self) -> tuple[Any, Any]:
        get_reward = getattr(self.instance, "get_reward", None)
        return None if get_reward is None else await call(get_reward), {}

    async def close(self, reason: str | None) -> None:
        if reason is not None and self.instance is not None:
            self._pool.append(self.instance)


class _SkyRL:
    """As `SkyRLGymGenerator` of SkyRL 0.4 plays it."""

    def __init__(self, make: Callable[..., Any]):
        self._make = make
        self.functions: Functions = {}
        self.instance: Any = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        prompt = _prompt_of(row)
        if isinstance(prompt, str):
            raise Rejected("not_a_step", "an environment of SkyRL-Gym plays chats, and the prompt is a text")
        extras = {name: value for name, value in row.items() if name != "prompt"}
        self.instance = await call(self._make, env_config={}, extras=extras)
        found = await call(self.instance.init, [dict(message) for message in prompt])
        if not isinstance(found, tuple) or len(found) != 2:
            raise Rejected("not_a_step", f"init returned {short(found)}, must return the prompt and a dict")
        return found[0]

    async def step(self, message: Message) -> Step:
        action = message["content"]
        found = await call(self.instance.step, action)
        if not isinstance(found, Mapping) or not {"observations", "reward", "done"} <= {*found}:
            rule = "must return a dict with observations, reward and done"
            raise Rejected("not_a_step", f"step returned {short(found)}, {rule}")
        if found.get("postprocessed_action") not in (None, action):
            raise Rejected(
                "not_a_step", "step returned a postprocessed_action, which would rewrite what the policy drew; drop it"
            )
        return Step(found["observations"], found["reward"], found["done"])

    async def finish(self) -> tuple[Any, Any]:
        get_metrics = getattr(self.instance, "get_metrics", None)
        found = {} if get_metrics is None else await call(get_metrics)
        if not isinstance(found, Mapping):
            raise Rejected("not_a_step", f"get_metrics returned {short(found)}, must return a dict")
        return None, {name: value for name, value in found.items() if isinstance(value, (bool, int, float))}

    async def close(self, reason: str | None) -> None:
        if self.instance is not None and hasattr(self.instance, "close"):
            await call(self.instance.close)


def _text_of_parts(said: Any) -> str:
    """The text of a list of content parts, which TRL takes as well; images have none."""
    is_text = isinstance(said, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in said)
    if not is_text:
        raise Rejected("not_a_step", f"reset returned {short(said)}, must return None, a text or parts of text")
    return message_text({"content": said})


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """What the data asked; without it an empty question, as in TRL."""
    return row.get("prompt", [{"role": "user", "content": ""}])


def _is_own(made: type) -> bool:
    return _has(made, "reset", "step", "close") and _takes_row_and_seed(made)


def _takes_row_and_seed(made: type) -> bool:
    try:
        names = [*inspect.signature(made.reset).parameters]
    except (TypeError, ValueError):
        return False
    return names[-2:] == ["row", "seed"]


def _has(made: type, *names: str) -> bool:
    return all(callable(getattr(made, name, None)) for name in names)


def _check_arguments(target: type, label: str) -> None:
    """ValueError where a class cannot be made without arguments. It is not made here, because that may take long."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # it tells nothing
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ValueError(
            f"{label} cannot be made without arguments: {error}; give them default values, for an instance is made for "
            "each episode"
        ) from None


def _some_async(made: type, names: Sequence[str]) -> bool:
    return any(is_async(getattr(made, name)) for name in names if hasattr(made, name))


def _tool_names(made: type) -> list[str]:
    """The methods that TRL 1.16 takes for tools. A `close` without arguments is none: it would be a way out of the
    episode that no environment means by it.
    """
    names = []
    for name, method in inspect.getmembers(made, predicate=inspect.isfunction):
        is_closing = name == "close" and len(inspect.signature(method).parameters) <= 1
        if name not in ("reset", "get_reward") and not name.startswith("_") and not is_closing:
            names.append(name)
    return names
