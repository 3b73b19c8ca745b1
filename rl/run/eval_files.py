"""The samples of a run's evaluations: `evaluations/STEP.jsonl` in the run folder, a line for each sample.

In: records, as they are judged. Out: one file for each evaluation, which appears when it is whole. Only the newest
`eval.keep_samples` stay.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rl.files.local_files import UNFINISHED
from rl.files.output_file import writing
from rl.run_folder.contents import EVALUATIONS, evaluation_files

Write = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def evaluation_file(folder: pathlib.Path | None, step: int, keep: int) -> Iterator[Write]:
    """A context in which the samples of the evaluation after `step` steps are written.

    Args:
      folder: the run folder; None: another process writes, or nothing is kept.
      keep: how many files stay, this one included; 0: none, and nothing is written.

    Raises:
      ValueError: the disk is full.
    """
    if folder is None or not keep:
        yield lambda record: None
        return
    place = folder / EVALUATIONS
    path = place / f"{step}.jsonl"
    draft = place / f"{UNFINISHED}{path.name}"
    with writing(path):
        place.mkdir(exist_ok=True)
        try:
            with draft.open("w", encoding="utf-8") as stream:
                yield lambda record: _write(stream, {"step": step, **record})
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    for old in evaluation_files(folder)[:-keep]:
        old.unlink(missing_ok=True)


def record_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON; what JSON does not have is written as text."""
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def _write(stream: Any, record: Mapping[str, Any]) -> None:
    stream.write(record_line(record))
