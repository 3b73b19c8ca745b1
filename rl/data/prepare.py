"""Rows through a user's function: `data.prepare: path/to/file.py:function`.

In: the rows of a source under the data set's own column names. Out: what the function makes of each, and the row that
it was made of. The function is called with one row, a dict, and returns a row, a list of rows, or None for a row that
is left out. It must give the same for the same row. It runs in the run's own process, like a user's sampler; of several
processes each prepares one block of the rows.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from rewards.importing import USER_ERRORS, import_function
from rl.data.table_files import MOST_NESTED, depth_of
from rl.data.tasks import Row
from rl.files.json_file import shown


def prepare_rows(
    rows: Sequence[Row],
    function: str,
    where: Callable[[int], str],
    key: str = "data.prepare",
    may_be_empty: bool = False,
) -> tuple[list[Row], list[int]]:
    """The rows that a function makes, and for each the number of the row that it was made of.

    Args:
      function: `path/to/file.py:function`. where: a row's number -> file and row in words. key: names the function.
      may_be_empty: whether it may leave no row.

    Raises:
      ValueError: the file does not import, the function fails returns something else, or leaves no row.
    """
    from rl.devices import hosts

    def prepare_block() -> list[tuple[int, Row]]:
        made = import_function(function, key)
        start, end = hosts.block(len(rows))
        return [
            (index, row)
            for index in range(start, end)
            for row in _call(made, rows[index], f"{key} {function}", where(index))
        ]

    own = hosts.together(prepare_block)
    if hosts.num_processes() > 1:
        parts = hosts.gather_bytes(json.dumps(own).encode())
        own = [(index, row) for part in parts for index, row in json.loads(part)]
    if not own and not may_be_empty:
        raise ValueError(f"{key} {function} must leave a row, got none of {len(rows)}")
    return [row for _, row in own], [index for index, _ in own]


def _call(function: Callable[..., Any], row: Row, name: str, where: str) -> list[Row]:
    try:
        made = function(dict(row))
    except USER_ERRORS as error:
        raise ValueError(
            f"{name} failed on {where}: {type(error).__name__}: {error}; the row is {shown(row)}"
        ) from error
    rows = [] if made is None else made if isinstance(made, list) else [made]
    for one in rows:
        if not isinstance(one, dict) or not all(isinstance(column, str) for column in one):
            raise ValueError(
                f"{name} must return a dict of columns, a list of them or None, got {shown(one)} for {where}"
            )
    try:
        same = json.loads(json.dumps(rows))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} must return values of JSON, which reward functions get, got {shown(rows)} for {where}: {error}"
        ) from error
    if (depth := depth_of(same) - 1) > MOST_NESTED:
        raise ValueError(
            f"{name} must return rows at most {MOST_NESTED} lists and objects deep, got {depth} for {where}"
        )
    return same
