"""What a reward function logs beside its rewards: metrics, and values that are kept with a sample.

In, in a worker: calls of `log_metric` and `log_extra`, and the keys of a result that is a dict. Out: JSON values within
bounds. The runner reads them again with `read_logged` and `read_sums`, and trusts none of them.

`log_metric` and `log_extra` do what `GRPOTrainer._log_metric` and `_log_completion_extra` of TRL 1.16 do with what a
function logs in one call.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite  # by name, before a user's code can replace it
from typing import Any

MAX_NAMES = 100  # metrics of one function in a batch, and values of one function with a sample
MAX_NAME = 100  # characters
MAX_LOGGED = 1 << 14  # bytes of JSON, of the values of one function with a sample
_MOST_SENT = MAX_NAMES + 1  # so that the runner sees that there were more
MAX_INT = 1 << 63
_MAX_NUMBER, _MAX_COUNT = 1e280, 1 << 31  # so that sums stay finite
_MAX_SUM = 1e290
_MAX_DEPTH = 6
_CUT_NOTE = 64  # bytes
_dumps = json.JSONEncoder().encode  # bound before a user's code can replace it

Sums = dict[str, list[float]]  # {metric: [sum, number of values]}


class CallLog:
    """What one call of a function logs, for a call with `size` completions."""

    def __init__(self, size: int):
        self.size = size
        self.sums: Sums = {}
        self._columns: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: Any) -> None:
        """Counts a number in the mean of a metric. NaN, the infinities and what is near them are left out.

        Raises TypeError for a name that is no text, and a value that is no number.
        """
        number = number_of(value)
        if not isinstance(name, str) or number is None:
            raise TypeError(f"log_metric takes a name and a number, got {shortened(name)} and {shortened(value)}")
        if abs(number) <= _MAX_NUMBER:
            add_sums(self.sums, {_name(name): (number, 1)}, _MOST_SENT)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Keeps one value with each completion of the call, in order. Several calls for one column add up.

        Raises TypeError for a column that is no text.
        """
        if not isinstance(column, str):
            raise TypeError(f"log_extra takes a column's name and a list of values, got {shortened(column)}")
        self._columns.setdefault(_name(column), []).extend(values)

    def keep(self, values: Mapping[Any, Any]) -> None:
        """Keeps the values of one completion, and counts those that are numbers as metrics."""
        for name, value in values.items():
            self.log_extra(str(name), [value])
            if number_of(value) is not None:
                self.log_metric(str(name), value)

    def problem(self) -> str | None:
        """What is wrong with what was logged, at the end of the call; None: nothing."""
        for column, values in self._columns.items():
            if len(values) != self.size:
                return f"log_extra({column!r}) got {len(values)} values for {self.size} completions"
        return None

    def of_sample(self, index: int) -> dict[str, Any]:
        """The values that are kept with a completion, in their JSON form and cut to `MAX_LOGGED`."""
        kept: dict[str, Any] = {}
        left = MAX_LOGGED - _CUT_NOTE  # for what is said last
        for name, values in self._columns.items():
            left -= len(_dumps(name)) + len(": , ")
            if left < _CUT_NOTE or len(kept) == MAX_NAMES:
                kept["..."] = f"{len(self._columns) - len(kept)} more were left out"
                break
            kept[name] = _cut(_plain(values[index]), left)
            left -= len(_dumps(kept[name]))
        return kept


def number_of(value: Any) -> float | None:
    """The number that a value is; None for what is no number, such as text and lists."""
    dtype = getattr(value, "dtype", None)
    is_other = getattr(dtype, "kind", "") in (*"SUOMm",) or "complex" in str(dtype)
    # A numpy array of one element has __float__ too, and is a wrong shape all the same.
    if getattr(value, "ndim", 0) != 0 or not hasattr(value, "__float__") or isinstance(value, (str, bytes, complex)):
        return None
    try:
        return None if is_other else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def read_logged(value: Any) -> dict[str, Any] | None:
    """The values that a worker sent for a sample, by name; None where they are not what `CallLog.of_sample` gives."""
    if not isinstance(value, dict) or len(value) > _MOST_SENT or not all(_is_name(name) for name in value):
        return None
    if not value:  # as of most samples
        return value
    return value if is_plain(value, _MAX_DEPTH + 2) and len(_dumps(value)) <= MAX_LOGGED else None


def read_sums(value: Any) -> Sums | None:
    """The metrics that a worker sent for a call; None where they are not what `CallLog.sums` holds."""
    if not isinstance(value, dict) or len(value) > _MOST_SENT or not all(_is_name(name) for name in value):
        return None
    for pair in value.values():
        if not isinstance(pair, list) or [type(number) for number in pair] != [float, int]:
            return None
        if not abs(pair[0]) <= _MAX_SUM or not 1 <= pair[1] <= _MAX_COUNT:
            return None
    return value


def add_sums(sums: Sums, others: Mapping[str, Sequence[float]], most: int = MAX_NAMES) -> bool:
    """Adds other metrics to `sums`, which holds at most `most`. Whether all found room."""
    for name, (total, count) in others.items():
        if name in sums or len(sums) < most:
            known = sums.get(name, [0.0, 0])
            sums[name] = [known[0] + total, known[1] + count]
    return all(name in sums for name in others)


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each metric."""
    return {name: total / count for name, (total, count) in sums.items()}


def _name(text: str) -> str:
    """A name as it is kept: on one line, and not too long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:MAX_NAME])
    return shown[:MAX_NAME] or "_"


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()


def _plain(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """The JSON form of any value; what has none is kept as text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < MAX_INT else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    if isinstance(value, str):
        return _valid(_beginning(value, MAX_LOGGED))
    if depth and isinstance(value, Mapping):
        return {_name(str(key)): _plain(item, depth - 1) for key, item in list(value.items())[:MAX_LOGGED]}
    if depth and isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value[:MAX_LOGGED]]  # more would be cut in any case
    if depth and hasattr(value, "tolist"):  # arrays and scalars of numpy and torch
        return _plain(value.tolist(), depth - 1)
    return _valid(_beginning(str(value), MAX_LOGGED))


def _valid(text: str) -> str:
    """A text without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _cut(value: Any, limit: int) -> Any:
    """The value itself, or the beginning of its text where its JSON is longer than `limit` bytes."""
    text = _dumps(value)
    if len(text) <= limit:
        return value
    whole = value if isinstance(value, str) else text
    kept = limit - _CUT_NOTE
    while kept and len(_dumps(whole[:kept])) > limit - _CUT_NOTE:
        kept = kept * 3 // 4
    return _beginning(whole, kept)


def _beginning(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}... ({len(text) - length} more characters were cut)"


def is_plain(value: Any, depth: int, is_text: Callable[[str], bool] = lambda text: True) -> bool:
    """Whether a value read from JSON has the size that is allowed: finite numbers, nested at most `depth` deep.

    is_text: whether a text, or a key, is allowed.
    """
    if isinstance(value, str):
        return is_text(value)
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) < MAX_INT
    if isinstance(value, float):
        return isfinite(value)
    if depth and isinstance(value, dict):
        return all(is_text(key) and is_plain(item, depth - 1, is_text) for key, item in value.items())
    return bool(depth) and isinstance(value, list) and all(is_plain(item, depth - 1, is_text) for item in value)


def shortened(value: Any) -> str:
    """The `repr` of a value, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
