"""Charts as a PNG, by matplotlib. Nothing else imports it."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from absorb_plugin.report.charts import (
    BarChart,
    Chart,
    HeatMap,
    Line,
    LineChart,
    four_digits,
)
from absorb_plugin.report.write import write_or_warn

__all__ = ["draw", "save_figure"]

# Blue and orange are told apart by almost everybody.
BELOW, ABOVE, ABSENT = "#1f5fbf", "#d9730d", "#e3e6ea"
SHADE = "#8a8f98"
STYLES: dict[str, dict[str, Any]] = {
    "final": {"color": "#1f5fbf", "linewidth": 1.5},
    "depth": {"color": "#1f5fbf", "linewidth": 1.0},
    "base": {"color": "#8a6d1d", "linewidth": 1.5, "linestyle": "--"},
    "realised": {"color": "#0b7a6b", "linestyle": "", "markerfacecolor": "none"},
    "rule": {"color": SHADE, "linewidth": 1.0, "linestyle": ":"},
}
WIDE, NARROW = 9.0, 4.4  # inches
COLUMN_NAMES = 12
LEGEND = (0.0, -0.24)  # in sizes of the axes


def save_figure(
    path: Path, charts: Sequence[Chart], title: str, columns: int = 1
) -> None:
    """Draw and write; what goes wrong is a warning, since numbers matter more."""
    write_or_warn(path, lambda: draw(charts, title, columns))


def draw(charts: Sequence[Chart], title: str, columns: int = 1) -> bytes:
    """
    :param columns: charts side by side
    :return: a PNG
    """
    columns = min(columns, len(charts))
    rows = [charts[i : i + columns] for i in range(0, len(charts), columns)]
    heights = [max(map(_height, row)) for row in rows]
    figure = Figure(
        figsize=(WIDE if columns == 1 else NARROW * columns, sum(heights)),
        layout="constrained",
    )
    axes = figure.subplots(
        len(rows), columns, squeeze=False, height_ratios=heights
    ).flatten()
    for ax, chart in zip(axes, charts):
        _chart(ax, chart, columns > 1)
    for ax in axes[len(charts) :]:
        ax.remove()
    figure.suptitle(title, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _height(chart: Chart) -> float:
    if isinstance(chart, BarChart):
        return 1.2 + 0.4 * len(chart.names)
    if isinstance(chart, HeatMap):
        return 1.4 + 0.26 * len(chart.rows)
    return 3.2


def _chart(ax: Axes, chart: Chart, narrow: bool) -> None:
    if isinstance(chart, LineChart):
        _lines(ax, chart, narrow)
    elif isinstance(chart, BarChart):
        _bars(ax, chart)
    else:
        _heat_map(ax, chart)
    size = "medium" if narrow else "large"
    ax.set_title(chart.title, parse_math=False, fontsize=size)
    ax.set_xlabel(chart.x_label, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)


def _lines(ax: Axes, chart: LineChart, narrow: bool) -> None:
    for line in chart.lines:
        _line(ax, line)
    if chart.band is not None:
        band = chart.band
        ax.axvspan(
            band.low, band.high, color=SHADE, alpha=0.2, linewidth=0, label=band.name
        )
    ax.set(xscale=_scale(chart.log_x), yscale=_scale(chart.log_y))
    if chart.y_limits is not None:
        ax.set_ylim(*chart.y_limits)
    if chart.log_y:
        _numbers_between_decades(ax.yaxis)
    ax.set_ylabel(chart.y_label, parse_math=False)
    ax.margins(x=0.02)
    if chart.counts:
        # of a single block there is one whole number to name
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if ax.get_legend_handles_labels()[1]:
        # below the axes, where it hides no line
        box = ax.legend(
            loc="upper left",
            bbox_to_anchor=LEGEND,
            ncols=2 if narrow else 4,  # wider than its axes it would press them
            edgecolor="none",
            fontsize="small",
        )
        _plain(box.get_texts())


def _scale(log: bool) -> str:
    return "log" if log else "linear"


def _numbers_between_decades(axis: Axis) -> None:
    """A short logarithmic axis may hold one power of ten or none."""
    low, high = axis.get_view_interval()
    if high < 100 * low:
        digits = (1, 2, 5) if high > 10 * low else range(1, 10)
        several = LogLocator(subs=digits) if high > 3 * low else MaxNLocator(5)
        axis.set_major_locator(several)
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _line(ax: Axes, line: Line) -> None:
    style = STYLES[line.style] | {"alpha": line.opacity}
    y = _numbers(line.y)
    ax.errorbar(
        line.x,
        y,
        np.nan_to_num(_numbers(line.errors)) if line.errors else None,
        marker="o" if line.dots else "",
        markersize=4,
        label=line.name or "_",  # matplotlib lists no name that begins so
        **style,
    )
    if line.ring is not None:
        _ring(ax, line.x[line.ring], y[line.ring], style["color"])


def _ring(ax: Axes, x: float, y: float, colour: str) -> None:
    ax.plot(x, y, "o", markersize=10, markerfacecolor="none", color=colour)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def _bars(ax: Axes, chart: BarChart) -> None:
    values, rows = _numbers(chart.values), np.arange(len(chart.names))
    errors = np.nan_to_num(_numbers(chart.errors)) if chart.errors else None
    if chart.points:
        style = STYLES["final"] | {"linestyle": ""}
        ax.errorbar(values, rows, xerr=errors, marker="o", **style)
    else:
        ax.barh(rows, values, xerr=errors, color=BELOW, height=0.6)
    if chart.ring is not None:
        _ring(ax, values[chart.ring], chart.ring, BELOW)
    ends = values if errors is None else values + errors
    for row in np.flatnonzero(np.isfinite(values)):
        _value(ax, values[row], ends[row], int(row))
    ax.set(xscale=_scale(chart.log), ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(rows, chart.names, parse_math=False)
    ax.margins(x=0.25)


def _value(ax: Axes, value: float, end: float, row: int) -> None:
    """The number after the end of its bar."""
    ax.annotate(
        four_digits(value),
        (end, row),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
    )


def _heat_map(ax: Axes, chart: HeatMap) -> None:
    reach = chart.reach or 1.0
    colours = LinearSegmentedColormap.from_list("", [BELOW, "white", ABOVE])
    image = ax.imshow(
        [
            _numbers([None if c is None else c.value for c in row])
            for row in chart.cells
        ],
        aspect="auto",
        cmap=colours.with_extremes(bad=ABSENT),
        norm=Normalize(chart.middle - reach, chart.middle + reach),
    )
    ax.set_yticks(range(len(chart.rows)), chart.rows, parse_math=False)
    step = -(-len(chart.columns) // COLUMN_NAMES)
    shown = range(0, len(chart.columns), step)
    ax.set_xticks(shown, [chart.columns[i] for i in shown], parse_math=False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01)
    bar.ax.set_ylim(*chart.ends)
    bar.ax.set_title(f"{chart.middle_name} white", fontsize="small", parse_math=False)


def _plain(texts: Sequence[Text]) -> None:
    """A `$` in a name is a dollar."""
    for text in texts:
        text.set_parse_math(False)
