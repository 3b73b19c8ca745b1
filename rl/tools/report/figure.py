"""The curves of runs as a picture: PNG, PDF or SVG.

In: runs. Out: a file. matplotlib is imported when a picture is drawn.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from rl.run_folder.contents import CURVES_MARK
from rl.tools.report.read import Run
from rl.tools.report.summary import smooth, smoothing_window

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
FORMATS = (".png", ".pdf", ".svg")


def write_plot(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Draws the panels that at least one run has data for, and writes them to `path`, with the mark of
    `rl.run_folder.contents` in it.

    Raises:
      ValueError: the path's ending is not .png, .pdf or .svg, or no run has anything to draw.
    """
    # Imported here: matplotlib takes most of a second. Figure without pyplot keeps no global state and needs no
    # display.
    import matplotlib.figure

    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--output must end in one of {', '.join(FORMATS)}, got {str(path)!r}")
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
