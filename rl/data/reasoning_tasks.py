"""Questions of reasoning-gym (https://github.com/open-thought/reasoning-gym): its tasks, composites and curricula.

In: the name of a task and `data.args`. Out: rows with distinct prompts, the same on every machine. A curriculum of
reasoning-gym gives the values of a task at each of its levels. Its levels are moved by whoever draws, which a run could
not repeat. Here the questions of all wanted levels are drawn at the start, with their level in a column. Which of them
a run takes, and when, is what `data.curriculum` says, whose numbers are in the checkpoint.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rl.data.task_arguments import check_arguments, check_count, nearest
from rl.files.json_file import shown

COMPOSITE = "composite"
_ENTRY = ("name", "weight", "config", "level")  # of data.args.datasets
_ALL = "*"  # in a mapping of levels: every attribute that has no entry


def reasoning_gym_rows(task: str, args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Distinct questions of a task.

    Args:
      task: the task's name, such as `chain_sum`; or `composite`, several tasks in one.
      args: `size` (questions drawn) and `seed`, plus the task's own configuration; for a composite `datasets`, a list
        of {name, weight, config, level}. `level` takes the values of that level of the task's curriculum: a whole
        number for all attributes, or {attribute: level} with `*` for those that it does not name. A list of numbers
        draws `size` questions of each level.

    Returns:
      Rows with prompt, answer and metadata (JSON-able), in the order drawn, and with their level where `level` is a
      number or a list. Repeated questions are left out, so there can be fewer than `size`.

    Raises:
      ValueError: reasoning-gym is not installed, the task, an argument or a level is unknown, or the task refuses the
        configuration.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"data.source=reasoning_gym:{task} needs the reasoning-gym package, got: {error}; pip install reasoning-gym"
        ) from error

    if task not in DATASETS:
        raise ValueError(
            f"data.source=reasoning_gym:TASK must name a task of reasoning-gym, got {task!r}{nearest(task, DATASETS)}"
        )
    args = dict(args)
    level = args.pop("level", None)
    check_count("data.args.size", args.get("size"), 1)
    check_count("data.args.seed", args.get("seed"), 0)
    if isinstance(level, list):
        if not level:
            raise ValueError("data.args.level must hold a level, got []; leave it out for the task's own values")
        for number in level:
            check_count("data.args.level", number, 0)
    rows: dict[str, dict[str, Any]] = {}
    for current in level if isinstance(level, list) else [level]:
        extra = {"level": current} if isinstance(current, int) else {}
        for entry in _drawn(task, args, current):
            # Some tasks put tuples, sets or their own objects into the metadata, which workers get as JSON.
            metadata = json.loads(json.dumps(entry["metadata"], default=str))
            row = {"prompt": entry["question"], "answer": entry["answer"], "metadata": metadata, **extra}
            rows.setdefault(entry["question"], row)
    return list(rows.values())


def _drawn(task: str, args: Mapping[str, Any], level: Any) -> Any:
    """The data set of reasoning-gym with these arguments."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    check_arguments(f"data.args of reasoning_gym:{task}", DATASETS[task][1], args, ["level"])
    try:
        if task != COMPOSITE:
            return reasoning_gym.create_dataset(task, **_at_level(task, args, level, "data.args"))
        specs = [DatasetSpec(**spec) for spec in _specs(args.get("datasets"), level)]
        return reasoning_gym.create_dataset(task, **{**args, "datasets": specs})
    except (AssertionError, TypeError) as error:  # reasoning-gym checks its configuration with assert
        raise _unsuitable(task, args, level, error) from error
    except ValueError as error:
        if str(error).startswith("data.args"):  # a message of this module
            raise
        raise _unsuitable(task, args, level, error) from error


def _unsuitable(task: str, args: Mapping[str, Any], level: Any, error: Exception) -> ValueError:
    at = "" if level is None else f" at level {shown(level)}"
    return ValueError(
        f"data.args must suit reasoning_gym:{task}, got {shown(dict(args))}{at}: {type(error).__name__}: {error}"
    )


def _specs(entries: Any, level: Any) -> list[dict[str, Any]]:
    """The entries of a composite as reasoning-gym takes them. `level`: of entries without one of their own."""
    from reasoning_gym.factory import DATASETS

    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"data.args.datasets must be a list of {{name, weight, config, level}}, the tasks of a composite, got "
            f"{shown(entries)}; for example [{{name: gcd, weight: 1}}, {{name: lcm, weight: 2}}]"
        )
    specs = []
    for place, entry in enumerate(entries):
        key = f"data.args.datasets.{place}"
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or (unknown := [name for name in entry if name not in _ENTRY]):
            wrong = shown(unknown[0]) if isinstance(entry, dict) else shown(entry)
            raise ValueError(f"{key} must be the name of a task or a mapping with {list(_ENTRY)}, got {wrong}")
        task, config = entry.get("name"), entry.get("config") or {}
        if task not in DATASETS or task == COMPOSITE:
            raise ValueError(f"{key}.name must be a task of reasoning-gym, got {task!r}{nearest(str(task), DATASETS)}")
        weight = entry.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"{key}.weight must be a number > 0, got {shown(weight)}")
        if not isinstance(config, dict):
            raise ValueError(f"{key}.config must be a mapping, got {shown(config)}")
        check_arguments(f"{key}.config", DATASETS[task][1], config)
        config = _at_level(task, config, entry.get("level", level), key)
        specs.append({"name": task, "weight": weight, "config": config})
    return specs


def _at_level(task: str, args: Mapping[str, Any], level: Any, key: str) -> dict[str, Any]:
    """The arguments with the values of a level of the task's curriculum; unchanged without a level."""
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if level is None:
        return dict(args)
    if not has_curriculum(task):
        raise ValueError(f"{key}.level must be left out for reasoning_gym:{task}, which has no curriculum")
    curriculum = create_curriculum(task)
    attributes = curriculum.attributes
    levels = level if isinstance(level, dict) else {_ALL: level}
    for name, number in levels.items():
        if name != _ALL and name not in attributes:
            raise ValueError(
                f"{key}.level must name attributes of reasoning_gym:{task}, {sorted(attributes)}, got {name!r}"
                f"{nearest(name, attributes)}"
            )
        top = max(len(one.levels) for one in attributes.values()) if name == _ALL else len(attributes[name].levels)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < top:
            raise ValueError(
                f"{key}.level must be from 0 to {top - 1} for {'' if name == _ALL else f'{name} of '}"
                f"reasoning_gym:{task}, got {shown(number)}"
            )
    if _ALL in levels:
        curriculum.set_global_level(levels[_ALL])
    for name, number in levels.items():
        if name != _ALL:
            curriculum.set_attr_level(name, number)
    # A level's questions are of that level only, not of those below it, so that they can be told apart.
    values = _values(curriculum.generate_configuration(None, DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND)))
    fields = [
        field
        for one in attributes.values()
        for name in ("field_name", "lower_field_name", "upper_field_name")
        if (field := getattr(one, name, None)) is not None
    ]
    if taken := sorted({*fields} & {*args}):
        raise ValueError(
            f"{key} must leave {taken[0]} to the level, which gives it {shown(values[taken[0]])}, got "
            f"{shown(args[taken[0]])}; leave it out, or level"
        )
    return {**args, **{field: values[field] for field in fields}}


def _values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
