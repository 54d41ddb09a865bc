"""Line charts as inline SVG; the page's CSS styles them, so they follow its theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "chart", "legend", "number"]

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 10, 12, 42


@dataclass(frozen=True)
class Line:
    """
    :param name: in the legend; "" for none
    :param style: CSS class of the page
    :param x: ascending
    :param y: None for a gap
    :param errors: half lengths of error bars
    :param dots: draw the points, with their values as tooltips
    :param ring: index of a point to circle
    """

    name: str
    style: str
    x: Sequence[float]
    y: Sequence[float | None]
    errors: Sequence[float | None] = ()
    dots: bool = True
    ring: int | None = None
    opacity: float = 1.0


class _Scale:
    """Data -> pixels along one axis."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, log: bool = False
    ) -> None:
        self.log = log
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
            return _round_steps(self.low, self.high)
        if self.high - self.low < 2:  # decades
            return _round_steps(10**self.low, 10**self.high)
        powers = range(math.ceil(self.low), math.floor(self.high) + 1)
        return [10.0**power for power in powers[:: max(1, len(powers) // 5)]]


def _round_steps(low: float, high: float) -> list[float]:
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) < 6)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [tick * step for tick in range(first, last + 1)]


def chart(
    lines: Sequence[Line], label: str, x_label: str, y_label: str, log: bool = False
) -> str:
    """
    :param label: what the chart shows, for those who cannot see it
    :param log: logarithmic y axis; values of 0 or below are gaps there
    :return: an `<svg>` element
    """
    lines = [_drawable(line, log) for line in lines]
    x_values = [x for line in lines for x in line.x]
    y_values = [
        edge
        for line in lines
        for y, error in zip(line.y, _errors(line))
        if y is not None
        for edge in ((y - error, y + error) if not log else (y,))
    ]
    x = _Scale(x_values, LEFT, WIDTH - RIGHT)
    y = _Scale(y_values or [1.0], HEIGHT - BOTTOM, TOP, log)
    parts = [*_axes(x, y, x_label, y_label), *(_line(line, x, y) for line in lines)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def legend(lines: Sequence[Line]) -> str:
    """:return: a list of the lines that have a name; "" if none has"""
    dot = '<circle cx="13" cy="5" r="3"/>'
    items = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><g class="{line.style}" '
        f'opacity="{line.opacity:.2f}"><path d="M1 5H25"/>{dot if line.dots else ""}'
        f"</g></svg>{escape(line.name)}</li>"
        for line in lines
        if line.name
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _drawable(line: Line, log: bool) -> Line:
    if not log:
        return line
    y = [value if value is not None and value > 0 else None for value in line.y]
    return Line(**{**line.__dict__, "y": y})


def _errors(line: Line) -> list[float]:
    return [error or 0.0 for error in line.errors] or [0.0] * len(line.y)


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> list[str]:
    parts = ['<g class="axis">']
    for tick in y.ticks():
        at = y(tick)
        parts.append(
            f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">'
            f"{number(tick)}</text>"
        )
    for tick in x.ticks():
        parts.append(
            f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
            f"{number(tick)}</text>"
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text></g>"
    )
    return parts


def _line(line: Line, x: _Scale, y: _Scale) -> str:
    points = [
        None if value is None else (x(at), y(value))
        for at, value in zip(line.x, line.y, strict=True)
    ]
    path, pen = "", "M"
    for point in points:
        if point is not None:
            path += f"{pen}{point[0]:.1f} {point[1]:.1f}"
        pen = "M" if point is None else "L"
    marks = f'<path d="{path}"/>' if path else ""
    for index, (point, error) in enumerate(zip(points, _errors(line))):
        if point is None:
            continue
        value = line.y[index]
        assert value is not None
        if error:
            marks += (
                f'<path class="error" d="M{point[0]:.1f} {y(value - error):.1f}'
                f'V{y(value + error):.1f}"/>'
            )
        if index == line.ring:
            marks += (
                f'<circle class="ring" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="8"/>'
            )
        if line.dots:
            marks += (
                f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3"><title>'
                f"{escape(line.name)} {number(line.x[index])}: {value:.4g}"
                "</title></circle>"
            )
    return f'<g class="{line.style}" opacity="{line.opacity:.2f}">{marks}</g>'


def number(value: float) -> str:
    """Three digits, and no more zeros than needed."""
    if abs(value) < 1e-12:
        return "0"
    text = f"{value:.3g}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")
