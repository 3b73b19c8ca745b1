"""What the settings of the ready-made rewards must be: looked at when a function is loaded, and by each call.

In: the rule of each setting. Out: `Settings`, with a mark for a function, or a ValueError with the name of a setting,
its rule and its value. A rule is a function of the value: None, or what the value must be.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rewards.importing import _Function

Rule = Callable[[Any], str | None]
_MOST = 200  # characters of a value in a message


class Settings:
    """The settings of a reward.

    together: raises ValueError where settings that are right by themselves do not fit; it gets those that are given.
    columns: the settings that a column of the data set may give; others are the recipe's alone.
    rules: of each setting by its name.
    """

    def __init__(
        self,
        together: Callable[[Mapping[str, Any]], None] = lambda values: None,
        columns: Collection[str] = (),
        /,
        **rules: Rule,
    ):
        self._rules, self._together, self._columns = rules, together, columns

    def mark(self, function: _Function) -> _Function:
        """Mark a function that has these settings, as a decorator.

        The start is refused where they are wrong, and also where the function raises for one of the first rows with an
        empty completion. So it must raise for nothing but settings and rows that are wrong.
        """
        function.check_kwargs = self.check_kwargs  # pyright: ignore[reportFunctionMemberAccess]
        function.tries_rows = True  # pyright: ignore[reportFunctionMemberAccess]
        function.settings_of_recipe = {*self._rules} - {*self._columns}  # pyright: ignore[reportFunctionMemberAccess]
        return function

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raises ValueError for a name that is no setting, and as `check`."""
        check_names(kwargs, self._rules)
        self.check(**kwargs)

    def check(self, **values: Any) -> None:
        """Raises ValueError for a value that breaks its rule."""
        for name, value in values.items():
            if (rule := self._rules[name](value)) is not None:
                raise ValueError(f"{name} must be {rule}, got {shown(value)}")
        self._together(values)


def check_names(kwargs: Mapping[str, Any], names: Collection[str]) -> None:
    """Raises ValueError for kwargs that are no settings."""
    for name in kwargs:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its settings are {', '.join(names) or 'none'}"
            raise ValueError(f"kwargs holds {name!r}, which is no setting of this reward; {hint}")


def shown(value: Any) -> str:
    """The `repr` of a value, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}..."


def one_of(*choices: str) -> Rule:
    rule = " or ".join(f'"{choice}"' for choice in choices)
    return lambda value: None if isinstance(value, str) and value in choices else rule


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def whole_number(least: int | None = None) -> Rule:
    rule = "a whole number" if least is None else f"a whole number >= {least}"
    return lambda value: None if type(value) is int and (least is None or value >= least) else rule


def number(rule: str, holds: Callable[[float], bool]) -> Rule:
    """A finite number. rule: in words, behind "a number"."""

    def check(value: Any) -> str | None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return None if is_number and holds(value) else f"a number {rule}"

    return check


def words(example: str, holds: Callable[[str], bool] = lambda word: bool(word.strip()), least: int = 0) -> Rule:
    """A list of different words. example: of the list."""

    def check(value: Any) -> str | None:
        is_list = isinstance(value, (list, tuple)) and all(isinstance(word, str) and holds(word) for word in value)
        return (
            None if is_list and len({*value}) == len(value) >= least else f"a list of different words such as {example}"
        )

    return check


def pattern(value: Any) -> str | None:
    """A regular expression."""
    rule = 'a regular expression of Python\'s re such as "answer: (.*)"'
    if not isinstance(value, str):
        return rule
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{rule} ({error})"
    return None
