"""Compares two models question by question: `grpo eval A --against B`.

In: two files of samples that `grpo eval --output` wrote, with the same questions in the same order. Out: for each set,
reward function and measure both numbers, their difference with a 95 % interval (a bootstrap of questions, each with
both models' samples), for greedy answers and majorities the exact p-value of McNemar's test, and the questions on which
the models differ. The files are read side by side, so that their size does not matter.
"""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from rewards.contract import EXTRACTED
from rl.errors import missing
from rl.files.json_file import shown
from rl.files.output_file import writing
from rl.files.stores import written_file
from rl.rollout.eval_scores import is_binary, measure_names, question_values
from rl.rollout.eval_sets import shown_measure
from rl.rollout.eval_statistics import mcnemar, mean_interval
from rl.run.eval_files import record_line

HELD_OUT = "held-out rows"  # of records without a set
_SHOWN = 5  # questions, in either direction
_SHOWN_CHARACTERS = 60


class Question(NamedTuple):
    """The samples of one question in a file. `line`: of the first of them, from 1."""

    of_set: str
    index: int
    records: list[dict[str, Any]]
    line: int


class SetKind(NamedTuple):
    """How the samples of a set were drawn and are counted.

    Attributes:
      num_samples: of each question. ks: for pass@k and maj@k.
      temperatures: of A and of B; None where a file of an older version does not say.
    """

    num_samples: int
    ks: list[int]
    temperatures: tuple[float | None, ...]

    def __str__(self) -> str:
        of_a, of_b = (
            f"{self.num_samples} sample{'s' * (self.num_samples > 1)} each"
            if temperature is None
            else "greedy"
            if temperature == 0
            else f"temperature {temperature:g}"
            for temperature in self.temperatures
        )
        how = of_a if of_a == of_b else f"A {of_a}, B {of_b}"
        return how if self.num_samples == 1 or None in self.temperatures else f"{self.num_samples} samples each, {how}"


class Flips:
    """Questions on which one model is right and the other is wrong: written to a file, counted, a few remembered."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._found: dict[tuple[str, str, bool], tuple[int, list[str]]] = {}

    def add(self, function: str, measure: str, a: Question, b: Question, is_better: bool) -> None:
        """Takes a question. is_better: whether A is the one that is right."""
        first, key = a.records[0], (a.of_set, function, is_better)
        count, briefs = self._found.get(key, (0, []))
        self._found[key] = count + 1, briefs if len(briefs) == _SHOWN else [*briefs, _brief(a)]
        if self._stream is not None:
            record = {"set": a.of_set, "function": function, "measure": shown_measure(measure)}
            record |= {"right": "a" if is_better else "b", "prompt_index": a.index, "prompt": first["prompt"]}
            record |= {"answer": first["answer"]} if "answer" in first else {}
            record |= {"a": [one["completion"] for one in a.records], "b": [one["completion"] for one in b.records]}
            self._stream.write(record_line(record))

    def lines(self, of_set: str, function: str) -> list[str]:
        """The flips of one function on one set in words: the first few, and how many more there are."""
        lines = []
        for is_better, mark in ((True, "+"), (False, "-")):
            count, briefs = self._found.get((of_set, function, is_better), (0, []))
            lines += [f"    {mark} {brief}" for brief in briefs]
            if count > len(briefs):
                lines.append(f"    {mark} and {count - len(briefs)} more")
        return lines

    def __bool__(self) -> bool:
        return bool(self._found)


def is_samples_file(path: str | os.PathLike) -> bool:
    """Whether a side of a comparison is a file of samples, by its name."""
    return str(path).endswith(".jsonl")


def check_files(paths: Sequence[str | os.PathLike]) -> None:
    """ValueError where one of these files is none, or does not begin with a sample."""
    for path in paths:
        next(questions(pathlib.Path(path)), None)


def questions(path: pathlib.Path) -> Iterator[Question]:
    """The questions of a file of samples, in its order.

    Raises:
      ValueError: the file cannot be read, or a line is no sample of `grpo eval --output`.
    """
    try:
        stream = path.open(encoding="utf-8")
    except FileNotFoundError:
        raise missing("A and B of --against", "models, or .jsonl files that grpo eval --output wrote", path) from None
    except OSError as error:
        raise ValueError(f"{path} must be a file that grpo eval --output wrote, got {error.strerror}") from error
    with stream:
        own: list[dict[str, Any]] = []
        of_set, index, first = "", -1, 1
        for number, line in enumerate(stream, start=1):
            record = _record(path, number, line)
            found: str = record.get("set", HELD_OUT)
            if (found, record["prompt_index"]) != (of_set, index):
                if own:
                    yield Question(of_set, index, own, first)
                own, of_set, index, first = [], found, record["prompt_index"], number
            own.append(record)
        if own:
            yield Question(of_set, index, own, first)


def compare(
    path_a: pathlib.Path,
    path_b: pathlib.Path,
    resamples: int,
    output: str | None = None,
    names: tuple[str, str] | None = None,
) -> list[str]:
    """Compares two files of samples; returns the result in words.

    The k of pass@k and maj@k are those that the records of both files name; without them the number of the samples.

    Args:
      resamples: of a bootstrap interval.
      output: a file for the flips, a JSON line each.
      names: of the two sides in messages; None: the paths.

    Raises:
      ValueError: the files do not hold the same questions in the same order with equally many samples.
    """
    names = names or (str(path_a), str(path_b))
    if output is None:
        return _compare(path_a, path_b, names, resamples, None)
    with writing(output), written_file(output) as path, path.open("w", encoding="utf-8") as stream:
        lines = _compare(path_a, path_b, names, resamples, stream)
    return [*lines, f"all questions on which they differ: {output}"]


def _compare(
    path_a: pathlib.Path, path_b: pathlib.Path, names: tuple[str, str], resamples: int, stream: TextIO | None
) -> list[str]:
    values: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}
    kinds: dict[str, SetKind] = {}
    flips = Flips(stream)
    for a, b in itertools.zip_longest(questions(path_a), questions(path_b)):
        _check_pair(names, a, b)
        kind = kinds.get(a.of_set) or kinds.setdefault(a.of_set, _kind(a, b))
        num, ks = kind.num_samples, kind.ks
        if len(a.records) != num:
            raise ValueError(f"{names[0]} must have {num} samples of each question of {a.of_set}, got {len(a.records)}")
        flipped = _flip_measure(a, num, ks)
        for function in a.records[0]["rewards"].keys() & b.records[0]["rewards"].keys():
            of_a, of_b = (question_values(side.records, function, num, ks) for side in (a, b))
            for name in of_a.keys() & of_b.keys():
                both = values.setdefault((a.of_set, function, name), ([], []))
                both[0].append(of_a[name])
                both[1].append(of_b[name])
            measure = flipped if flipped in of_a and flipped in of_b else None
            if measure is not None and {of_a[measure], of_b[measure]} == {0.0, 1.0}:
                flips.add(function, measure, a, b, is_better=of_a[measure] > of_b[measure])
    return _report(values, kinds, flips, resamples)


def _kind(a: Question, b: Question) -> SetKind:
    """What the first question of a set says of all."""
    num, sides = len(a.records), (a.records[0], b.records[0])
    named = [{k for k in side["ks"] if 1 <= k <= num} for side in sides if "ks" in side]
    ks = sorted(set.intersection(*named)) if named else []
    temperatures = tuple(side.get("temperature", 0.0 if a.of_set == HELD_OUT else None) for side in sides)
    return SetKind(num, ks or [num], temperatures)


def _flip_measure(question: Question, num: int, ks: Sequence[int]) -> str:
    """The measure, 0 or 1 for each question, by which flips are told."""
    if num == 1:
        return "accuracy"
    names = measure_names(num, ks, has_answers=True)
    return f"maj_at_{num}" if f"maj_at_{num}" in names and _has_answers(question) else f"pass_at_{num}"


def _has_answers(question: Question) -> bool:
    return any(EXTRACTED in own for record in question.records for own in (record.get("logged") or {}).values())


def _report(
    values: Mapping[tuple[str, str, str], tuple[list[float], list[float]]],
    kinds: Mapping[str, SetKind],
    flips: Flips,
    resamples: int,
) -> list[str]:
    lines = []
    for of_set, kind in kinds.items():
        num, order = kind.num_samples, measure_names(kind.num_samples, kind.ks, has_answers=True)
        lines.append(f"{of_set}: A against B, {kind}")
        for function in sorted({key[1] for key in values if key[0] == of_set}):
            for name in order:
                if (of_set, function, name) in values:
                    lines.append(f"  {function}: {_line(name, num, *values[of_set, function, name], resamples)}")
            lines += flips.lines(of_set, function)
    if flips:
        lines.append("+ A is right and B is wrong; - the other way round")
    return lines


def _line(name: str, num: int, a: Sequence[float], b: Sequence[float], resamples: int) -> str:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    low, high = mean_interval(differences, resamples)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    interval = f"95% interval {low:+.1%} to {high:+.1%}"
    if math.isclose(low, high, abs_tol=1e-12):
        interval = "no interval: all questions differ by the same"
    text = (
        f"{shown_measure(name)} {mean_a:.1%} against {mean_b:.1%} on {len(a)} prompts, difference "
        f"{mean_a - mean_b:+.1%} ({interval})"
    )
    if not is_binary(name, num):
        return text
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return f"{text}; better on {better}, worse on {worse}, McNemar p = {mcnemar(better, worse):.3g}"


def _brief(question: Question) -> str:
    prompt = question.records[0]["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = " ".join(str(text).split())
    short = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return f"prompt {question.index}: {short}"


def _check_pair(names: tuple[str, str], a: Question | None, b: Question | None) -> None:
    name_a, name_b = names
    if a is None or b is None:
        short, more = (name_a, b) if a is None else (name_b, a)
        assert more is not None
        raise ValueError(f"{name_a} and {name_b} must hold the same questions, and {short} ends before {_name(more)}")
    ends = a.records[0], b.records[0]
    same = (a.of_set, a.index) == (b.of_set, b.index) and all(
        ends[0].get(key) == ends[1].get(key) for key in ("prompt", "answer")
    )
    if not same:
        raise ValueError(
            f"{name_a} and {name_b} must hold the same questions in the same order, got {_name(a)} in line {a.line} "
            f"and {_name(b)} in line {b.line}; evaluate both with one configuration"
        )
    if len(a.records) != len(b.records):
        raise ValueError(
            f"{name_a} and {name_b} must have equally many samples of {_name(a)}, got {len(a.records)} and "
            f"{len(b.records)}"
        )


def _name(question: Question) -> str:
    return f"prompt {question.index} of {question.of_set} ({shown(question.records[0]['prompt'])})"


def _record(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        judged = record["rewards"]
        is_sample = isinstance(record["prompt_index"], int) and isinstance(judged, dict) and "prompt" in record
        is_sample = is_sample and all(value is None or isinstance(value, (int, float)) for value in judged.values())
        is_sample = is_sample and all(isinstance(k, int) for k in record.get("ks", []))
        is_sample = is_sample and isinstance(record.get("temperature", 0.0), (int, float))
    except (ValueError, TypeError, KeyError, RecursionError):
        is_sample = False
    if not is_sample:
        raise ValueError(
            f"{path} line {number} must be a sample that grpo eval --output wrote, with prompt_index, prompt and "
            f"rewards, got {shown(line.strip())}"
        )
    return record
