"""Lines of metrics.jsonl without what depends on the machine: all that is equal in two runs that are the same."""

from collections.abc import Mapping
from typing import Any

from rl.run.metric_table import entry_of

_BEGINNINGS = ("seconds/", "tokens_per_second/", "compiles", "peak_memory_gb", "journal/")
_ENDS = ("/seconds_mean", "/seconds_max")  # of reward functions


def steady(line: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a line that must not vary. Each of the line has an entry in the table of metrics."""
    assert not without_entry(line)
    names = [name for name in line if not name.startswith(_BEGINNINGS) and not name.endswith(_ENDS)]
    return {name: line[name] for name in names}


def without_entry(line: Mapping[str, Any]) -> list[str]:
    """Names in a line that `rl.run.metric_table`, and so docs/metrics.md, does not explain."""
    return [name for name in line if name != "step" and entry_of(name) is None]
