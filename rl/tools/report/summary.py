"""The summary of a run: a few numbers, for the console and the top of the page.

In: runs. Out: {label: text}, and a table of several runs side by side.
"""

import math
from collections.abc import Sequence

from rl.run.console import format_count, format_seconds
from rl.tools.report.read import Run


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average with the centre of mass of a `window`-wide mean, weights normalised from the start.

    y_t = sum_k (1 - a)^k x_(t-k) / sum_k (1 - a)^k with a = 2 / (window + 1); so y_0 = x_0, and a constant stays
    itself.
    """
    decay = 1.0 - 2.0 / (window + 1.0)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total = decay * total + value
        weight = decay * weight + 1.0
        result.append(total / weight)
    return result


def smoothing_window(num_values: int) -> int:
    """A twentieth of the run: wide enough to see a trend through the noise of single steps."""
    return max(1, num_values // 20)


def summarize(run: Run) -> dict[str, str]:
    """The run in a few lines, {label: text}, without entries that it did not measure.

    "first" and "last" of the reward are means over a twentieth of the run at either end. "best" is the maximum of the
    smoothed curve. Times leave out the start-up, and the work of a killed process after its last checkpoint.
    """
    summary = {"steps": str(run.rows[-1]["step"])}
    for metric, label in (("reward/mean", "reward"), ("loss", "loss")):
        steps, values = run.series(metric)
        if not values:
            continue
        window = smoothing_window(len(values))
        summary[f"{label}, first"] = f"{_mean(values[:window]):.3f}"
        summary[f"{label}, last"] = f"{_mean(values[-window:]):.3f}"
        if label == "reward":
            step, best = max(zip(steps, smooth(values, window), strict=True), key=lambda point: point[1])
            summary["reward, best"] = f"{best:.3f} (step {step})"
    steps, accuracies = run.series("eval/accuracy")
    if accuracies:
        summary["held-out accuracy, before"] = f"{accuracies[0]:.1%} (step {steps[0]})"
        summary["held-out accuracy, after"] = f"{accuracies[-1]:.1%} (step {steps[-1]})"
    for metric, label, spec in (("kl", "KL, last", ".4f"), ("completion_length/mean", "length, last", ".1f")):
        _, values = run.series(metric)
        if values:
            summary[label] = format(values[-1], spec)
    _, seconds = run.series("seconds/step")
    if seconds:
        summary["time in steps"] = format_seconds(sum(seconds))
    for phase in ("rollout", "train"):
        speed = _mean_speed(run, phase)
        if speed is not None:
            summary[f"tokens/s, {phase}"] = format_count(speed)
    _, memory = run.series("peak_memory_gb")
    if memory:
        summary["peak memory"] = f"{max(memory):.2f} GB"
    return summary


def format_table(runs: Sequence[Run]) -> str:
    """The summaries side by side: a column for each run, a line for each entry, "-" where a run lacks it."""
    summaries = [summarize(run) for run in runs]
    labels = list(dict.fromkeys(label for summary in summaries for label in summary))
    columns = [["", *labels]]
    columns += [
        [run.name, *(summary.get(label, "-") for label in labels)] for run, summary in zip(runs, summaries, strict=True)
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _mean_speed(run: Run, phase: str) -> float | None:
    """Tokens per second over the whole run: the mean of the steps' speeds, weighted by their time."""
    points = [
        (row[f"tokens_per_second/{phase}"], row[f"seconds/{phase}"])
        for row in run.rows
        if row.get(f"tokens_per_second/{phase}") is not None and row.get(f"seconds/{phase}")
    ]
    if not points:
        return None
    return math.fsum(speed * seconds for speed, seconds in points) / math.fsum(seconds for _, seconds in points)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
