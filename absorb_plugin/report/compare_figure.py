"""The figure of `absorb compare`: sparsity, perplexity and accuracies of runs."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from absorb_plugin.evaluation.compare import Run, task_names

__all__ = ["draw_runs"]

BAR, LINE = "#1f5fbf", "#8a8f98"
TASK_COLOURS = ("#1f5fbf", "#c2570c", "#0f7b6c", "#8a3ffc", "#b5179e", "#6b6f76")
MARKERS = "osD^vP"
# Beyond this ratio bars of perplexity only show the largest.
LOGARITHMIC = 20


def draw_runs(runs: Sequence[Run]) -> bytes:
    """
    :return: a PNG with a panel for each of sparsity, perplexity and accuracy that any
        run has
    """
    panels = []
    if any(run.sparsity is not None for run in runs):
        panels.append(_draw_sparsity)
    if any(run.perplexity is not None for run in runs):
        panels.append(_draw_perplexity)
    if task_names(runs):
        panels.append(_draw_accuracy)
    if not panels:
        raise ValueError("no run has anything to draw")
    rows = max(2.0, 0.45 * len(runs) + 1.2)
    figure = Figure(figsize=(1.5 + 3.6 * len(panels), rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for ax, panel in zip(axes, panels, strict=True):
        panel(ax, runs)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(runs)), [run.name for run in runs])
    axes[0].set_ylim(len(runs) - 0.5, -0.5)  # the first run on top
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _bars(
    ax: Axes, values: Sequence[float | None], digits: str, dots: bool = False
) -> None:
    """Bars with their values after them; dots where a bar would have no foot."""
    known = [(row, value) for row, value in enumerate(values) if value is not None]
    rows, widths = [row for row, _ in known], [value for _, value in known]
    if dots:
        ax.plot(widths, rows, "o", color=BAR)
    else:
        ax.barh(rows, widths, color=BAR, height=0.6)
    for row, value in known:
        ax.annotate(
            format(value, digits),
            (value, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    ax.margins(x=0.25)


def _draw_sparsity(ax: Axes, runs: Sequence[Run]) -> None:
    _bars(ax, [run.sparsity for run in runs], ".3f")
    ax.set(title="realised sparsity", xlim=(0, 1))


def _draw_perplexity(ax: Axes, runs: Sequence[Run]) -> None:
    values = [run.perplexity for run in runs]
    known = [value for value in values if value is not None]
    logarithmic = max(known) > LOGARITHMIC * min(known)
    _bars(ax, values, ".2f", dots=logarithmic)
    ax.set(
        title="perplexity (lower is better)",
        xscale="log" if logarithmic else "linear",
    )


def _draw_accuracy(ax: Axes, runs: Sequence[Run]) -> None:
    names = task_names(runs)
    for number, name in enumerate(names):
        offset = 0.5 * ((number + 0.5) / len(names) - 0.5)
        found = [(row, r.tasks[name]) for row, r in enumerate(runs) if name in r.tasks]
        ax.errorbar(
            [task["acc"] for _, task in found],
            [row + offset for row, _ in found],
            xerr=[task.get("stderr") or 0.0 for _, task in found],
            fmt=MARKERS[number % len(MARKERS)],
            color=TASK_COLOURS[number % len(TASK_COLOURS)],
            markersize=5,
            label=name,
        )
    ax.set(title="accuracy ± standard error")
    ax.grid(axis="x", color=LINE, alpha=0.3, linewidth=0.5)
    ax.margins(x=0.15)
    ax.legend(frameon=False, fontsize=8, loc="best")
