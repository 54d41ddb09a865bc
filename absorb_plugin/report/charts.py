"""
What a chart shows, as plain data. svg.py draws it for the page, figure.py as a PNG.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Band", "BarChart", "Cell", "Chart", "HeatMap", "Line", "LineChart"]
__all__ += ["four_digits", "number", "numbers", "rule"]


@dataclass(frozen=True)
class Line:
    """
    :param name: in the legend; "" for none
    :param style: what it stands for: "final", "base", "realised", "rule", or "depth"
        for one of many lines
    :param x: ascending
    :param y: None for a gap
    :param errors: half lengths of error bars
    :param dots: draw the points
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


@dataclass(frozen=True)
class Band:
    """A shaded part of the x axis."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class LineChart:
    """
    :param log_x, log_y: logarithmic axes; there values of 0 or below are gaps
    :param y_limits: to compare charts by eye; None for those of the lines
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    caption: str = ""
    log_x: bool = False
    log_y: bool = False
    band: Band | None = None
    y_limits: tuple[float, float] | None = None

    @property
    def counts(self) -> bool:
        """Whether x is whole numbers: blocks, or steps."""
        return all(isinstance(x, int) for line in self.lines for x in line.x)


@dataclass(frozen=True)
class BarChart:
    """
    Horizontal bars, or points where zero says nothing.

    :param names: one per bar, from top to bottom
    :param values: None for what is not known
    :param errors: half lengths of error bars
    :param points: points in place of bars
    :param log: logarithmic axis, of points
    :param ring: index of a point to circle
    """

    title: str
    x_label: str
    names: Sequence[str]
    values: Sequence[float | None]
    errors: Sequence[float | None] = ()
    caption: str = ""
    points: bool = False
    log: bool = False
    ring: int | None = None


@dataclass(frozen=True)
class Cell:
    """:param note: says all that is known of it"""

    value: float
    note: str


@dataclass(frozen=True)
class HeatMap:
    """
    Colours that diverge from a middle value: one below it, another above.

    :param rows: names, from top to bottom
    :param columns: names, from left to right
    :param cells: one list per row; None where there is nothing
    :param middle: the value without a colour
    :param middle_name: what that value is
    :param least, most: values that there can be
    """

    title: str
    x_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell | None]]
    middle: float
    middle_name: str
    caption: str = ""
    least: float = -math.inf
    most: float = math.inf

    @property
    def ends(self) -> tuple[float, float]:
        """Of the colour scale."""
        reach = self.reach or 1.0
        low, high = self.middle - reach, self.middle + reach
        return max(low, self.least), min(high, self.most)

    @property
    def reach(self) -> float:
        """Largest distance from the middle: full colour."""
        found = [abs(c.value - self.middle) for row in self.cells for c in row if c]
        return max(found, default=0.0)


Chart = LineChart | BarChart | HeatMap


def rule(name: str, x: Sequence[float], y: float, style: str = "rule") -> Line:
    """A horizontal line over the whole of `x`."""
    return Line(name, style, [min(x), max(x)], [y, y], dots=False)


def four_digits(value: float) -> str:
    """With its zeros, so that numbers below each other can be compared."""
    return f"{value:#.4g}".rstrip(".")


def numbers(values: Sequence[float]) -> list[str]:
    """Of ticks at even distances: three digits, or as many as tell them apart."""
    if not values:
        return []
    step = min((b - a for a, b in pairwise(sorted(values))), default=math.inf)
    for digits in range(3, 10):
        texts = [f"{value:.{digits}g}" for value in values]
        off = max(abs(float(t) - v) for t, v in zip(texts, values, strict=True))
        if off < step / 20:
            break
    return [number(value, digits) for value in values]


def number(value: float, digits: int = 3) -> str:
    """So many digits, and no more zeros than needed."""
    if abs(value) < 1e-12:
        return "0"
    text = f"{value:.{digits}g}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{float(mantissa):.{digits}g}e{int(exponent)}"
    return text.replace("-", "−")
