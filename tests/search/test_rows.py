"""Allocations in whole weights of a row."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from absorb_plugin.search.budget import Budget, OutOfReach
from absorb_plugin.search.present import LinearZeros, PresentZeros
from absorb_plugin.search.rows import Rows


def with_zeros(
    budget: Budget,
    rows: np.ndarray,
    columns: np.ndarray,
    groups: np.ndarray,
    draw: st.DrawFn,
) -> Budget:
    """The same for Linears with zeros, of each row some whole weights."""
    random = np.random.default_rng(draw(st.integers(0, 9)))
    most = draw(st.integers(0, 4)) / 10
    zeros = [
        LinearZeros.of(np.floor(most * random.random(n) * c) / c, np.ones(n))
        for n, c in zip(rows, columns, strict=True)
    ]
    # of a pruner that leaves no Linear with fewer than it has, or of one that may
    kept = draw(st.booleans())
    share = np.array([np.mean(one.shares) if kept else one.shares[0] for one in zeros])
    low = np.array([share[groups == group].max() for group in groups])
    try:
        found = budget.above(low, PresentZeros(zeros))
    except OutOfReach:
        reject()
    return found


@st.composite
def drawn(draw: st.DrawFn) -> tuple[np.ndarray, Budget]:
    """An allocation that meets a budget; groups of one or two Linears."""
    count = draw(st.integers(2, 14))
    groups = np.arange(count) // draw(st.sampled_from([1, 2]))
    lengths = st.integers(2, 300)
    by_group = np.array(draw(st.lists(lengths, min_size=count, max_size=count)))
    columns = by_group[groups].astype(float)
    rows = np.array(draw(st.lists(lengths, min_size=count, max_size=count)))
    wishes = st.lists(st.floats(0, 1), min_size=count, max_size=count)
    wished = np.array(draw(wishes))[groups]
    high = draw(st.floats(0.3, 1.0) | st.just(1.0))
    sparsity = high * draw(st.floats(0.0, 0.99))
    budget = Budget.of(rows * columns, sparsity, high)
    least = st.lists(st.floats(0, sparsity), min_size=count, max_size=count)
    if draw(st.booleans()):
        budget = budget.within(np.array(draw(least))[groups], budget.high)
    if draw(st.booleans()):
        budget = with_zeros(budget, rows, columns, groups, draw)
    budget = replace(budget, rows=Rows(columns, groups))
    return budget.meet(wished), budget


@settings(deadline=None, max_examples=300)
@given(drawn())
def test_the_budget_is_met_on_paper_and_by_whole_weights(
    case: tuple[np.ndarray, Budget],
) -> None:
    before, budget = case
    assert budget.rows is not None
    found = budget.whole(before)
    assert budget.achieved(found) == pytest.approx(budget.sparsity, abs=1e-8)
    assert (found >= budget.low).all() and (found <= budget.high).all()
    for group in np.unique(budget.rows.groups):
        assert np.ptp(found[budget.rows.groups == group]) == 0
    # no worse than before, but for the digits that are rounded away
    taken, before_taken = (
        budget.achieved(budget.rows.taken(one)) for one in (found, before)
    )
    assert abs(taken - budget.sparsity) <= abs(before_taken - budget.sparsity) + 1e-9
    if budget.high[0] < 1 or budget.low.any():  # where nothing is in the way:
        return
    # a weight more or less than asked, and what the final shift moves
    moved = budget.rows.columns * np.abs(found - before)
    shift = budget.sizes / budget.rows.columns / budget.sizes.sum()
    assert (moved <= 1.01 + 4 * budget.rows.columns * shift.max()).all()


def test_what_rows_lose_is_made_up_for() -> None:
    generator = np.random.default_rng(0)
    columns = generator.choice([64.0, 172.0], 35)
    budget = Budget.of(64 * columns, 0.5, 0.95)
    budget = replace(budget, rows=Rows(columns, np.arange(35)))
    before = budget.meet(generator.normal(0.5, 0.1, 35))
    for allocation, least, most in (
        (before, 3e-3, 1e-2),
        (budget.whole(before), 0.0, 3e-4),
    ):
        # what llm-compressor takes of each row
        taken = [int(c * s) for c, s in zip(columns, allocation, strict=True)]
        share = sum(taken) * 64 / budget.sizes.sum()
        assert least <= 0.5 - share <= most
        assert budget.mean(allocation) == pytest.approx(0.5, abs=1e-9)
    # in order where rows are as long
    order = np.lexsort((before, columns))
    for one, next_one in zip(order, order[1:]):
        if columns[one] == columns[next_one]:
            assert budget.whole(before)[one] <= budget.whole(before)[next_one] + 1e-12


def test_what_comes_near_enough_stays_as_it_is() -> None:
    wished = np.array([0.5, 0.600000003, 0.7])
    for columns in (np.array([4096.0, 14336.0, 4096.0]), None):
        rows = None if columns is None else Rows(columns, np.arange(3))
        budget = replace(Budget.of(np.ones(3), 0.6, 0.95), rows=rows)
        met = budget.meet(wished)
        assert budget.whole(met) is met


def test_a_cap_is_kept() -> None:
    budget = Budget.of(np.full(4, 640.0), 0.5, 0.55)
    budget = replace(budget, rows=Rows(np.full(4, 10.0), np.arange(4)))
    found = budget.whole(np.array([0.55, 0.55, 0.48, 0.42]))
    assert found.max() <= 0.55
    assert budget.rows.taken(found).tolist() == [0.5, 0.5, 0.5, 0.4]


def test_what_a_cap_cuts_off_goes_elsewhere() -> None:
    """Most are capped between two whole weights of a row; the others have room."""
    columns = np.full(12, 64.0)
    budget = Budget.of(64 * columns, 0.6, 0.62)
    budget = replace(budget, rows=Rows(columns, np.arange(12)))
    before = budget.meet(np.array([0.5, 0.51, 0.52, *[0.7] * 9]))
    found = budget.whole(before)
    taken = budget.rows.taken(found)
    assert found.max() <= 0.62
    assert 0 <= 0.6 - budget.mean(taken) < 1 / 64 / 12
    assert 0.6 - budget.mean(budget.rows.taken(before)) > 0.005
    assert (taken[:3] > before[:3] + 1 / 64).any()  # by more than one weight
