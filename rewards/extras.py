"""Libraries that only some ready-made rewards need, most of which an extra of pyproject.toml installs.

In: the name of a module, and what pip installs it with. Out: the module, or an error that says how to install it. The
module of a reward does not import such a library. It is imported when the reward is loaded into a worker, or else by
the first call.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from rewards.importing import _Function


def needs_library(module: str, install: str) -> Callable[[_Function], _Function]:
    """Mark a reward that needs a module, as a decorator. install: what pip installs it with, "tandem-grpo[EXTRA]"."""

    def mark(function: _Function) -> _Function:
        function.needs_library = (module, install)  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def import_library(function: Callable[..., Any], label: str) -> None:
    """Import what a function is marked to need. Raises ValueError, beginning with `label`, where it is missing."""
    if library := getattr(function, "needs_library", None):
        module, install = library
        try:
            import_extra(module, install, "it")
        except ModuleNotFoundError as error:
            raise ValueError(f"{label}: {error}") from error


def import_extra(module: str, install: str, reward: str) -> ModuleType:
    """The module. install: what pip installs it with. reward: the name of the reward that needs it, for messages.

    Raises ModuleNotFoundError, with the command that installs it, where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{reward} needs the library {module}, which is not installed ({error}); pip install '{install}'"
        ) from error
