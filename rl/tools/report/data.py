"""What the page of a report knows of each run, as one JSON object that is small.

In: runs. Out: lists and mappings of plain values, in which numbers are rounded to `DIGITS` digits and values of tokens
stay in the codes of `rl.files.token_values`. What may be secret is masked. `page.js` reads it; its comments say what it
makes of each field.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rl.config.load import load_config
from rl.config.sections import flatten, to_dict
from rl.files.token_values import decode
from rl.run.metric_table import entry_of
from rl.tools.report.masking import Mask
from rl.tools.report.read import Run
from rl.tools.report.summary import summarize

DIGITS = 6
MOST_HISTOGRAMS = 500  # of a name; a drawing has fewer columns
_ABOUT = ("meaning", "healthy", "advice")  # of an entry of `rl.run.metric_table`
# Of a record in samples.jsonl: what the page shows as it is, and its types. What it shows of tokens is in `_tokens`.
_NUMBER = (int, float)
_SHOWN: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "prompt_index", "sample_index"), (int,)),
    "prompt": (str, list),
    "answer": (object,),
    **dict.fromkeys(("rewards", "logged"), (dict,)),
    **dict.fromkeys(("reward", "advantage"), _NUMBER),
    **dict.fromkeys(("finish_reason", "ended"), (str,)),
    **dict.fromkeys(("messages", "unread", "turn_rewards", "turn_advantages", "turn_sequences", "failure"), (list,)),
}
_OF_MESSAGES = ("prompt", "messages", "unread")


def page_data(runs: Sequence[Run], most_samples: int) -> dict[str, Any]:
    """The data of the page.

    Args:
      most_samples: of each run. Of more, whole steps are left out, evenly over the run, and the page says so.
    """
    names = sorted({name for run in runs for row in run.rows for name in row})
    entries = {name: entry for name in names if (entry := entry_of(name)) is not None}
    about = {name: {key: getattr(entry, key) for key in _ABOUT} for name, entry in entries.items()}
    return {"about": about, "runs": [_run_data(run, most_samples) for run in runs]}


def _run_data(run: Run, most_samples: int) -> dict[str, Any]:
    mask = Mask(_names_of(run.config.get("rewards.env")))
    names = list(dict.fromkeys(name for row in run.rows for name in row if name != "step"))
    kept = _kept_steps(run.samples, most_samples)
    samples = [sample for sample in run.samples if sample["step"] in kept]
    tokens = _Vocabulary()
    defaults = flatten(to_dict(load_config(None)))
    return {
        "name": run.name,
        "summary": summarize(run),
        "total": run.config.get(f"{run.kind}.steps"),
        "steps": [row["step"] for row in run.rows],
        "metrics": {name: [_short(row.get(name)) for row in run.rows] for name in names},
        "histograms": _histograms(run.events),
        "warnings": [[event["step"], mask.text(str(event["warning"]))] for event in run.events if "warning" in event],
        "starts": [[event["step"], mask.value(_rounded(event["start"]))] for event in run.events if "start" in event],
        "config": mask.value({key: _writable(value) for key, value in run.config.items()}),
        # What differs from configs/base.yml, with the default.
        "changed": mask.value(
            {key: _writable(defaults.get(key)) for key, value in run.config.items() if value != defaults.get(key)}
        ),
        "samples": [_sample(sample, tokens, mask) for sample in samples],
        "samples_of": len(run.samples),
        "vocabulary": tokens.pairs,
    }


def _names_of(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _histograms(events: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """{name: [[step, pairs], ...]}, of at most `MOST_HISTOGRAMS` steps: every n-th from the last one back."""
    found: dict[str, list[Any]] = {}
    for event in events:
        drawn = event.get("histograms", {})
        if not isinstance(drawn, dict):
            raise ValueError(
                f"events.jsonl, step {event['step']}: histograms must be a mapping, got {str(drawn)[:80]}; remove the "
                "line to go on"
            )
        for name, pairs in drawn.items():
            if not (isinstance(pairs, list) and pairs and all(map(_is_pair, pairs))):
                raise ValueError(
                    f"events.jsonl, step {event['step']}: the histogram of {name!r} must be pairs of a value and a "
                    f"count, got {str(pairs)[:80]}; remove the line to go on"
                )
            found.setdefault(name, []).append([event["step"], [[_short(value), count] for value, count in pairs]])
    return {name: own[::-1][:: math.ceil(len(own) / MOST_HISTOGRAMS)][::-1] for name, own in found.items()}


def _is_pair(pair: Any) -> bool:
    """Whether it is a value and a finite count."""
    is_right = isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, _NUMBER) for number in pair)
    return is_right and math.isfinite(pair[1])


def _kept_steps(samples: Sequence[Mapping[str, Any]], most: int) -> set[int]:
    """The steps whose samples are shown: all, or every n-th and the last."""
    steps = sorted({sample["step"] for sample in samples})
    counts = dict.fromkeys(steps, 0)
    for sample in samples:
        counts[sample["step"]] += 1
    stride = 1
    while steps:
        kept = steps[::-1][::stride]
        if sum(counts[step] for step in kept) <= most or len(kept) == 1:
            return set(kept) if most else set()
        stride += 1
    return set()


class _Vocabulary:
    """Numbers the different tokens of a run, so that a sample is a list of small numbers.

    Attributes:
      pairs: [id, text] by number. The id is null where the token is masked.
    """

    def __init__(self) -> None:
        self.pairs: list[list[Any]] = []
        self._numbers: dict[tuple[int | None, str], int] = {}

    def number(self, token: int | None, text: str) -> int:
        key = (token, text)
        if key not in self._numbers:
            self._numbers[key] = len(self.pairs)
            self.pairs.append([token, text])
        return self._numbers[key]


def _sample(record: Mapping[str, Any], tokens: _Vocabulary, mask: Mask) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, types in _SHOWN.items():
        if (value := record.get(name)) is not None:
            _check(isinstance(value, types), record, f"{name} must not be {type(value).__name__}")
            if name in _OF_MESSAGES and isinstance(value, list):
                _check(all(isinstance(one, dict) for one in value), record, f"{name} must be messages")
            shown[name] = mask.value(_rounded(value))
    for name, kept in shown.get("logged", {}).items():
        _check(isinstance(kept, dict), record, f"logged.{name} must be a mapping")
    if "token_texts" not in record:  # of an older version
        shown["completion"] = mask.text(str(record.get("completion", "")))
    shown |= _tokens(record, tokens, mask)
    if further := record.get("further"):
        _check(
            isinstance(further, list) and all(isinstance(own, dict) for own in further), record, "further is no list"
        )
        shown["further"] = [
            {"prompt": mask.value(own.get("prompt", "")), **_tokens(own, tokens, mask)} for own in further
        ]
    return shown


def _tokens(record: Mapping[str, Any], tokens: _Vocabulary, mask: Mask) -> dict[str, Any]:
    """tokens: their numbers in the vocabulary. trained: 0 and 1 as text, left out where all are 1. values: codes.
    ValueError, naming the step, where these do not belong together.
    """
    ids, texts, trained = record.get("token_ids", []), record.get("token_texts"), record.get("trained")
    values = record.get("per_token", {})
    _check(
        isinstance(ids, list) and all(type(token) is int for token in ids), record, "token_ids must be whole numbers"
    )
    trained = [1] * len(ids) if trained is None else trained
    _check(isinstance(trained, list) and len(trained) == len(ids), record, "trained must be a number for each token")
    _check(all(type(one) is int and one in (0, 1) for one in trained), record, "trained must be 0 or 1")
    found: dict[str, Any] = {"length": sum(trained)}
    if texts is None:
        return found
    _check(isinstance(texts, list) and len(texts) == len(ids), record, "token_texts must be a text for each token")
    _check(all(isinstance(text, str) for text in texts), record, "token_texts must be texts")
    _check(isinstance(values, Mapping), record, "per_token must be a mapping")
    found["tokens"] = [
        tokens.number(token, text) if shown == text else tokens.number(None, shown or "")
        for token, text, shown in zip(ids, texts, mask.hidden(texts), strict=True)
    ]
    for name, entry in values.items():
        try:
            num_values = len(decode(entry))
        except ValueError as error:
            _check(False, record, f"per_token.{name}: {error}")
        else:
            _check(num_values == len(ids), record, f"per_token.{name} must be a number for each token")
    if 0 in trained:
        found["trained"] = "".join(map(str, trained))
    return found | ({"values": dict(values)} if values else {})


def _check(is_right: bool, record: Mapping[str, Any], rule: str) -> None:
    if not is_right:
        place = ", ".join(f"{key} {record[key]}" for key in ("step", "prompt_index", "sample_index") if key in record)
        raise ValueError(f"samples.jsonl, {place or 'a further sequence'}: {rule}; remove the line to go on")


def _writable(value: Any) -> Any:
    """A value of a configuration, with text in place of a number that JSON lacks."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return _short(value)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def _short(value: Any) -> Any:
    """A float with `DIGITS` digits, None for one that JSON lacks; anything else as it is."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
