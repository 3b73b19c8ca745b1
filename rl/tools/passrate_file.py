"""Where measured pass rates go: a file that is kept while they are measured, and the data file that is made of it.

In: the rows of a recipe, and pass rates. Out: FILE.part beside FILE, with a line for each measured row, which a stop
leaves for the same command to go on with; at the end FILE, whole or not at all: the rows of the recipe's data under the
names of their source, with two more columns. Not here: drawing and judging (`rl.tools.passrate`).
"""

import contextlib
import io
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from rl.config.sections import DataSection
from rl.data.curriculum import PASS_RATE
from rl.data.prompt_rows import PromptRow
from rl.data.prompts import PromptData, sections_of
from rl.files.json_file import shown
from rl.files.local_files import write_file
from rl.files.output_file import check_writable
from rl.files.stores import check_path
from rl.tools.samples.completion_file import META_SUFFIX, CompletionFile

DRAWS = "pass_rate_draws"  # column: how many judged completions the pass rate is the mean of
SOURCE_FIELD = "{source}"  # in the name of the output: a file for each source of a mixture
_PART = ".part"
_COMMAND = "grpo data passrate"


class Rate(NamedTuple):
    """What is known of a training row: its pass rate, None where no completion could be judged, and the number of
    judged completions.
    """

    rate: float | None
    draws: int


_UNKNOWN = Rate(None, 0)


class PartFile:
    """The rates measured so far, open for appending and owned by this process until `close`.

    Attributes:
      rates: those that an earlier start has left, by the number of the training row.
    """

    def __init__(self, output: str, settings: dict[str, Any], overwrite: bool) -> None:
        """Opens or creates the file beside the output.

        Args:
          settings: everything that decides the rates; JSON-able and flat.
          overwrite: whether rates of other settings are thrown away.

        Raises:
          ValueError: there are rates of other settings, or another process measures.
        """
        self._path = pathlib.Path(output + _PART)
        self._meta = self._path.with_name(self._path.name + META_SUFFIX)
        starts_again = overwrite and not _is_of(self._meta, settings)
        self._file = CompletionFile(self._path, settings, starts_again, _COMMAND, _read)
        self.rates: dict[int, Rate] = self._file.done

    def write(self, rates: Mapping[int, Rate]) -> None:
        """Appends the rates of some rows, and hands them to the operating system."""
        names = ("row", PASS_RATE, DRAWS)
        lines = [json.dumps(dict(zip(names, (row, *rate), strict=True))) + "\n" for row, rate in rates.items()]
        self._file.write("".join(lines))

    def remove(self) -> None:
        """Removes the file, whose content stands in the output."""
        for path in (self._path, self._meta):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _read(line: dict[str, Any]) -> tuple[int, Rate]:
    rate = line[PASS_RATE]
    return int(line["row"]), Rate(None if rate is None else float(rate), int(line[DRAWS]))


def _is_of(meta: pathlib.Path, settings: dict[str, Any]) -> bool:
    """Whether a file with these settings is there."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(meta.read_text(encoding="utf-8")) == json.loads(json.dumps(settings))
    return False


def output_paths(output: str, data: DataSection) -> list[str]:
    """The files to write, one for each source where the name holds `{source}`, else one.

    Raises:
      ValueError: the name has another ending or another field, or `{source}` without a mixture, or with names of
        sources that are no names of files.
    """
    check_path(output, "--output", may_be_remote=False)
    if pathlib.Path(output).suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output must end with .jsonl or .parquet, got {output!r}")
    if unknown := re.search(r"\{\w*\}", output.replace(SOURCE_FIELD, "")):
        raise ValueError(f"--output may hold {SOURCE_FIELD} and no other field, got {unknown[0]} in {output!r}")
    if SOURCE_FIELD not in output:
        return [output]
    names = data.source_names
    if not names:
        raise ValueError(f"--output must be one file for one data.source, got {output!r}; leave {SOURCE_FIELD} out")
    for name in names:
        if os.sep in name or name in ("", ".", ".."):
            raise ValueError(
                f"--output with {SOURCE_FIELD} needs sources whose names can be those of files, got {name!r}; set "
                "`name` on the entry of data.sources"
            )
    return [output.replace(SOURCE_FIELD, name) for name in names]


def check_outputs(paths: Sequence[str], overwrite: bool) -> None:
    """ValueError where a file could not be written later, or exists and may not be overwritten. Writes nothing."""
    for path in paths:
        check_writable(path, "--output")
        if os.path.lexists(path) and not overwrite:
            raise ValueError(
                f"--output must be new, got {path!r}, which exists; choose another one, or pass --overwrite to replace "
                "it"
            )


def encode_outputs(output: str, data: DataSection, rows: PromptData, rates: Mapping[int, Rate]) -> dict[str, bytes]:
    """{file: its content}, the rows in the order of their sources.

    Args:
      rates: by the number of the training row; a row without one has null, as have rows that are held out.

    Raises:
      ValueError: the values of the rows do not fit the format.
    """
    paths = output_paths(output, data)
    parts: dict[str, list[dict[str, Any]]] = {path: [] for path in paths}
    is_split = SOURCE_FIELD in output
    sections = [section for _, section in sections_of(data)]
    known = {id(row): rates.get(number, _UNKNOWN) for number, row in enumerate(rows.train)}
    # Held-out rows of data.source are written as well, so that the same are held out of the file.
    everything = [*rows.train, *(row for row in rows.held_out if row.source >= 0)]
    for row in sorted(everything, key=lambda row: (row.source, row.index)):
        path, section = (paths[row.source], sections[row.source]) if is_split else (paths[0], data)
        parts[path].append(_as_in_source(section, row, known.get(id(row), _UNKNOWN)))
    return {path: _encode(path, part) for path, part in parts.items()}


def write_outputs(contents: Mapping[str, bytes]) -> None:
    """Writes each file whole."""
    for path, content in contents.items():
        write_file(pathlib.Path(path), content)


def _as_in_source(section: DataSection, row: PromptRow, rate: Rate) -> dict[str, Any]:
    """A row as its source has it (as `data.prepare` made it), with its rate."""
    columns = {"prompt": row.asked, **row.columns, PASS_RATE: rate.rate, DRAWS: rate.draws}
    if section.answer_from_messages and "answer" in columns:
        columns["prompt"] = [*row.asked, {"role": "assistant", "content": columns.pop("answer")}]
    return {section.columns.get(name) or name: value for name, value in columns.items()}


def _encode(path: str, rows: list[dict[str, Any]]) -> bytes:
    try:
        if path.endswith(".parquet"):
            return _as_parquet(rows)
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        return "".join(lines).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:  # pyarrow's errors are among them
        other = ".jsonl" if path.endswith(".parquet") else ".parquet"
        raise ValueError(
            f"--output must be of a format that the values of the rows fit, got {path!r}: {shown(str(error))}; name a "
            f"{other} file, or leave the column out with data.prepare"
        ) from error


def _as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = pyarrow.table(
        {
            name: pyarrow.array(values, pyarrow.float64() if name == PASS_RATE else None)
            for name, values in columns.items()
        }
    )
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()
