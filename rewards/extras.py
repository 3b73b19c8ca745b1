"""Libraries that only some ready-made rewards need, which extras of pyproject.toml install.

In: the name of a module and of the extra. Out: the module, or an error that says how to install it. A reward's own
module does not import such a library: it is imported when the reward is loaded into a worker, whose start has no time
limit per sample, or else by the first call.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from rewards.importing import _Function


def needs_library(module: str, extra: str) -> Callable[[_Function], _Function]:
    """Mark a reward that needs the module `module`, which the extra `extra` installs, as a decorator."""

    def mark(function: _Function) -> _Function:
        function.needs_library = (module, extra)  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def import_library(function: Callable[..., Any], label: str) -> None:
    """Import what a function is marked to need. Raises ValueError, beginning with `label`, where it is missing."""
    if library := getattr(function, "needs_library", None):
        module, extra = library
        try:
            import_extra(module, extra, "it")
        except ModuleNotFoundError as error:
            raise ValueError(f"{label}: {error}") from error


def import_extra(module: str, extra: str, reward: str) -> ModuleType:
    """The module, which the extra `extra` installs. reward: the name of the reward that needs it, for messages.

    Raises ModuleNotFoundError, with the command that installs it, where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{reward} needs the library {module}, which is not installed ({error}); pip install 'tandem-grpo[{extra}]'"
        ) from error
