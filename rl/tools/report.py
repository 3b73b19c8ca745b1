"""`grpo report RUN [RUN ...] [--output PNG]`: the curves of one or more runs as a picture, and their summary as a
table.

In: the metrics.jsonl of each run folder, finished or not. Out: a PNG (or PDF, SVG), its path and a small table on
standard output. A report loads no model and needs no jax.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from rl.files.local_files import UNFINISHED
from rl.files.stores import check_path, written_file
from rl.run.console import format_count, format_seconds
from rl.run.metrics import read_metrics
from rl.run_folder.contents import CURVES_MARK, is_own_curves
from rl.run_folder.remote_steps import local_metrics

# Metric, title, companion metric drawn dashed, fixed vertical range. The first row of panels, then the second.
_MAIN_PANELS = (
    ("reward/mean", "reward (mean per step)", None, None),
    ("loss", "loss", None, None),
    ("eval/accuracy", "held-out accuracy (greedy)", None, (-0.03, 1.03)),
)
_DETAIL_PANELS = (
    ("kl", "KL to the reference (nats per token)", None, None),
    ("completion_length/mean", "completion length (tokens)", "completion_length/max", None),
    ("entropy", "entropy (nats per token)", None, None),
)
# Okabe and Ito's palette, which colour-blind readers can tell apart: https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FORMATS = (".png", ".pdf", ".svg")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's metrics: the name it has in the report, and the lines of its metrics.jsonl in order."""

    name: str
    rows: list[dict[str, Any]]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of `metric`, without the lines that lack it or hold null."""
        points = [(row["step"], float(row[metric])) for row in self.rows if row.get(metric) is not None]
        return [step for step, _ in points], [value for _, value in points]


def main(argv: Sequence[str]) -> int:
    """Writes the picture and prints the table.

    Raises:
      ValueError: a folder holds no metrics, the output's ending is not supported, or another file is in its place.
    """
    parser = argparse.ArgumentParser(prog="grpo report", description="Plot a run's curves and print its summary.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--output", metavar="PNG", help="picture to write; default: reward.png in the first run folder")
    arguments = parser.parse_args(argv)
    runs = read_runs(arguments.runs)
    output = arguments.output or f"{arguments.runs[0].rstrip('/')}/reward.png"
    check_path(output, "--output", may_be_remote=True)
    with written_file(output) as path:
        _check_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as scratch:
            draft = pathlib.Path(scratch) / path.name
            write_plot(runs, draft)
            os.replace(draft, path)
    print(format_table(runs))
    print(f"\ncurves: {output}")
    return 0


def _check_place(path: pathlib.Path) -> None:
    """ValueError where a file that this command did not draw is in the way. A stranger's run folder may hold a link
    there.
    """
    if os.path.lexists(path) and not is_own_curves(path):
        raise ValueError(
            f"the picture must be a new file, or one that grpo report drew, got {str(path)!r}, which is "
            f"{'a link' if path.is_symlink() else 'something else'}; move it away, or name another one by --output"
        )


def read_runs(folders: Sequence[str | os.PathLike]) -> list[Run]:
    """Reads run folders; each run is named by its folder, or by its whole path where two folders have one name.

    Raises:
      ValueError: a folder has no metrics.jsonl, or one without a single complete line.
    """
    paths = [pathlib.Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    runs = []
    for folder, path, name in zip(folders, paths, names, strict=True):
        rows = read_metrics(local_metrics(folder))
        if not rows:
            raise ValueError(f"{path} must hold at least one step, got an empty metrics.jsonl; run a step first")
        runs.append(Run(name if names.count(name) == 1 else str(path), rows))
    return runs


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


def write_plot(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Draws the panels that at least one run has data for, and writes them to `path`, with the mark of
    `rl.run_folder.contents` in it.

    Raises:
      ValueError: the path's ending is not .png, .pdf or .svg, or no run has anything to draw.
    """
    # Imported here: matplotlib takes most of a second. Figure without pyplot keeps no global state and needs no
    # display.
    import matplotlib.figure

    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"--output must end in one of {', '.join(_FORMATS)}, got {str(path)!r}")
    rows = [[panel for panel in panels if _has_data(runs, panel[0])] for panels in (_MAIN_PANELS, _DETAIL_PANELS)]
    rows = [row for row in rows if row]
    if not rows:
        known = [panel[0] for panel in (*_MAIN_PANELS, *_DETAIL_PANELS)]
        raise ValueError(f"a run must have one of {known} to be drawn, got {sorted(runs[0].rows[-1])}")
    figure = matplotlib.figure.Figure(figsize=(11, 3.6 * len(rows)), dpi=150, layout="constrained")
    for subfigure, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        for axes, panel in zip(subfigure.subplots(1, len(row), squeeze=False)[0], row, strict=True):
            _draw_panel(axes, runs, *panel)
    if len(runs) == 1:
        figure.suptitle(runs[0].name, fontsize=12, fontweight="bold")
    else:
        lines = {
            line.get_label(): line for axes in reversed(figure.axes) for line in axes.get_legend_handles_labels()[0]
        }
        names = [run.name for run in runs if run.name in lines]
        figure.legend([lines[name] for name in names], names, loc="outside upper center", ncols=4, frameon=False)
    mark = "Software" if path.suffix.lower() == ".png" else "Creator"
    figure.savefig(path, metadata={mark: CURVES_MARK})


def _draw_panel(
    axes: Any, runs: Sequence[Run], metric: str, title: str, companion: str | None, limits: tuple[float, float] | None
) -> None:
    import matplotlib.ticker

    for index, run in enumerate(runs):
        color = _COLORS[index % len(_COLORS)]
        steps, values = run.series(metric)
        if metric.startswith("eval/"):
            axes.plot(steps, values, color=color, marker="o", markersize=4.5, linewidth=1.4, label=run.name)
            if len(runs) == 1:
                _annotate_ends(axes, steps, values, color)
            continue
        window = smoothing_window(len(values))
        if window > 1:
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth(values, window), color=color, linewidth=1.8, label=run.name)
        if companion is not None:
            steps, values = run.series(companion)
            axes.plot(steps, smooth(values, window), color=color, alpha=0.7, linewidth=1.0, linestyle="--")
    note = "" if companion is None else ", dashed: max"
    axes.set_title(title + note, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=7, integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if limits is not None:
        axes.set_ylim(*limits)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1.0))


def _annotate_ends(axes: Any, steps: Sequence[int], values: Sequence[float], color: str) -> None:
    """Writes the first and the last value under their points, or above them near the bottom."""
    for index in sorted({0, len(values) - 1}):
        offset = 8 if values[index] < 0.08 else -14
        axes.annotate(
            f"{values[index]:.1%}",
            (steps[index], values[index]),
            xytext=(0, offset),
            textcoords="offset points",
            ha="left" if index == 0 else "right",
            fontsize=9,
            color=color,
        )


def _has_data(runs: Sequence[Run], metric: str) -> bool:
    return any(run.series(metric)[1] for run in runs)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
