"""A task of verifiers 0.4 as a reward function: `class MyTask(vf.Task[MyData])` with `@vf.reward` and `@vf.metric`.

In: the class, and for each call a row and a completion. Out: the weighted sum of the task's rewards, with each of them
and the metrics. The row becomes the task's data, and prompt and completion its trace, whose one sampled node is the
completion. `Task.score` of verifiers does the rest, without a runtime: methods that require one are left out, as there.

verifiers is imported where a class of it is given, and then it is there.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

from rewards.text import completion_text

_BASE = "verifiers.v1.task"  # the module of verifiers' own Task


def is_task(function: Any) -> TypeGuard[type]:
    """Whether this is a class of verifiers' tasks."""
    return isinstance(function, type) and any((c.__module__, c.__name__) == (_BASE, "Task") for c in function.__mro__)


class TaskReward:
    """The reward function of a task.

    task: the class. columns: of the data set; those that are fields of the task's data go there. settings: fields of
      the task's config.

    Raises ValueError, which begins with `label`, where no column gives a field that the data requires, or every reward
    requires a runtime.
    """

    def __init__(self, task: type, columns: Collection[str], settings: Mapping[str, Any], label: str):
        from verifiers.v1.utils.decorators import discover_decorated  # pyright: ignore[reportMissingImports]

        made: Any = task
        self.__name__, self._task = task.__name__, made
        fields = made.data_type().model_fields
        self._columns = [name for name in fields if name in columns and name != "prompt"]
        required = [name for name, field in fields.items() if field.is_required() and name != "prompt"]
        missing = [name for name in required if name not in columns]
        if missing:
            raise ValueError(
                f"{label}: the data of {task.__name__} requires {missing[0]!r}, and no column of the data set has that "
                f"name (there are {', '.join(columns) or 'none'}); hand one over by it: data.columns.{missing[0]}=..."
            )
        rewards = discover_decorated(object.__new__(task), "reward")
        if not [method for method in rewards if not _requires_runtime(method)]:
            raise ValueError(
                f"{label}: {task.__name__} must have a @vf.reward method that does without `runtime`, as there is none "
                f"here, got {', '.join(method.__name__ for method in rewards) or 'no reward'}; give it a default"
            )
        self._config = made.config_type()(**settings)

    async def __call__(
        self,
        prompt: Any,
        completion: Any,
        completion_ids: Sequence[int] | None = None,
        finish_reason: str = "eos",
        **row: Any,
    ) -> dict[str, Any]:
        """The sum of the task's rewards as `score`, each of them and each metric by its name."""
        data = self._task.data_type()(prompt=prompt, **{name: row[name] for name in self._columns})
        task = self._task(data, self._config)
        trace = _trace(task, completion_text(completion), completion_ids, finish_reason)
        await task.score(trace, runtime=None)
        rewards = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        return metrics | rewards | {"score": trace.reward if rewards else None}


def _requires_runtime(method: Any) -> bool:
    parameter = inspect.signature(method).parameters.get("runtime")
    return parameter is not None and parameter.default is parameter.empty


def _trace(task: Any, text: str, completion_ids: Sequence[int] | None, finish_reason: str) -> Any:
    """The trace of one turn. The number of prompt tokens is not known, and told as 0."""
    from verifiers.v1.configs.agent import AgentConfig  # pyright: ignore[reportMissingImports]
    from verifiers.v1.graph import MessageNode  # pyright: ignore[reportMissingImports]
    from verifiers.v1.state import state_cls  # pyright: ignore[reportMissingImports]
    from verifiers.v1.trace import AgentInfo, ModelCall, Trace, TraceTask  # pyright: ignore[reportMissingImports]
    from verifiers.v1.types import AssistantMessage, Usage, UserMessage  # pyright: ignore[reportMissingImports]

    asked = task.data.prompt
    messages = [UserMessage(content=asked)] if isinstance(asked, str) else list(asked)
    nodes = [
        MessageNode(parent=place - 1 if place else None, message=message) for place, message in enumerate(messages)
    ]
    ids = [] if completion_ids is None else [int(token) for token in completion_ids]
    nodes.append(
        MessageNode(
            parent=len(nodes) - 1 if nodes else None,
            message=AssistantMessage(content=text),
            sampled=True,
            token_ids=ids,
            mask=[True] * len(ids),
        )
    )
    call = ModelCall(
        node=len(nodes) - 1,
        finish_reason="length" if finish_reason == "length" else "stop",
        usage=None if completion_ids is None else Usage(prompt_tokens=0, completion_tokens=len(ids)),
    )
    return Trace(
        task=TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        agent=AgentInfo(config=AgentConfig()),
        state=state_cls(type(task))(),
        nodes=nodes,
        calls=[call],
        is_completed=True,
        ok=True,
    )
