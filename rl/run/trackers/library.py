"""The libraries of trackers, each of which an extra of pyproject.toml installs."""

import importlib
from types import ModuleType


def import_library(module: str, extra: str) -> ModuleType:
    """A module of a tracker's library. ValueError, with the extra that installs it, where it does not import."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"logging.trackers {extra} needs the library {module.partition('.')[0]}, which is not installed or does "
            f"not import ({error}); pip install 'tandem-grpo[{extra}]', or leave {extra} out"
        ) from error
