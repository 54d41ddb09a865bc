"""The last comparison: what the pruner's arithmetic leaves of a search's outcome."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers.held_out_text import (
    BASE,
    BUDGET,
    TOKENS,
    UNIFORM,
    UP,
    Loss,
    Text,
    distance_from,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from absorb_plugin.search.confirm import Confirmed, confirm
from absorb_plugin.search.correction import corrected
from absorb_plugin.search.line_search import TIE
from absorb_plugin.search.rows import Rows

GOAL = BUDGET.meet(corrected(BASE, UP, 0.2))


def halfway(start: np.ndarray) -> np.ndarray:
    return BUDGET.meet((start + GOAL) / 2)


def confirmed(pruner: Loss, base: np.ndarray = BASE) -> tuple[Confirmed, Text]:
    text = Text(pruner)
    return confirm(GOAL, base, BUDGET, text), text


def test_what_is_confirmed_is_kept() -> None:
    found, text = confirmed(distance_from(GOAL))
    assert found.chosen == "searched"
    np.testing.assert_array_equal(found.sparsity, GOAL)
    assert found.losses.keys() == {"base", "uniform", "searched"}
    assert found.losses["searched"] == pytest.approx(2.0)
    assert found.gain == pytest.approx(found.losses["base"] - 2.0)
    assert len(text.seen) == 3 and text.asked == 1


@pytest.mark.parametrize("own", [BASE, UNIFORM], ids=["base", "uniform"])
def test_what_needed_no_search_keeps_its_name(own: np.ndarray) -> None:
    found = confirm(own, BASE, BUDGET, Text(distance_from(own)))
    assert found.chosen == ("base" if own is BASE else "uniform")
    assert found.losses["searched"] == found.loss


def test_what_is_settled_is_kept() -> None:
    text = Text(distance_from(BASE))
    found = confirm(GOAL, BASE, BUDGET, text, settled=True)
    assert found.chosen == "searched" and found.gain < 0
    assert found.losses.keys() == {"base", "uniform", "searched"}
    np.testing.assert_array_equal(found.sparsity, GOAL)


@pytest.mark.parametrize("name", ["base", "uniform"])
def test_what_is_settled_goes_by_its_name(name: str) -> None:
    """In whole weights of a row too, and beside others of as many weights."""
    columns = np.full(len(BASE), 64.0)
    budget = replace(BUDGET, rows=Rows(columns, np.arange(len(BASE))))
    own = {"base": BASE, "uniform": UNIFORM}[name]
    found = budget.whole(own)
    assert not np.array_equal(found, own)
    text = Text(distance_from(found))
    assert confirm(found, BASE, budget, text, settled=True).chosen == name
    for one in text.seen:
        np.testing.assert_array_equal(budget.whole(one), one)


def test_what_is_not_is_taken_back() -> None:
    found, text = confirmed(distance_from(BASE))
    assert found.chosen == "base" and found.gain == 0.0
    np.testing.assert_array_equal(found.sparsity, BASE)
    assert found.losses.keys() == {"base", "uniform", "searched", "halfway"}
    found, text = confirmed(distance_from(UNIFORM))
    assert found.chosen == "uniform" and found.gain > 0
    np.testing.assert_array_equal(found.sparsity, UNIFORM)


@pytest.mark.parametrize("better", [BASE, UNIFORM], ids=["base", "uniform"])
def test_halfway_is_tried_before_all_is_given_up(better: np.ndarray) -> None:
    """Between the better of base and uniform, and what was found."""
    middle = halfway(better)

    def pruner(allocation: np.ndarray) -> float:
        overdone = 3.0 * (np.abs(allocation - GOAL).sum() < 1e-6)
        worse = UNIFORM if better is BASE else BASE
        overdone += np.abs(allocation - worse).sum() < 1e-6
        return distance_from(middle)(allocation) + overdone

    found, text = confirmed(pruner)
    assert found.chosen == "halfway"
    np.testing.assert_array_equal(found.sparsity, middle)
    assert len(text.seen) == 4


def test_halfway_must_win_by_more_than_a_tie_and_its_error() -> None:
    middle = halfway(BASE)

    def hardly(allocation: np.ndarray) -> float:
        if np.abs(allocation - middle).sum() < 1e-6:
            return 2.0 - 0.9 * TIE
        return 2.0 + float(np.abs(allocation - BASE).sum())

    assert confirmed(hardly)[0].chosen == "base"

    def judge(candidates: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        sums, tokens = Text(distance_from(BASE))(candidates)
        for row, one in zip(sums, candidates, strict=True):
            if np.abs(one - middle).sum() < 1e-6:
                row[:] = (2.0 - np.array([-0.1, 0.4, -0.1])) * TOKENS
        return sums, tokens

    found = confirm(GOAL, BASE, BUDGET, judge)
    assert found.losses["halfway"] < found.losses["base"] - 10 * TIE
    assert found.chosen == "base"


def test_equal_allocations_are_judged_once() -> None:
    text = Text(distance_from(UNIFORM))
    found = confirm(GOAL, UNIFORM, BUDGET, text)
    assert found.losses["base"] == found.losses["uniform"]
    assert len(text.seen) == 2 + 1  # halfway


@pytest.mark.parametrize(
    "better, expected",
    [(BASE, "base"), (UNIFORM, "uniform"), ((BASE + UNIFORM) / 2, None)],
)
def test_which_start_the_pruner_prefers(
    better: np.ndarray, expected: str | None
) -> None:
    found, _ = confirmed(distance_from(better))
    assert found.start == expected


def test_where_all_overflow_the_search_has_not_won() -> None:
    def judge(candidates: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(candidates), 2), np.inf), np.array([5, 5])

    assert confirm(GOAL, BASE, BUDGET, judge).chosen == "base"


def test_an_overflow_loses() -> None:
    def pruner(allocation: np.ndarray) -> float:
        return 2.0 if np.abs(allocation - BASE).sum() < 1e-6 else float("inf")

    found, _ = confirmed(pruner)
    np.testing.assert_array_equal(found.sparsity, BASE)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 0.9), min_size=4, max_size=4),
    st.lists(st.floats(0, 0.9), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_never_worse_than_base_or_uniform(
    wished: list[float], outcome: list[float], slope: list[float]
) -> None:
    base, found = (BUDGET.meet(np.array(one)) for one in (wished, outcome))

    def loss(allocation: np.ndarray) -> float:
        return 5 + float(allocation @ np.array(slope)) + float((allocation**2).sum())

    taken = confirm(found, base, BUDGET, Text(loss))
    final = loss(taken.sparsity)
    assert final <= min(loss(base), loss(BUDGET.uniform())) + 1e-9
    assert taken.losses[taken.chosen] == pytest.approx(final)
    assert taken.gain == pytest.approx(loss(base) - final, abs=1e-9)
