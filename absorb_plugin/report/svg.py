"""Charts as inline SVG; the page's CSS styles them, so they follow its theme."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape

from absorb_plugin.report.charts import (
    Band,
    BarChart,
    Chart,
    HeatMap,
    Line,
    LineChart,
    four_digits,
    number,
    numbers,
)

__all__ = ["draw", "legend"]

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 10, 12, 42
# Names of bars and rows: so wide is a character on a phone, so many are shown.
CHARACTER, LONGEST = 8, 20
BAR_HEIGHT, CELL_HEIGHT, SCALE_HEIGHT = 30, 22, 40
SCALE_STEPS = 20
COLUMN_NAMES = 8


def draw(chart: Chart) -> str:
    """:return: an `<svg>` element"""
    if isinstance(chart, LineChart):
        return _line_chart(chart)
    if isinstance(chart, BarChart):
        return _bar_chart(chart)
    return _heat_map(chart)


def legend(chart: LineChart) -> str:
    """:return: a list of the lines that have a name; "" if none has"""
    dot = '<circle cx="13" cy="5" r="3"/>'
    items = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><g class="{line.style}" '
        f'opacity="{line.opacity:.2f}"><path d="M1 5H25"/>{dot if line.dots else ""}'
        f"</g></svg>{escape(line.name)}</li>"
        for line in chart.lines
        if line.name
    )
    if chart.band is not None:
        box = '<rect class="band" width="26" height="10"/>'
        items += (
            f'<li><svg viewBox="0 0 26 10" aria-hidden="true">{box}</svg>'
            f"{escape(chart.band.name)}</li>"
        )
    return f'<ul class="legend">{items}</ul>' if items else ""


class _Scale:
    """Data -> units of the drawing, along one axis."""

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        log: bool = False,
        whole: bool = False,
    ) -> None:
        self.log, self.least = log, 1.0 if whole else 0.0
        low, high = (math.log10(v) if log else v for v in (min(values), max(values)))
        margin = 0.04 * (high - low) or (0.5 if log else abs(low) * 0.05 or 0.5)
        self.low, self.high = low - margin, high + margin
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        share = (at - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return _round_steps(self.low, self.high, self.least)
        if self.high - self.low < 2:  # decades
            return _round_steps(10**self.low, 10**self.high)
        powers = range(math.ceil(self.low), math.floor(self.high) + 1)
        return [10.0**power for power in powers[:: max(1, len(powers) // 5)]]


def _round_steps(low: float, high: float, least: float = 0.0) -> list[float]:
    """:param least: distance of two of them"""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) < 6)
    step = max(step, least)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [tick * step for tick in range(first, last + 1)]


def _svg(chart: Chart, height: float, parts: Iterator[str]) -> str:
    """What the chart shows is its label, for those who cannot see it."""
    label = escape(f"{chart.title}, over {chart.x_label}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line_chart(chart: LineChart) -> str:
    lines = [_drawable(line, chart) for line in chart.lines]
    x_values = [x for line in lines for x in line.x]
    x = _Scale(x_values, LEFT, WIDTH - RIGHT, chart.log_x, chart.counts)
    y_values = chart.y_limits or list(_heights(lines, chart.log_y)) or [1.0]
    y = _Scale(y_values, HEIGHT - BOTTOM, TOP, chart.log_y)
    return _svg(chart, HEIGHT, _line_parts(chart, lines, x, y))


def _line_parts(
    chart: LineChart, lines: Sequence[Line], x: _Scale, y: _Scale
) -> Iterator[str]:
    if chart.band is not None:
        yield _band(chart.band, x)
    yield '<g class="axis">'
    yield from _y_axis(y, chart.y_label)
    yield from _x_axis(x, HEIGHT - BOTTOM, chart.x_label, LEFT)
    yield "</g>"
    yield from (_line(line, x, y) for line in lines)


def _drawable(line: Line, chart: LineChart) -> Line:
    """Gaps where a logarithmic axis has no place."""
    points = zip(line.x, line.y, strict=True)
    return replace(
        line,
        y=[
            None
            if y is None or (chart.log_y and y <= 0) or (chart.log_x and x <= 0)
            else y
            for x, y in points
        ],
    )


def _heights(lines: Sequence[Line], log: bool) -> Iterator[float]:
    """All that the y axis must show, ends of error bars included."""
    for line in lines:
        for y, error in zip(line.y, _errors(line.errors, len(line.y))):
            if y is not None:
                yield from (y,) if log else (y - error, y + error)


def _errors(errors: Sequence[float | None], count: int) -> list[float]:
    return [error or 0.0 for error in errors] or [0.0] * count


def _band(band: Band, x: _Scale) -> str:
    left = max(LEFT, x(band.low))
    width = max(0.0, min(WIDTH - RIGHT, x(band.high)) - left)
    return (
        f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{width:.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>'
    )


def _y_axis(y: _Scale, label: str) -> Iterator[str]:
    ticks = y.ticks()
    for tick, name in zip(ticks, numbers(ticks), strict=True):
        at = y(tick)
        yield f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
        yield _text(LEFT - 6, at + 4, name, "end")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield (
        f'<text transform="translate(15 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(label)}</text>"
    )


def _x_axis(x: _Scale, y: float, label: str, left: float) -> Iterator[str]:
    """:param y: where the axis lies"""
    ticks = x.ticks()
    for tick, name in zip(ticks, numbers(ticks), strict=True):
        yield _text(x(tick), y + 16, name)
    yield _text((left + WIDTH - RIGHT) / 2, y + BOTTOM - 6, label)


def _line(line: Line, x: _Scale, y: _Scale) -> str:
    points = [
        None if value is None else (x(at), y(value))
        for at, value in zip(line.x, line.y, strict=True)
    ]
    marks = _path(points)
    errors = _errors(line.errors, len(points))
    for index, (point, value) in enumerate(zip(points, line.y, strict=True)):
        if point is None or value is None:
            continue
        if errors[index] and (not y.log or value > errors[index]):
            low, high = y(value - errors[index]), y(value + errors[index])
            marks += f'<path class="error" d="M{point[0]:.1f} {low:.1f}V{high:.1f}"/>'
        if index == line.ring:
            marks += _ring(*point)
        if line.dots:
            note = f"{line.name} {number(line.x[index])}: {value:.4g}"
            marks += _dot(*point, note)
    return f'<g class="{line.style}" opacity="{line.opacity:.2f}">{marks}</g>'


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """The pen is lifted at a gap."""
    path, pen = "", "M"
    for point in points:
        if point is not None:
            path += f"{pen}{point[0]:.1f} {point[1]:.1f}"
        pen = "M" if point is None else "L"
    return f'<path d="{path}"/>' if path else ""


def _ring(x: float, y: float) -> str:
    return f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>'


def _dot(x: float, y: float, note: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(note)}</title>'
        "</circle>"
    )


def _names_width(names: Sequence[str]) -> float:
    return 8 + CHARACTER * min(LONGEST, max(map(len, names)))


def _short(name: str) -> str:
    """The end of a name tells it apart."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _bar_chart(chart: BarChart) -> str:
    left = _names_width(chart.names)
    errors = _errors(chart.errors, len(chart.values))
    edges = [
        edge
        for value, error in zip(chart.values, errors)
        if value is not None
        for edge in ((value - error, value + error) if not chart.log else (value,))
    ]
    if not chart.points:
        edges.append(0.0)
    # room for the number after the longest bar
    x = _Scale(edges or [1.0], left + 12, WIDTH - RIGHT - 60, chart.log)
    height = TOP + BAR_HEIGHT * len(chart.names) + BOTTOM
    return _svg(chart, height, _bar_parts(chart, x, left))


def _bar_parts(chart: BarChart, x: _Scale, left: float) -> Iterator[str]:
    yield '<g class="axis">'
    yield from _x_axis(x, TOP + BAR_HEIGHT * len(chart.names), chart.x_label, left)
    yield "</g>"
    errors = _errors(chart.errors, len(chart.values))
    for row, (name, value) in enumerate(zip(chart.names, chart.values, strict=True)):
        y = TOP + BAR_HEIGHT * (row + 0.5)
        yield _text(left, y + 4, _short(name), "end")
        if value is not None:
            yield _bar(chart, x, y, row, value, errors[row])


def _bar(
    chart: BarChart, x: _Scale, y: float, row: int, value: float, error: float
) -> str:
    end = x(value)
    marks = "" if chart.points else _bar_of_zero(x(0.0), end, y)
    if error and (not chart.log or value > error):
        low, high = x(value - error), x(value + error)
        marks += f'<path class="error" d="M{low:.1f} {y:.1f}H{high:.1f}"/>'
    if row == chart.ring:
        marks += _ring(end, y)
    if chart.points:
        marks += _dot(end, y, f"{chart.names[row]}: {four_digits(value)}")
    right = max(end, x(value + error)) + 12
    written = _text(right, y + 4, four_digits(value), "start")
    return f'<g class="final">{marks}</g>{written}'


def _bar_of_zero(zero: float, end: float, y: float) -> str:
    left, width = min(zero, end), abs(end - zero)
    return f'<rect x="{left:.1f}" y="{y - 9:.1f}" width="{width:.1f}" height="18"/>'


def _heat_map(chart: HeatMap) -> str:
    height = TOP + CELL_HEIGHT * len(chart.rows) + BOTTOM + SCALE_HEIGHT
    return _svg(chart, height, _heat_parts(chart))


def _heat_parts(chart: HeatMap) -> Iterator[str]:
    left = _names_width(chart.rows)
    width = (WIDTH - RIGHT - left) / len(chart.columns)
    for row, (name, cells) in enumerate(zip(chart.rows, chart.cells, strict=True)):
        y = TOP + CELL_HEIGHT * row
        yield _text(left - 6, y + CELL_HEIGHT / 2 + 5, _short(name), "end")
        for column, cell in enumerate(cells):
            if cell is not None:
                box = _box(left + column * width, y, width, CELL_HEIGHT)
                yield _cell(chart, cell.value, box, cell.note)
    bottom = TOP + CELL_HEIGHT * len(chart.rows)
    yield from _column_names(chart, left, width, bottom)
    yield from _colour_scale(chart, left, bottom + BOTTOM)


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:g}"'


def _cell(chart: HeatMap, value: float, box: str, note: str = "") -> str:
    """The side of the middle is the colour, the distance its opacity."""
    distance = value - chart.middle
    side = "above" if distance > 0 else "below"
    opacity = min(1.0, abs(distance) / (chart.reach or 1.0))
    title = f"<title>{escape(note)}</title>" if note else ""
    return (
        f'<rect class="cell {side}" {box} fill-opacity="{opacity:.3f}">{title}</rect>'
    )


def _column_names(
    chart: HeatMap, left: float, width: float, bottom: float
) -> Iterator[str]:
    count = len(chart.columns)
    step = next(s for s in (1, 2, 5, 10, 20, 50, count) if count / s <= COLUMN_NAMES)
    for column in range(0, count, step):
        x = left + (column + 0.5) * width
        yield _text(x, bottom + 16, _short(chart.columns[column]))
    yield _text((left + WIDTH - RIGHT) / 2, bottom + BOTTOM - 6, chart.x_label)


def _colour_scale(chart: HeatMap, left: float, top: float) -> Iterator[str]:
    """A strip from full colour to full colour, with its ends and middle named."""
    right, (low, high) = WIDTH - RIGHT, chart.ends
    width = (right - left) / (SCALE_STEPS + 1)
    for step in range(SCALE_STEPS + 1):
        value = low + (high - low) * step / SCALE_STEPS
        yield _cell(chart, value, _box(left + step * width, top, width, 10))
    y = top + 26
    middle = left + (right - left) * (chart.middle - low) / (high - low)
    name = f"{chart.middle_name} {number(chart.middle)}"
    # between the names of the ends, and beside them where the middle is not
    half = CHARACTER * len(name) / 2
    aside = min(max(middle, left + 40 + half), right - 40 - half)
    yield _text(left, y, number(low), "start")
    yield _text(aside, y, name)
    yield _text(right, y, number(high), "end")
