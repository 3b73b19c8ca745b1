"""docs/metrics.md from the table of metrics: `python -m rl.run.metric_page > docs/metrics.md`.

In: `rl.run.metric_table`. Out: the page on standard output.
"""

import sys
import textwrap

from rl.run.metric_table import METRICS, RENAMED, Metric, Subject

_WIDTH = 100  # characters of a line of prose
_HEAD = """\
# Metrics

<!-- Written by `python -m rl.run.metric_page`; the table is rl/run/metric_table.py. -->

{intro}

{subjects}
## Names of older versions

{renamed}

| was | is |
|---|---|
{old}
"""
_INTRO = (
    "A line of `metrics.jsonl` in the run folder holds the metrics of one step, under `step`. `grpo report RUN` draws "
    "them, `rl.load(RUN).metrics` is a table of them. Names are `subject/what`; `<part>` stands for a name of yours, "
    "and what is in brackets may be missing. A value that is not finite, or that nothing gave, is null. A healthy "
    "range is where nothing needs to be done: outside it, look; it is not a limit of the run."
)
_RENAMED = "`read_metrics`, reports and `rl.load` translate them when they read an older run; nothing else knows them."


def page() -> str:
    """The text of docs/metrics.md."""
    return _HEAD.format(
        intro=_wrapped(_INTRO),
        subjects="\n".join(map(_subject, METRICS)),
        renamed=_wrapped(_RENAMED),
        old="\n".join(f"| `{was}` | `{now}` |" for was, now in RENAMED.items()),
    )


def _subject(subject: Subject) -> str:
    lines = [f"## {subject.title}", "", _wrapped(subject.note), ""]
    lines += ["| metric | what it is | unit | healthy | outside it |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_row, subject.metrics), ""])


def _row(metric: Metric) -> str:
    return f"| `{metric.name}` | {metric.meaning} | {metric.unit} | {metric.healthy} | {metric.advice} |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    sys.stdout.write(page())
