"""`absorb curve`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from helpers.cli import absorb, error_of, files_in

from absorb_plugin.allocators.base_allocation import Base
from absorb_plugin.blocks import find_blocks
from absorb_plugin.cli.curve import _print, parse_sparsities
from absorb_plugin.evaluation import curve
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.evaluation.curve import (
    Curve,
    CurvePoint,
    as_dict,
    knee,
    measure_curve,
)
from absorb_plugin.method import Method
from absorb_plugin.search.budget import Budget
from absorb_plugin.settings import AllocationSettings


@pytest.mark.parametrize(
    "text",
    ["", "a", "0.3:0.8", "0.8:0.3:0.1", "0.3:0.8:0", "1,,2", "0.1,0.2:0.3"]
    + ["0.3:inf:0.1", "0.3:0.8:inf", "nan:0.8:0.1", "nan", "0.5,inf", "-inf"],
)
def test_bad_sparsities_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--sparsities"):
        parse_sparsities(text)


@pytest.mark.parametrize(
    "text", ["0:0.9:0.000001", "0:0.9:1e-320", ",".join(str(k) for k in range(101))]
)
def test_a_hundred_budgets_are_the_most(text: str) -> None:
    with pytest.raises(ValueError, match="the most"):
        parse_sparsities(text)
    assert len(parse_sparsities("0.0:0.99:0.01")) == 100


def test_ranges_and_lists() -> None:
    assert parse_sparsities("0.3:0.5:0.1") == [0.3, 0.4, 0.5]
    assert parse_sparsities("0.5, 0.3,0.5") == [0.3, 0.5]
    assert len(parse_sparsities("0.3:0.8:0.05")) == 11


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_command(pruner: str, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    figure = tmp_path / "curve.png"
    options = [
        "--text",
        text_file,
        "--samples",
        8,
        "--seq-len",
        16,
        "--effort",
        "quick",
    ]
    options += ["--sparsities", "0.2:0.6:0.2", "--pruner", pruner]
    result = absorb("curve", model_dir, *options, "--json", "--figure", figure)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [point["sparsity"] for point in found["points"]] == [0.2, 0.4, 0.6]
    for point in found["points"]:
        names = {"uniform", "base", "ours"}
        assert point["loss_increase"].keys() == point["perplexity"].keys() == names
    assert found["pruner"] == pruner and found["tokens"] > 0
    assert files_in(tmp_path) == {"curve.png"} and figure.stat().st_size > 1000


def test_a_curve_of_what_is_quantised(model_dir: Path, text_file: Path) -> None:
    options = ["--text", text_file, "--samples", 8, "--seq-len", 16, "--json"]
    options += ["--effort", "quick", "--sparsities", "0.2,0.5"]
    plain = json.loads(absorb("curve", model_dir, *options).stdout)
    result = absorb("curve", model_dir, *options, "--quantize", "w8a8")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert plain["quantization"] is None
    assert found["quantization"]["quantize"] == "w8a8"
    assert found["dense_loss"] == plain["dense_loss"]
    assert found["quantization"]["loss_increase"] != 0
    for one, other in zip(plain["points"], found["points"], strict=True):
        one, other = one["loss_increase"], other["loss_increase"]
        assert one["uniform"] != other["uniform"]
        assert one["uniform"] == pytest.approx(other["uniform"], abs=0.1)


def test_a_curve_of_groups_that_do_not_fit(text_file: Path, tmp_path: Path) -> None:
    small = tiny.small(hidden_size=48)
    model, tokenizer = tiny.with_tokenizer(small, tmp_path / "config")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = ["--text", text_file, "--seq-len", 16, "--quantize", "w4a16"]
    line = error_of("curve", tmp_path / "model", *options)
    assert "--quantize 'w4a16'" in line and "48 columns" in line


def test_the_table(model_dir: Path, text_file: Path) -> None:
    options = [
        "--text",
        text_file,
        "--samples",
        8,
        "--seq-len",
        16,
        "--effort",
        "quick",
    ]
    result = absorb("curve", model_dir, *options, "--sparsities", "0.5")
    assert result.exit_code == 0, result.output
    for part in ("sparsity", "uniform", "owl", "corrected", "0.5", "held-out"):
        assert part in result.stdout


def test_a_budget_out_of_reach_is_refused_first(
    model_dir: Path, text_file: Path
) -> None:
    line = error_of("curve", model_dir, "--text", text_file, "--sparsities", "0.5,0.99")
    assert "0.99" in line and "max_sparsity" in line


def test_zeros_that_leave_a_sparsity_out_of_reach(
    text_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = tiny.with_tokenizer(tiny.small(), tmp_path / "config")
    for linear in find_blocks(model).linears().values():
        linear.weight.data[:, ::2] = 0.0
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = ["--text", text_file, "--samples", 8, "--seq-len", 16]
    line = error_of("curve", tmp_path / "model", *options, "--sparsities", "0.3,0.6")
    assert "--sparsities 0.3 is out of reach" in line and "zeros already" in line


def test_a_file_of_the_user_is_not_overwritten(
    model_dir: Path, text_file: Path
) -> None:
    before = text_file.read_bytes()
    line = error_of("curve", model_dir, "--text", text_file, "--figure", text_file)
    assert "--figure" in line and "no result of an earlier run" in line
    assert text_file.read_bytes() == before


def curve_of(*increases: float) -> Curve:
    points = [
        CurvePoint(0.1 * (i + 1), {"ours": increase}, {"ours": 0.0})
        for i, increase in enumerate(increases)
    ]
    return Curve(3.0, 100, points)


def test_the_knee_in_words() -> None:
    assert knee(curve_of(0.01, 0.04, 0.2, 0.03)) == (
        "up to 20.0% costs less than 5% of perplexity"
    )
    assert knee(curve_of(0.1, 0.2)) == "10.0% already costs 11% of perplexity"
    told = "10.0% already multiplies perplexity by "
    assert knee(curve_of(50.0)) == told + "5.18e+21"
    assert knee(curve_of(1000.0)) == told + "inf"


def test_an_allocator_with_brackets_is_shown_whole() -> None:
    with io.StringIO() as file:
        _print(Curve(1.0, 100, []), "the knee", "a[b]", file)
        assert "a[b]" in file.getvalue()


def test_a_perplexity_beyond_the_largest_float() -> None:
    increases = {"uniform": 1000.0, "base": 600.0, "ours": 1.0}
    point = CurvePoint(0.5, increases, dict.fromkeys(increases, 0.0))
    found = Curve(800.0, 100, [point])
    (told,) = as_dict(found, "wanda", "owl")["points"]
    assert told["perplexity"] == dict.fromkeys(increases) and told["loss_increase"]
    with io.StringIO() as file:
        _print(found, "the knee", "owl", file)
        text = file.getvalue()
    assert "dense inf" in text and text.count(" inf ") == 4


@pytest.mark.parametrize("search", ["bad", "good"])
def test_what_prune_would_fall_back_to(
    search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search's outcome is not what a user gets where it is worse."""
    asked: list[int] = []

    def judged(context: object, candidates: list[np.ndarray], **_: object) -> tuple:
        """The first Linear is the dearest; of an outcome that is bad even halfway."""
        asked.append(len(candidates))
        side = 1 if search == "good" else -1
        sums = [np.full(4, 3 - side * (0.5 - one[0])) for one in candidates]
        return np.stack(sums), np.ones(4)

    def found(self: Method, budget: Budget, *_: object) -> np.ndarray:
        first = np.arange(len(budget.sizes)) == 0
        return budget.meet(budget.uniform() - 0.1 * first)

    monkeypatch.setattr(curve, "pruned_loss", judged)
    monkeypatch.setattr(curve, "dense_loss", lambda _: (np.ones((1, 4)), np.ones(4)))
    monkeypatch.setattr(Method, "found", found)
    settings = AllocationSettings(allocator="uniform", effort="quick")
    model, data = tiny.small(), tiny.make_dataset(8)
    drawn = measure_curve(model, data, [0.4, 0.5], settings, pruner="wanda")
    for point in drawn.points:
        better = point.increases["uniform"] - point.increases["ours"]
        assert (better > 0.09) == (search == "good") and better >= 0
    # of two that are equal one is asked for, and halfway where the outcome is worse
    assert asked == ([2, 2] if search == "good" else [2, 1, 2, 1])


def test_features_that_nothing_uses_count_as_they_do_in_an_allocation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SparseGPT zeroes the columns that read neurons that were removed."""
    model, data, base, asked = tiny.small(), tiny.make_dataset(8), Method.base, []
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[:30] = 0

    def noted(method: Method, budget: Budget) -> Base:
        asked.append(budget)
        return base(method, budget)

    monkeypatch.setattr(Method, "base", noted)
    settings = AllocationSettings(allocator="uniform", effort="quick")
    allocate_model(model, data, 0.5, settings, pruner="sparsegpt")
    measure_curve(model, data, [0.5], settings, pruner="sparsegpt")
    of_allocation, of_curve = asked
    np.testing.assert_array_equal(of_curve.low, of_allocation.low)
    assert of_curve.low.max() > 0.6


def test_what_cannot_be_met_is_told_before_any_budget_is_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where what nothing uses alone is more than the least sparsity asked for."""
    model = tiny.make_model("opt")
    for layer in model.model.decoder.layers:
        layer.fc1.bias.data[:40] = -1e3
    monkeypatch.setattr(Method, "search", lambda *_: pytest.fail("it was searched"))
    settings = AllocationSettings(effort="quick")
    with pytest.raises(ValueError, match="sparsity=0.1 cannot be met"):
        sparsities = [0.1, 0.3, 0.5]
        measure_curve(
            model, tiny.make_dataset(8), sparsities, settings, pruner="sparsegpt"
        )


def test_of_few_samples_it_is_said_that_the_search_saw_them(
    model_dir: Path, text_file: Path
) -> None:
    options = ["--text", text_file, "--seq-len", 16, "--effort", "quick"]
    options += ["--sparsities", "0.5", "--samples"]
    few, more = (absorb("curve", model_dir, *options, n) for n in (3, 8))
    assert few.exit_code == more.exit_code == 0, few.output + more.output
    assert "tokens that the search saw too" in " ".join(few.stdout.split())
    assert "held-out tokens" in " ".join(more.stdout.split())
    shown = absorb("curve", model_dir, *options, 3, "--json")
    assert json.loads(shown.stdout)["chosen_by_the_same"] is True


def test_a_figure_is_a_png(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--text", text_file, "--figure", tmp_path / "curve.jpg"]
    assert "let the name end in .png" in error_of("curve", model_dir, *options)
