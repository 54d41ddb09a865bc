"""The budget is met, bounds and order are kept, whatever comes in."""

import numpy as np
import pytest
from absorb_plugin.budget import check_budget, meet_budget
from absorb_plugin.correction import corrected
from hypothesis import given, settings
from hypothesis import strategies as st

finite = st.floats(allow_nan=False, allow_infinity=False)
unit = st.floats(-2.0, 2.0)
blocks = st.lists(st.tuples(finite, st.integers(1, 10**12)), min_size=1, max_size=12)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[float, float]:
    """S and max_sparsity."""
    highest = draw(st.floats(0.01, 1.0))
    return draw(st.floats(0.0, 1.0, exclude_max=True)) * highest, highest


def assert_budget_met(
    found: np.ndarray, wished: np.ndarray, sizes: np.ndarray, budget: float, top: float
) -> None:
    weights = np.asarray(sizes, dtype=float)
    assert abs(weights @ found / weights.sum() - budget) < 1e-6
    assert (found >= 0).all() and (found <= top).all()
    order = np.argsort(wished, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    for value in np.unique(wished):
        assert len(set(found[wished == value])) == 1


@settings(deadline=None, max_examples=120)
@given(blocks, budgets())
def test_any_base_meets_any_budget(
    given_blocks: list[tuple[float, int]], budget: tuple[float, float]
) -> None:
    wished, sizes = (np.array(column) for column in zip(*given_blocks))
    assert_budget_met(meet_budget(wished, sizes, *budget), wished, sizes, *budget)


@settings(deadline=None, max_examples=120)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), finite, st.integers(1, 10**9)),
        min_size=1,
        max_size=12,
    ),
    budgets(),
    st.floats(-1.0, 1.0),
)
def test_any_correction_meets_any_budget(
    given_blocks: list[tuple[float, float, int]],
    budget: tuple[float, float],
    strength: float,
) -> None:
    base, direction, sizes = (np.array(column) for column in zip(*given_blocks))
    wished = corrected(base, direction, strength)
    assert (np.abs(wished - base) <= abs(strength) + 1e-12).all()
    assert_budget_met(meet_budget(wished, sizes, *budget), wished, sizes, *budget)


def test_what_meets_the_budget_stays_as_it_is() -> None:
    wished = np.array([0.3, 0.5, 0.7])
    np.testing.assert_array_equal(meet_budget(wished, np.ones(3), 0.5, 0.9), wished)


def test_the_rest_is_shared_by_blocks_that_are_not_at_a_bound() -> None:
    found = meet_budget(np.array([2.0, 0.5, 0.4, -1.0]), np.ones(4), 0.5, 0.9)
    np.testing.assert_allclose(found, [0.9, 0.6, 0.5, 0.0])


def test_larger_blocks_count_more() -> None:
    found = meet_budget(np.array([0.2, 0.8]), np.array([3, 1]), 0.5, 1.0)
    np.testing.assert_allclose(found, [0.35, 0.95])


def test_round_numbers_stay_round() -> None:
    """int(columns · s) must not lose a weight to 0.49999…"""
    wished = np.array([0.1 + 0.2, 0.7])
    assert meet_budget(wished, np.ones(2), 0.5).tolist() == [0.3, 0.7]


@pytest.mark.parametrize(
    "wished, sizes, budget, top, message",
    [
        ([0.5], [1], 0.8, 0.7, "cannot be met with max_sparsity=0.7"),
        ([0.5], [1], 1.0, 1.0, r"must be in \[0, 1\)"),
        ([0.5], [1], -0.1, 1.0, r"must be in \[0, 1\)"),
        ([0.5], [1], float("nan"), 1.0, r"must be in \[0, 1\)"),
        ([float("nan")], [1], 0.5, 1.0, "finite"),
        ([0.5, float("inf")], [1, 1], 0.5, 1.0, "finite"),
        ([0.5, 0.5], [1], 0.5, 1.0, "equally long"),
        ([], [], 0.5, 1.0, "non-empty"),
        ([0.5, 0.5], [1, 0], 0.5, 1.0, "positive"),
    ],
)
def test_what_cannot_be_met_is_refused(
    wished: list[float], sizes: list[int], budget: float, top: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        meet_budget(np.array(wished), np.array(sizes), budget, top)


def test_a_budget_at_the_cap_is_met() -> None:
    check_budget(0.9, 0.9)
    assert meet_budget(np.array([0.0, 1.0]), np.ones(2), 0.9, 0.9).tolist() == [0.9] * 2
