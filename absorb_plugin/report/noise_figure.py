"""The charts of `absorb noise`: drift over depth for every η, ratio over η."""

from collections.abc import Mapping, Sequence
from typing import Any

from absorb_plugin.report.charts import Band, Chart, Line, LineChart, rule
from absorb_plugin.report.profile_charts import drift_chart
from absorb_plugin.signals.noise import FLOOR_MARGIN

__all__ = ["noise_charts"]

Scan = Mapping[str, Any]


def noise_charts(scan: Scan) -> list[Chart]:
    """:param scan: what `absorb noise --json` prints"""
    floor, limits = scan["floor"], _drift_limits(scan)
    drifts: list[Chart] = [
        drift_chart(
            f"drift R at η = {entry['eta']:g}", entry["drift"], floor, y_limits=limits
        )
        for entry in scan["eta"]
    ]
    return [*drifts, _ratio(scan), _realignment(scan)]


def _drift_limits(scan: Scan) -> tuple[float, float]:
    """The same for every η, so that panels can be compared."""
    drifts = [x for entry in scan["eta"] for row in entry["drift"] for x in row if x]
    small = [x for x in [*drifts, *scan["floor"]] if x > 0]
    least = min([*small, *(entry["eta"] for entry in scan["eta"])])
    return least / 2, 2 * max(drifts, default=1.0)


def _ratio(scan: Scan) -> LineChart:
    x = [entry["eta"] for entry in scan["eta"]]
    last = len(scan["blocks"]) - 1
    lines = [
        Line(
            {0: "after the first block", last: "after the last"}.get(row, ""),
            "depth",
            x,
            [entry["ratio"][row] for entry in scan["eta"]],
            opacity=0.25 + 0.75 * row / max(1, last),
        )
        for row in range(last + 1)
    ]
    return LineChart(
        "ratio r: above 1 amplified, below absorbed",
        "η",
        "ratio r",
        [rule("", x, 1.0), *lines],
        log_x=True,
        log_y=True,
        band=_below_floor(scan),
    )


def _below_floor(scan: Scan) -> Band | None:
    left = scan["eta"][0]["eta"] / 2
    right = FLOOR_MARGIN * scan["floor"][-1]
    if right <= left:
        return None
    return Band(f"below {FLOOR_MARGIN:g} times the floor", left, right)


def _realignment(scan: Scan) -> LineChart:
    """Mean over injections of the cosine at the end, and of that at the injection."""
    x = [entry["eta"] for entry in scan["eta"]]
    known = [
        [[value for value in row if value is not None] for row in entry["realignment"]]
        for entry in scan["eta"]
    ]
    first = [_mean([row[0] for row in rows]) for rows in known]
    final = [_mean([row[-1] for row in rows]) for rows in known]
    return LineChart(
        "realignment: mean cosine to the clean run",
        "η",
        "cosine",
        [Line("at injection", "base", x, first), Line("at the end", "final", x, final)],
        log_x=True,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
