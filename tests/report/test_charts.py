"""The charts as data: what is drawn of a profile, a noise scan and of runs."""

from typing import Any

import pytest
from helpers.profiles import (
    LLAMA,
    make_confirmed,
    make_descent,
    make_linear,
    make_linear_profile,
    make_profile,
    make_quality,
    make_search,
)

from absorb_plugin.report.charts import BarChart, Chart, HeatMap, LineChart
from absorb_plugin.report.compare_figure import compare_charts
from absorb_plugin.report.noise_figure import noise_charts
from absorb_plugin.report.profile_charts import profile_charts


def titles(charts: list[Chart]) -> list[str]:
    return [chart.title for chart in charts]


def chart_of(charts: list[Chart], title: str) -> Any:
    (found,) = [chart for chart in charts if chart.title == title]
    return found


def test_a_chart_for_each_thing_that_was_measured() -> None:
    assert titles(profile_charts(make_profile())) == [
        "Sparsity per block",
        "Search for the strength",
        "Absorption ratio",
        "Drift over depth",
    ]
    least = make_profile(noise=None, search=None, realised=None)
    assert titles(profile_charts(least)) == ["Sparsity per block"]
    full = make_linear_profile(confirmed=make_confirmed(), quality=make_quality())
    new = {"Sparsity per Linear", "Confirmed loss", "Loss over sparsity"}
    assert new <= set(titles(profile_charts(full)))


def heat_map(profile: dict[str, Any]) -> HeatMap:
    return chart_of(profile_charts(profile), "Sparsity per Linear")


def test_linears_over_depth() -> None:
    profile = make_linear_profile(blocks=4)
    chart = heat_map(profile)
    assert list(chart.rows) == list(LLAMA)
    assert list(chart.columns) == ["0", "1", "2", "3"]
    assert chart.middle == 0.5
    for column, block in enumerate(profile["blocks"]):
        for row, kind in enumerate(LLAMA):
            cell, linear = chart.cells[row][column], block["linears"][kind]
            assert cell is not None and cell.value == pytest.approx(linear["sparsity"])
            assert cell.note == (
                f"{block['name']}.{kind}: target {linear['sparsity']:.4f}, base "
                f"0.5000, realised {linear['realised_sparsity']:.4f}"
            )


def test_what_is_not_counted_yet_is_not_in_the_note() -> None:
    profile = make_linear_profile(blocks=1)
    profile["blocks"][0]["linears"][LLAMA[0]]["realised_sparsity"] = None
    cell = heat_map(profile).cells[0][0]
    assert cell is not None and cell.note.endswith("base 0.5000")


def test_experts_of_a_block_are_one_row() -> None:
    profile = make_linear_profile(blocks=2, kinds=("self_attn.q_proj",))
    profile["blocks"][1]["linears"] |= {
        "mlp.experts.0.up_proj": make_linear(0.2, parameters=100),
        "mlp.experts.1.up_proj": make_linear(0.6, parameters=300),
        "mlp.shared_experts.up_proj": make_linear(0.4),
    }
    chart = heat_map(profile)
    assert list(chart.rows) == [
        "self_attn.q_proj", "mlp.experts", "mlp.shared_experts.up_proj"
    ]  # fmt: skip
    assert chart.cells[1][0] is None  # the first block is dense
    cell = chart.cells[1][1]
    assert cell is not None and cell.value == pytest.approx(0.5)  # by weights
    assert "target 0.5000 (mean of 2, 0.2000 … 0.6000)" in cell.note


def test_blocks_of_several_kinds_leave_cells_empty() -> None:
    profile = make_linear_profile(blocks=2)
    mamba = {"mamba.in_proj": make_linear(0.3), "mamba.out_proj": make_linear(0.4)}
    profile["blocks"][1]["linears"] = mamba
    chart = heat_map(profile)
    assert list(chart.rows) == [*LLAMA, *mamba]
    assert all(row[1] is None for row in chart.cells[: len(LLAMA)])
    assert all(row[0] is None for row in chart.cells[len(LLAMA) :])


def test_linears_of_one_target_need_no_heat_map() -> None:
    assert "Sparsity per Linear" not in titles(profile_charts(make_profile()))


def test_the_outcome_is_ringed() -> None:
    profile = make_profile(confirmed=make_confirmed(), quality=make_quality())
    charts = profile_charts(profile)
    search = chart_of(charts, "Search for the strength")
    assert [line.name for line in search.lines] == ["owl", "uniform", "held out"]
    assert search.lines[2].ring == 2
    confirmed: BarChart = chart_of(charts, "Confirmed loss")
    assert confirmed.names == ["owl", "uniform", "searched"]
    assert confirmed.values == [4.46, 4.5, 4.25] and confirmed.ring == 2
    quality: LineChart = chart_of(charts, "Loss over sparsity")
    bound, curve = quality.lines
    assert list(bound.y) == [0.1, 0.1]
    assert list(curve.x) == [0.3, 0.5, 0.6] and curve.ring == 1
    between = make_profile(quality=make_quality(found=0.55))
    curve = chart_of(profile_charts(between), "Loss over sparsity").lines[1]
    assert curve.ring is None


def test_a_descent_and_where_it_was_stopped() -> None:
    charts = profile_charts(make_profile(search=make_descent()))
    assert "Search for the strength" not in titles(charts)
    base, uniform, own, held_out = chart_of(charts, "Descent").lines
    assert (base.name, uniform.name) == ("owl", "uniform")
    assert list(base.x) == [0, 4] and list(base.y) == [4.5, 4.5]
    assert list(own.x) == [0, 1, 2, 3] and own.y == [4.7, 4.4, 4.3, 4.2]
    assert held_out.x == [0, 1, 3, 4] and held_out.y == [4.5, 4.4, 4.25, 4.3]
    assert held_out.x[held_out.ring] == 3


def test_a_descent_whose_path_was_not_judged() -> None:
    judged = [{"steps": 0, "loss": 4.5}]
    search = make_descent(judged=judged, taken=4, loss=None)
    descent = chart_of(profile_charts(make_profile(search=search)), "Descent")
    assert descent.lines[-1].ring is None and descent.lines[-1].x == [0]
    assert descent.caption.startswith("The end was taken.")
    other = make_profile(search=search, confirmed=make_confirmed("base"))
    descent = chart_of(profile_charts(other), "Descent")
    assert descent.caption.startswith("The end went into the last comparison, which ")


@pytest.mark.parametrize(
    ("title", "search"),
    [("Descent", make_descent()), ("Search for the strength", make_search())],
)
def test_what_is_circled_may_have_lost_the_last_comparison(
    title: str, search: dict[str, Any]
) -> None:
    for chosen, told in (("searched", "Circled: taken."), ("base", "What is circled ")):
        profile = make_profile(search=search, confirmed=make_confirmed(chosen))
        caption = chart_of(profile_charts(profile), title).caption
        assert told in caption and ("Circled: taken" in caption) == (chosen != "base")


def test_losses_that_overflowed_have_no_rule() -> None:
    charts = profile_charts(make_profile(search=make_search(uniform_loss=None)))
    names = [line.name for line in chart_of(charts, "Search for the strength").lines]
    assert names == ["owl", "held out"]
    charts = profile_charts(make_profile(search=make_descent(uniform_loss=None)))
    assert len(chart_of(charts, "Descent").lines) == 3


def test_a_floor_out_of_sight_is_left_out() -> None:
    for floor, shown in ((1e-4, True), (1e-6, False)):
        profile = make_profile(noise={"magnitude": 0.01, "floor": [floor] * 12})
        lines = chart_of(profile_charts(profile), "Drift over depth").lines
        assert ("rounding floor" in [line.name for line in lines]) == shown


def make_scan(floor: float = 1e-3) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "blocks": ["model.layers.0", "model.layers.1"],
        "floor": [floor / 2, floor],
        "eta": [
            {
                "eta": eta,
                "ratio": [1.2, 1.0],
                "drift": [[eta, 1.2 * eta], [None, eta]],
                "realignment": [[0.9, 0.8], [None, 0.9]],
            }
            for eta in (1e-3, 0.1)
        ],
    }


def test_charts_of_a_noise_scan() -> None:
    first, second, ratio, realignment = noise_charts(make_scan())
    assert first.title == "drift R at η = 0.001" and first.log_y
    assert first.y_limits == second.y_limits == (2.5e-4, pytest.approx(0.24))
    assert [line.name for line in ratio.lines[1:]] == [
        "after the first block", "after the last"
    ]  # fmt: skip
    assert list(ratio.lines[1].x) == [1e-3, 0.1] and ratio.lines[1].y == [1.2, 1.2]
    assert ratio.log_x and ratio.log_y
    assert (ratio.band.low, ratio.band.high) == (5e-4, pytest.approx(5e-3))
    start, end = realignment.lines
    assert start.y == pytest.approx([0.9, 0.9]) and end.y == pytest.approx([0.85] * 2)


def test_the_floor_is_in_all_panels_that_are_compared() -> None:
    for floor in (1e-3, 1e-9):
        for chart in noise_charts(make_scan(floor))[:2]:
            assert chart.lines[0].name == "rounding floor"
            assert chart.y_limits[0] < floor


def test_noise_above_the_floor_has_no_band() -> None:
    assert noise_charts(make_scan(floor=1e-6))[2].band is None


def make_run(name: str, **known: Any) -> dict[str, Any]:
    return {"name": name, "sparsity": None, "perplexity": None, "tasks": {}} | known


def test_charts_of_runs() -> None:
    arc = {"arc": {"acc": 0.4, "stderr": 0.02, "n": 100}}
    runs = [make_run("dense", perplexity=20.0, tasks=arc), make_run("ours")]
    perplexity, accuracy = compare_charts(runs)
    assert perplexity.names == accuracy.names == ["dense", "ours"]
    assert perplexity.values == [20.0, None] and not perplexity.points
    assert accuracy.title == "arc" and accuracy.points
    assert accuracy.values == [0.4, None] and accuracy.errors == [0.02, None]
    far = [make_run("a", perplexity=3.0), make_run("b", perplexity=3e5)]
    (chart,) = compare_charts(far)
    assert chart.log and chart.points  # bars would have no foot
    with pytest.raises(ValueError, match="nothing to draw: no run has"):
        compare_charts([make_run("a")])
