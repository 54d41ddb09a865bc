"""The budget is met, bounds and order are kept, whatever comes in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from absorb_plugin.search.budget import Budget, check_budget, meet_budget
from absorb_plugin.search.correction import corrected

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
        ([0.5], [1], 0.8, 0.7, "between 0.0000 and 0.7000"),
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
    with pytest.raises(ValueError, match=r"cannot be met with max_sparsity=0\.7"):
        check_budget(0.8, 0.7)


# --- bounds of every Linear its own -----------------------------------------------


@st.composite
def bounded(draw: st.DrawFn) -> tuple[np.ndarray, Budget]:
    """Wishes, and a budget within the bounds of its Linears."""
    rows = draw(
        st.lists(
            st.tuples(finite, st.integers(1, 10**9), st.floats(0, 1), st.floats(0, 1)),
            min_size=1,
            max_size=12,
        )
    )
    wished, sizes, one, two = (np.array(column, dtype=float) for column in zip(*rows))
    low, high = np.minimum(one, two), np.maximum(one, two)
    least, most = sizes @ low / sizes.sum(), sizes @ high / sizes.sum()
    share = draw(st.floats(0, 1))
    sparsity = min(least + share * (most - least), np.nextafter(1, 0))
    return wished, Budget(sizes, float(sparsity), low, high)


@settings(deadline=None, max_examples=200)
@given(bounded())
def test_bounds_of_every_linear_are_kept(drawn: tuple[np.ndarray, Budget]) -> None:
    wished, budget = drawn
    found = budget.meet(wished)
    assert abs(budget.mean(found) - budget.sparsity) < 1e-6
    assert (found >= budget.low).all() and (found <= budget.high).all()
    # in order wherever no bound is in the way
    for i in range(len(found)):
        for j in range(len(found)):
            if wished[i] <= wished[j] and found[i] > found[j]:
                at_low = found[i] - budget.low[i] < 1e-9
                assert at_low or budget.high[j] - found[j] < 1e-9
            alike = budget.low[i] == budget.low[j] and budget.high[i] == budget.high[j]
            if alike and wished[i] == wished[j]:
                assert found[i] == found[j]


@settings(deadline=None, max_examples=100)
@given(bounded(), st.floats(1e-6, 0.5))
def test_bounds_that_leave_the_budget_out_of_reach_say_so(
    drawn: tuple[np.ndarray, Budget], beyond: float
) -> None:
    wished, budget = drawn
    for sparsity in (
        budget.mean(budget.low) - beyond,
        budget.mean(budget.high) + beyond,
    ):
        with pytest.raises(ValueError, match=r"cannot be met: .*leave|must be in"):
            budget.at(sparsity).meet(wished)


def test_budget_of_one_cap() -> None:
    budget = Budget.of(np.array([3, 1]), 0.5, 0.6)
    assert budget.low.tolist() == [0, 0] and budget.high.tolist() == [0.6, 0.6]
    assert budget.uniform().tolist() == [0.5, 0.5]
    assert budget.mean(np.array([0.6, 0.2])) == pytest.approx(0.5)
    assert budget.at(0.3).uniform().tolist() == [0.3, 0.3]
    with pytest.raises(ValueError, match="max_sparsity"):
        Budget.of(np.array([3, 1]), 0.7, 0.6)


def test_uniform_as_far_as_bounds_let_it() -> None:
    low, high = np.array([0.0, 0.0, 0.8]), np.array([0.2, 1.0, 0.9])
    found = Budget(np.ones(3), 0.5, low, high).uniform()
    np.testing.assert_allclose(found, [0.2, 0.5, 0.8])
    found = Budget(np.ones(3), 0.5, low, np.array([0.1, 1.0, 0.9])).uniform()
    np.testing.assert_allclose(found, [0.1, 0.6, 0.8])


@pytest.mark.parametrize("columns", [3, 48, 96, 1536])
def test_a_third_is_a_third_of_every_row(columns: int) -> None:
    (found,) = set(meet_budget(np.full(4, 1 / 3), np.ones(4), 1 / 3, 0.9).tolist())
    assert int(columns * found) == columns // 3
