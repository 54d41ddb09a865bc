"""The largest budget that keeps a bound, on loss curves that are known."""

import math
import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from absorb_plugin.search.quality import LEAST, RESOLUTION, Quality, largest_budget


class Model:
    """
    Its loss grows as scale·(exp(steep·s) − 1), known to `error`; roughly it is told as
    `rough` times that.
    """

    def __init__(
        self, scale: float, steep: float, error: float = 0.0, rough: float = 1.3
    ) -> None:
        self.scale, self.steep, self.error = scale, steep, error
        self.rough = rough
        self.asked: list[float] = []
        self.starts: list[float | None] = []

    def increase(self, sparsity: float) -> float:
        return self.scale * math.expm1(self.steep * sparsity)

    def allocate(self, sparsity: float, near: np.ndarray | None) -> np.ndarray:
        self.starts.append(None if near is None else float(near[0]))
        return np.array([sparsity])

    def judge(self, allocation: np.ndarray) -> tuple[float, float]:
        self.asked.append(float(allocation[0]))
        return self.increase(float(allocation[0])), self.error

    def scan(self, sparsities: Sequence[float]) -> list[float]:
        return [self.rough * self.increase(s) for s in sparsities]

    def search(self, bound: float, upper: float = 0.8, least: float = 0.0) -> Quality:
        return largest_budget(bound, upper, self.allocate, self.judge, self.scan, least)


@settings(deadline=None, max_examples=200)
@given(
    st.floats(1e-3, 0.5),
    st.floats(0.5, 12),
    st.floats(1e-3, 2),
    st.floats(0.1, 0.95),
    st.sampled_from([0.0, 0.1, 1.0, 1.3, 5.0, math.inf]),
)
def test_the_bound_is_kept_and_a_step_more_breaks_it(
    scale: float, steep: float, bound: float, upper: float, rough: float
) -> None:
    model = Model(scale, steep, rough=rough)
    if model.increase(min(LEAST, upper)) > bound:
        with pytest.raises(ValueError, match="cannot be kept"):
            model.search(bound, upper)
        return
    found = model.search(bound, upper).found.sparsity
    assert model.increase(found) <= bound
    if found < upper:
        assert model.increase(found + RESOLUTION + 1e-9) > bound or found == LEAST
    most = 14 if rough == math.inf else 12  # from LEAST on, told nothing
    assert len(model.asked) == len(set(model.asked)) <= most
    if 1.0 <= rough <= 1.3:  # a curve as masks give it
        assert len(model.asked) <= 7


@settings(deadline=None, max_examples=200)
@given(st.floats(0.05, 4), st.floats(0.05, 4), st.floats(1e-2, 1), st.floats(0.3, 0.95))
def test_no_less_than_what_needs_no_search(
    base: float, uniform: float, bound: float, upper: float
) -> None:
    """:param base: by how much it costs more than what is searched"""
    model = Model(0.02, 6)
    worse = {"base": base, "uniform": uniform}
    rivals = {
        name: partial(lambda factor, s: np.array([s, factor]), factor)
        for name, factor in worse.items()
    }

    def judge(allocation: np.ndarray) -> tuple[float, float]:
        factor = allocation[1] if len(allocation) > 1 else 1.0
        return factor * model.increase(float(allocation[0])), 0.0

    least = min(1.0, base, uniform)
    if least * model.increase(LEAST) > bound:
        told = f"above {least * model.increase(LEAST):.4g}"
        with pytest.raises(ValueError, match=re.escape(told)):
            largest_budget(
                bound, upper, model.allocate, judge, model.scan, rivals=rivals
            )
        return
    quality = largest_budget(
        bound, upper, model.allocate, judge, model.scan, rivals=rivals
    )
    found = quality.found
    assert judge(found.allocation)[0] <= bound
    for factor in (1.0, base, uniform):
        more = found.sparsity + RESOLUTION + 1e-9
        assert more > upper or factor * model.increase(more) > bound
    assert (found.name == "searched") == (len(found.allocation) == 1)


@settings(deadline=None, max_examples=300)
@given(st.floats(0, 0.6), st.floats(1e-4, 3), st.floats(0.5, 12))
def test_it_ends_whatever_the_least_budget(
    least: float, bound: float, steep: float
) -> None:
    """Limits and zeros that are there make it any number."""
    model = Model(1.0, steep)
    found = None
    try:
        found = model.search(bound, 0.6, least)
    except ValueError as error:
        assert "cannot be kept" in str(error)
    assert len(model.asked) == len(set(model.asked)) <= 14
    lowest = min(0.6, max(LEAST, least))
    assert all(lowest - 1e-9 <= asked <= 0.6 for asked in model.asked)
    assert (found is None) == (model.increase(lowest) > bound)


def test_an_upper_budget_that_keeps_it_is_taken_at_once() -> None:
    model = Model(0.01, 1.0)
    found = model.search(0.5)
    assert found.found.sparsity == 0.8 and model.asked == [0.8]
    assert found.points == [found.found]


def test_every_budget_starts_from_its_nearest_neighbour() -> None:
    model = Model(0.05, 5.0)
    model.search(0.1)
    assert model.starts[0] is None and len(model.asked) > 2
    for number, start in enumerate(model.starts[1:], start=1):
        here = model.asked[number]
        assert start == min(model.asked[:number], key=lambda s: abs(s - here))


def test_the_bound_holds_with_a_standard_error() -> None:
    sure, unsure = Model(0.05, 5.0), Model(0.05, 5.0, error=0.05)
    found = unsure.search(0.1).found
    assert found.sparsity < sure.search(0.1).found.sparsity
    assert found.increase + 0.05 <= 0.1


def test_one_sample_has_no_error_to_keep() -> None:
    found = Model(0.05, 5.0, error=math.nan).search(0.1).found
    assert found.increase <= 0.1


def test_what_cannot_be_kept_says_what_would() -> None:
    model = Model(1.0, 5.0, error=0.01)
    with pytest.raises(ValueError, match="max_loss_increase=0.01 cannot") as told:
        model.search(0.01)
    needed = model.increase(LEAST) + 0.01
    assert f"above {needed:.4g}" in str(told.value)
    assert model.asked[-1] == LEAST


@pytest.mark.parametrize("threshold", [0.07, 0.2, 0.38, 0.5])
def test_a_loss_that_overflows_breaks_the_bound(threshold: float) -> None:
    model = Model(0.05, 5.0)
    judge = model.judge

    def overflowing(allocation: np.ndarray) -> tuple[float, float]:
        increase, error = judge(allocation)
        far = allocation[0] > threshold
        return (math.inf, math.nan) if far else (increase, error)

    model.judge = overflowing  # type: ignore[method-assign]
    found = model.search(0.3).found
    assert model.increase(found.sparsity) <= 0.3
    lowest = min(threshold, math.log1p(0.3 / 0.05) / 5)
    assert found.sparsity > lowest - RESOLUTION - 1e-9 and len(model.asked) <= 9
