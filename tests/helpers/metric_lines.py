"""Lines of metrics.jsonl without what depends on the machine: all that is equal in two runs that are the same."""

from collections.abc import Mapping
from typing import Any

_BEGINNINGS = ("seconds/", "tokens_per_second/", "compiles", "peak_memory_gb", "journal/")
_ENDS = ("/seconds_mean", "/seconds_max")  # of reward functions


def steady(line: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a line that must not vary."""
    names = [name for name in line if not name.startswith(_BEGINNINGS) and not name.endswith(_ENDS)]
    return {name: line[name] for name in names}
