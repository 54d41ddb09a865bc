"""Charts as PNG, and that none of them ends a run."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import absorb, error_of
from helpers.profiles import (
    make_confirmed,
    make_linear_profile,
    make_profile,
    make_quality,
)
from matplotlib.figure import Figure
from matplotlib.image import imread

from absorb_plugin.report import figure
from absorb_plugin.report.charts import BarChart, Cell, HeatMap, Line, LineChart
from absorb_plugin.report.figure import draw, save_figure
from absorb_plugin.report.profile_charts import profile_charts

DOLLARS = r"run$\oops$"
BELOW, ABOVE = (0x1F, 0x5F, 0xBF), (0xD9, 0x73, 0x0D)


def pixels(png: bytes) -> np.ndarray:
    """Shape (height, width, 3), 0 … 255."""
    return np.round(255 * imread(io.BytesIO(png))[..., :3]).astype(int)


def count(png: bytes, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels(png) - colour).max(axis=-1) <= 2).sum())


def test_every_chart_of_a_profile_is_drawn() -> None:
    full = make_linear_profile(confirmed=make_confirmed(), quality=make_quality())
    charts = profile_charts(full)
    assert len(charts) == 7
    alone = [pixels(draw([chart], "")) for chart in charts]
    assert all(image.std() > 5 for image in alone)
    whole = pixels(draw(charts, "all"))
    assert whole.shape[0] == pytest.approx(sum(len(image) for image in alone), abs=7)
    two = pixels(draw(charts, "all", columns=2))
    assert two.shape[0] < 0.7 * whole.shape[0]


def test_a_heat_map_has_both_colours() -> None:
    def colours(low: float, high: float) -> list[bool]:
        cells = [[Cell(low, ""), None, Cell(high, "")]]
        chart = HeatMap("", "block", ["q"], list("012"), cells, 0.5, "budget")
        png = draw([chart], "")
        # the colour bar has a few pixels of each
        return [count(png, colour) > 5000 for colour in (BELOW, ABOVE)]

    assert colours(0.4, 0.6) == [True, True]
    assert colours(0.5, 0.6) == [False, True]
    assert colours(0.4, 0.5) == [True, False]
    assert colours(0.5, 0.5) == [False, False]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figure that is made."""
    found: list[Figure] = []
    monkeypatch.setattr(
        figure, "Figure", lambda **f: found.append(Figure(**f)) or found[0]
    )
    return found


@pytest.mark.parametrize(
    ("high", "expected"),
    [
        (1.4, {"0.6", "0.8", "1"}),
        (1.2, {"0.6", "0.8", "1"}),
        (7, {"0.5", "1", "2"}),
        (1e4, {"$\\mathdefault{10^{2}}$"}),
    ],
)
def test_a_short_logarithmic_axis_has_numbers(
    high: float, expected: set[str], drawn: list[Figure]
) -> None:
    line = Line("", "final", [0, 1], [0.45, high])
    draw([LineChart("", "x", "y", [line], log_y=True)], "")
    (ax,) = drawn[0].axes
    assert expected <= {tick.get_text() for tick in ax.get_yticklabels()}


def test_a_legend_does_not_press_axes_together(drawn: list[Figure]) -> None:
    names = ("the rounding floor", "after the first block", "after the last")
    lines = [Line(name, "final", [0, 1], [0.1, 0.2]) for name in names]
    chart = LineChart("realignment: mean cosine to the clean run", "x", "y", lines)
    draw([chart] * 6, "", columns=3)
    assert all(ax.get_position().width > 0.24 for ax in drawn[0].axes)
    titles = [ax.title.get_window_extent() for ax in drawn[0].axes]
    whole = drawn[0].bbox
    assert all(box.x0 >= whole.x0 and box.x1 <= whole.x1 for box in titles)


def test_the_colour_scale_ends_where_values_do(drawn: list[Figure]) -> None:
    cells = [[Cell(0.0, ""), Cell(0.3, "")]]
    draw([HeatMap("", "", ["q"], ["0", "1"], cells, 0.1, "budget", least=0.0)], "")
    assert drawn[0].axes[1].get_ylim() == pytest.approx((0.0, 0.3))


@pytest.mark.parametrize("blocks", [1, 2, 12])
def test_blocks_are_counted_in_whole_numbers(blocks: int) -> None:
    axes = Figure().subplots()
    line = Line("", "final", range(blocks), [0.5] * blocks)
    figure._chart(axes, LineChart("", "block", "y", [line]), narrow=False)
    low, high = axes.get_xlim()
    ticks = [x for x in axes.get_xticks() if low <= x <= high]
    assert 0 in ticks and all(x == int(x) for x in ticks)


def test_longer_bars_have_more_colour() -> None:
    areas = [
        count(draw([BarChart("", "x", ["a", "b"], [1.0, value])], ""), BELOW)
        for value in (1.0, None)
    ]
    assert areas[0] == pytest.approx(2 * areas[1], rel=0.05)


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    line = Line(DOLLARS, "final", [0, 1], [0.1, 0.2])
    charts = [
        LineChart(DOLLARS, DOLLARS, DOLLARS, [line]),
        BarChart(DOLLARS, DOLLARS, [DOLLARS], [1.0]),
        HeatMap(
            DOLLARS, DOLLARS, [DOLLARS], [DOLLARS], [[Cell(0.4, "")]], 0.5, DOLLARS
        ),
    ]
    for chart in charts:
        assert pixels(draw([chart], DOLLARS)).std() > 5


def test_a_model_called_by_dollars_has_a_figure(
    tmp_path: Path, warnings: list[str]
) -> None:
    profile = make_linear_profile(confirmed=make_confirmed())
    profile["settings"]["allocator"] = DOLLARS
    profile["blocks"][0]["name"] = DOLLARS
    save_figure(tmp_path / "a.png", profile_charts(profile), DOLLARS)
    assert warnings == [] and pixels((tmp_path / "a.png").read_bytes()).std() > 5


@pytest.mark.parametrize("error", [ValueError("no font"), MemoryError()])
def test_an_error_while_drawing_is_a_warning(
    error: Exception,
    tmp_path: Path,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(figure, "_chart", fail)
    save_figure(tmp_path / "a.png", profile_charts(make_profile()), "title")
    (told,) = warnings
    assert f"a.png could not be made ({type(error).__name__}: {error})" in told
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_drawing_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "_chart", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_figure(tmp_path / "a.png", profile_charts(make_profile()), "title")


def test_a_full_disk_is_a_warning(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    save_figure(tmp_path / "a.png", profile_charts(make_profile()), "title")
    (told,) = warnings
    assert "could not be written (No space left on device)" in told
    assert "Make room" in told


def no_font(*args: object) -> None:
    raise ValueError("no font")


def test_compare_has_its_table_where_no_figure_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "_chart", no_font)
    run = tmp_path / "run.json"
    run.write_text('{"perplexity": 20.5, "tokens": 99}')
    result = absorb("compare", run, "--figure", tmp_path / "a.png")
    assert result.exit_code == 0 and "20.50" in result.stdout
    assert "a.png could not be made (ValueError: no font)" in result.stderr


def test_noise_has_its_numbers_where_no_figure_can_be_drawn(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "_chart", no_font)
    options = ["--text", text_file, "--samples", 2, "--seq-len", 16, "--eta", "1"]
    result = absorb(
        "noise", model_dir, *options, "--json", "--figure", tmp_path / "a.png"
    )
    assert result.exit_code == 0 and json.loads(result.stdout)["samples"] == 2
    assert "a.png could not be made (ValueError: no font)" in result.stderr


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    unfinished = make_profile(realised=None)
    run.write_text(json.dumps(unfinished))
    assert "nothing to draw" in error_of("compare", run, "--figure", tmp_path / "a.png")
