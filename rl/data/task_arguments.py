"""Checks of the arguments that questions made by a program take: `data.args`."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def check_arguments(of: str, function: Callable[..., Any], args: Mapping[str, Any], more: Iterable[str] = ()) -> None:
    """ValueError for a name that the function does not take, or one that it needs and does not get.

    Args:
      of: what the message calls the arguments, such as `data.args of arithmetic`.
      more: names that are taken beside those of the function.
    """
    parameters = inspect.signature(function).parameters
    known = sorted({*parameters, *more})
    for name in args:
        if name not in known:
            raise ValueError(f"{of} must be among {known}, got {name!r}{nearest(name, known)}")
    missing = [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty and name not in args
    ]
    if missing:
        raise ValueError(f"{of} must hold {missing}, got {sorted(args)}; for example data.args.{missing[0]}=...")


def check_count(key: str, value: Any, minimum: int) -> None:
    """ValueError for what is no whole number, or a smaller one than `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{key} must be a whole number >= {minimum}, got {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known one, if there is one."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
