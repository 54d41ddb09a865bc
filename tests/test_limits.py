"""Bounds of single Linears: kept by the base, the search and the hand-over."""

from pathlib import Path

import numpy as np
import pytest
from helpers import runs, tiny
from pydantic import ValidationError

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.blocks import find_blocks
from absorb_plugin.choices import budget_of
from absorb_plugin.limits import bounds_of
from absorb_plugin.pruners import SparseGPT
from absorb_plugin.settings import AllocationSettings

DOWN = "re:.*down_proj"


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "fields",
    [{"strength": "auto", "effort": "quick"}, {"strength": 0.2}, {"strength": 0}],
)
def test_limits_hold_in_the_pruned_model(
    kind: str, fields: dict, tmp_path: Path
) -> None:
    model = tiny.make_model("llama")
    pruner = runs.pruner(kind, sparsity=0.6)
    first = "model.layers.0.self_attn.q_proj"
    limits = {DOWN: (0.1, 0.3), first: (0.0, 0.0)}
    modifier = AbsorptionAllocationModifier(limits=limits, **fields)
    runs.run(model, [modifier, pruner], tmp_path, samples=12)
    linears = find_blocks(model).linears()
    zeros = {n: float((x.weight == 0).float().mean()) for n, x in linears.items()}
    for name, share in zeros.items():
        if name.endswith("down_proj"):
            assert 0.05 < share <= 0.31
    assert zeros[first] == 0 and first not in pruner.targets
    total = sum(x.weight.numel() for x in linears.values())
    met = sum(zeros[n] * x.weight.numel() for n, x in linears.items()) / total
    assert met == pytest.approx(0.6, abs=0.03)


def test_the_narrower_of_two_patterns_counts() -> None:
    blocks = find_blocks(tiny.make_model("llama"))
    name = "model.layers.1.mlp.down_proj"
    low, high = bounds_of(blocks, {DOWN: (0.1, 0.5), name: (0.0, 0.4)}, 0.95)
    at = list(blocks.linears()).index(name)
    assert (low[at], high[at]) == (0.1, 0.4)
    others = [i for i, n in enumerate(blocks.linears()) if not n.endswith("down_proj")]
    assert not low[others].any() and (high[others] == 0.95).all()


@pytest.mark.parametrize(
    "limits, told",
    [
        ({"re:(": (0, 1)}, "limits holds 're:\\('.*no regular expression"),
        ({DOWN: (0.5, 0.2)}, "0 <= low <= high <= 1"),
        ({DOWN: (-0.1, 0.2)}, "0 <= low <= high <= 1"),
        ({DOWN: (0.1, 1.2)}, "0 <= low <= high <= 1"),
    ],
)
def test_wrong_limits_are_refused_as_fields(limits: dict, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        AllocationSettings(limits=limits)


@pytest.mark.parametrize(
    "limits, told",
    [
        ({"down_proj": (0, 0.5)}, "'down_proj' matches none of the 21 Linears"),
        (
            {DOWN: (0.5, 0.6), "re:.*layers.0.mlp": (0, 0.2)},
            "leave no sparsity for .*down_proj.* 0.5, .* 0.2",
        ),
        ({"re:.*": (0.0, 0.3)}, "sparsity=0.6 cannot be met.*limits"),
        ({"re:.*": (0.7, 0.9)}, "sparsity=0.6 cannot be met.*limits"),
    ],
)
def test_limits_that_do_not_fit_the_model_are_refused_before_the_run(
    limits: dict, told: str, tmp_path: Path
) -> None:
    model = tiny.make_model("llama")
    before = tiny.snapshot(model)
    recipe = [AbsorptionAllocationModifier(limits=limits), runs.pruner(sparsity=0.6)]
    with (
        tiny.counted({"model": model.model}) as passes,
        pytest.raises(ValueError, match=told),
    ):
        runs.run(model, recipe, tmp_path)
    assert passes == {"model": 0}
    tiny.assert_untouched(model, before)


def test_zeros_beyond_a_limit_are_told(warnings: list[str]) -> None:
    model = tiny.small()
    model.model.layers[0].mlp.down_proj.weight.data[:, ::2] = 0
    runs.allocate(model, limits={"re:.*layers.0.mlp.down_proj": (0.0, 0.2)})
    (told,) = [line for line in warnings if "of their own" in line]
    assert told.startswith("1 Linears have more zeros")


def test_limits_hold_where_there_are_zeros_already() -> None:
    model = tiny.make_model("llama")
    model.model.layers[0].self_attn.q_proj.weight.data[:, :2] = 0
    limits = {DOWN: (0.7, 0.9)}
    found = runs.allocate(model, strength=0, allocator="uniform", limits=limits)
    targets = found.linear_sparsities()
    assert {s for n, s in targets.items() if n.endswith("down_proj")} == {0.7}
    assert found.achieved() == pytest.approx(0.5)


def test_a_bound_on_the_loss_goes_no_lower_than_limits_let_it() -> None:
    model, batch = tiny.make_model("llama"), tiny.make_batch(12, 16)
    limits, least = {"re:.*mlp.*": (0.4, 0.9)}, 0.4 * 0.6

    def found(bound: float) -> float:
        allocation = runs.allocate(
            model,
            [batch],
            0.6,
            strength="auto",
            allocator="uniform",
            effort="quick",
            rounds=2,
            limits=limits,
            max_loss_increase=bound,
        )
        assert allocation.quality is not None
        found = allocation.quality.found.allocation  # what keeps the bound is taken
        np.testing.assert_array_equal(allocation.sparsity, found)
        assert min(p.sparsity for p in allocation.quality.points) >= least - 1e-9
        return allocation.quality.found.sparsity

    assert least < found(0.3) < 0.6
    with pytest.raises(ValueError, match=r"at a sparsity of 0\.24.*lower limits"):
        found(0.1)


def test_of_a_bound_on_the_loss_the_sparsity_is_but_the_most() -> None:
    model, batch = tiny.make_model("llama"), tiny.make_batch(12, 16)
    fields = {"strength": "auto", "allocator": "uniform", "effort": "quick"}
    limits = {"re:.*mlp.*": (0.0, 0.2)}
    with pytest.raises(ValueError, match=r"sparsity=0\.8 cannot be met"):
        runs.allocate(model, [batch], 0.8, rounds=1, limits=limits, **fields)
    found = runs.allocate(
        model, [batch], 0.8, rounds=1, limits=limits, max_loss_increase=9.0, **fields
    )
    sizes = {n: x.weight.numel() for n, x in find_blocks(model).linears().items()}
    most = sum((0.2 if "mlp" in n else 0.9) * size for n, size in sizes.items())
    assert found.budget.sparsity == pytest.approx(most / sum(sizes.values()))
    assert found.achieved() == pytest.approx(found.budget.sparsity)


def test_no_limits_change_nothing() -> None:
    blocks = find_blocks(tiny.make_model("llama"))
    budget = budget_of(blocks, 0.6, AllocationSettings(), SparseGPT())
    np.testing.assert_array_equal(budget.low, 0)
    np.testing.assert_array_equal(budget.high, 0.95)
