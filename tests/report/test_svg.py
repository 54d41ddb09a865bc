"""Charts as SVG."""

import re
from dataclasses import replace

import pytest
from helpers.pages import parse

from absorb_plugin.report import svg
from absorb_plugin.report.charts import (
    Band,
    BarChart,
    Cell,
    HeatMap,
    Line,
    LineChart,
    number,
    numbers,
)


def chart_of(lines: list[Line], **fields: object) -> LineChart:
    return LineChart("title", "x", "y", lines, **fields)


def dots(drawn: str) -> list[tuple[float, float]]:
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3"', drawn)
    return [(float(x), float(y)) for x, y in found]


def test_lines_leave_gaps_and_stay_inside() -> None:
    lines = [
        Line("a <b>", "final", [0, 1, 2, 3], [0.1, None, 10.0, 0.0], ring=2),
        Line("b", "base", [0, 3], [1.0, 1.0], dots=False, errors=[0.5, None]),
    ]
    for log in (False, True):
        drawn = svg.draw(chart_of(lines, log_y=log))
        parse(drawn)
        assert "<b>" not in drawn and "nan" not in drawn
        points = dots(drawn)
        assert len(points) == (2 if log else 3)  # 0 has no logarithm
        assert all(0 < x < 480 and 0 < y < 270 for x, y in points)
        assert drawn.count('class="ring"') == 1
        assert drawn.count('class="error"') == 1
    gap = svg.draw(chart_of(lines[:1]))
    assert gap.count("M") >= 2  # the pen is lifted there


def test_a_logarithmic_x_axis_spaces_decades_evenly() -> None:
    line = Line("", "final", [1e-3, 1e-2, 1e-1], [1.0, 2.0, 3.0])
    (first, _), (second, _), (third, _) = dots(svg.draw(chart_of([line], log_x=True)))
    assert second - first == pytest.approx(third - second, abs=0.2)


def test_a_band_stays_between_the_axes() -> None:
    line = Line("", "final", [1e-3, 1e-1], [1.0, 2.0])
    chart = chart_of([line], log_x=True, band=Band("floor", 1e-5, 1e-2))
    found = re.search(
        r'class="band" x="([\d.]+)" y="12" width="([\d.]+)"', svg.draw(chart)
    )
    assert found is not None
    assert float(found[1]) == 64 and 64 < float(found[1]) + float(found[2]) < 470
    assert "floor" in svg.legend(chart)


def test_limits_hold_for_charts_that_are_compared() -> None:
    low, high = (Line("", "final", [0, 1], [y, y]) for y in (1.0, 10.0))
    limits = {"y_limits": (1.0, 10.0)}
    heights = [dots(svg.draw(chart_of([line], **limits)))[0][1] for line in (low, high)]
    assert heights[0] > 200 and heights[1] < 30


def ticks(low: float, high: float, log: bool) -> list[float]:
    drawn = svg.draw(chart_of([Line("", "final", [0, 1], [low, high])], log_y=log))
    found = re.findall(r'text-anchor="end">([^<]+)<', drawn)
    return [float(text.replace("−", "-")) for text in found]


@pytest.mark.parametrize("low", [1e-8, 1e-3, 0.3, 20.0])
@pytest.mark.parametrize("factor", [1.5, 4, 11, 1e3, 1e9])
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_has_some_round_ticks_within(
    low: float, factor: float, log: bool
) -> None:
    found = ticks(low, low * factor, log)
    assert 2 <= len(found) <= 10
    assert found == sorted(set(found))
    margin = 0.0 if log else 0.05 * low * factor
    assert found[0] >= low * 0.4 - margin and found[-1] <= low * factor * 2.5 + margin


@pytest.mark.parametrize(
    ("last", "expected"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 2, 3]), (20, [0, 5, 10])]
)
def test_blocks_are_counted_in_whole_numbers(last: int, expected: list[int]) -> None:
    drawn = svg.draw(chart_of([Line("", "final", range(last + 1), [0.5] * (last + 1))]))
    axis = re.findall(r'text-anchor="middle">(−?[\d.]+)<', drawn)
    assert axis[: len(expected)] == list(map(str, expected))
    assert all(text.isdigit() for text in axis)


def test_numbers() -> None:
    assert [number(x) for x in (0, 1e-17, -0.05, 1e-7, 2e-5, 0.0123456, 30)] == [
        "0", "0", "−0.05", "1e−7", "2e−5", "0.0123", "30",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ((1.771, 1.772, 1.773), ["1.771", "1.772", "1.773"]),
        ((2.05, 2.055, 2.06), ["2.05", "2.055", "2.06"]),
        ((0.2, 0.4, 0.6), ["0.2", "0.4", "0.6"]),
        ((-0.0001, 0.0, 0.0001), ["−1e−4", "0", "1e−4"]),
        ((123456.0, 123457.0), ["123456", "123457"]),
        ((1e-5, 1e-3, 0.1, 10.0), ["1e−5", "0.001", "0.1", "10"]),
        ((7.0,), ["7"]),
        ((), []),
    ],
)
def test_ticks_are_told_apart(values: tuple[float, ...], names: list[str]) -> None:
    assert numbers(values) == names


def test_the_colour_scale_ends_where_values_do() -> None:
    chart = replace(heat_map([[0.0, 0.3]], middle=0.1), least=0.0, most=1.0)
    drawn = svg.draw(chart)
    text = parse(drawn).text
    assert "budget 0.1" in text and "0.3" in text and "−" not in text
    strip = re.findall(r'class="cell (\w+)"[^>]*height="10"', drawn)
    assert strip.count("above") == pytest.approx(2 * strip.count("below"), abs=2)


@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_bars(points: bool, log: bool) -> None:
    chart = BarChart(
        "title", "loss", ["<i>", "two", "unknown"], [1.0, 2.0, None], [0.5, None, None],
        points=points or log, log=log, ring=1,
    )  # fmt: skip
    drawn = svg.draw(chart)
    seen = parse(drawn)
    assert "<i>" not in drawn and "nan" not in drawn
    assert "2" in seen.text and "unknown" in seen.text
    assert drawn.count('class="error"') == 1 and drawn.count('class="ring"') == 1
    bars = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    if points or log:
        assert len(dots(drawn)) == 2 and bars == []
    else:
        (start, one), (_, two) = [(float(x), float(w)) for x, w in bars]
        assert two == pytest.approx(2 * one, abs=0.2) and start + two < 470


def heat_map(values: list[list[float | None]], middle: float = 0.5) -> HeatMap:
    cells = [[None if v is None else Cell(v, f"<{v}>") for v in row] for row in values]
    columns = [str(column) for column in range(len(values[0]))]
    names = [f"mlp.experts.row_{row}" for row in range(len(values))]
    return HeatMap("title", "block", names, columns, cells, middle, "budget")


def cells(drawn: str) -> list[tuple[str, float, str]]:
    """Side, opacity and note of every cell; the colour scale has no notes."""
    found = re.findall(
        r'class="cell (\w+)" [^>]* fill-opacity="([\d.]+)"><title>([^<]*)<', drawn
    )
    return [(side, float(opacity), note) for side, opacity, note in found]


def test_a_heat_map_diverges_from_its_middle() -> None:
    drawn = svg.draw(heat_map([[0.4, 0.5, None], [0.45, 0.55, 0.6]]))
    seen = parse(drawn)
    assert cells(drawn) == [
        ("below", 1.0, "&lt;0.4&gt;"),
        ("below", 0.0, "&lt;0.5&gt;"),
        ("below", 0.5, "&lt;0.45&gt;"),
        ("above", 0.5, "&lt;0.55&gt;"),
        ("above", 1.0, "&lt;0.6&gt;"),
    ]
    for text in ("0.4", "budget 0.5", "0.6", "mlp.experts.row_0", "block"):
        assert text in seen.text


def test_a_heat_map_of_one_value_has_no_colour() -> None:
    drawn = svg.draw(heat_map([[0.5, 0.5]]))
    assert [opacity for _, opacity, _ in cells(drawn)] == [0.0, 0.0]


@pytest.mark.parametrize("columns", [1, 7, 30, 126])
def test_a_heat_map_fills_its_width(columns: int) -> None:
    drawn = svg.draw(heat_map([[0.4] * columns]))
    boxes = re.findall(
        r'class="cell below" x="([\d.]+)" y="12.0" width="([\d.]+)"', drawn
    )
    assert len(boxes) == columns
    x, width = map(float, boxes[-1])
    assert x + width == pytest.approx(470, abs=0.1 * columns)
    middle = re.findall(r'text-anchor="middle">(\d+)<', drawn)
    assert 1 <= len(middle) <= 8 and middle[0] == "0"


def test_long_names_are_cut_in_front() -> None:
    chart = BarChart("", "x", ["linear_attention.in_projection_qkvz"], [1.0])
    assert "….in_projection_qkvz<" in svg.draw(chart)
