"""The search along a direction: judged on held-out text, never worse than its start."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from helpers.held_out_text import BASE, BUDGET, TOKENS, UNIFORM, UP, Text, distance_from
from hypothesis import given, settings
from hypothesis import strategies as st

from absorb_plugin.search.correction import corrected
from absorb_plugin.search.line_search import (
    STRENGTHS,
    TIE,
    SearchResult,
    beyond,
    line_search,
)

Loss = Callable[[np.ndarray], float]


def search(
    loss: Loss, direction: np.ndarray = UP, base: np.ndarray = BASE
) -> SearchResult:
    return line_search(base, BUDGET, lambda allocation: direction, Text(loss))


def step(start: np.ndarray, strength: float) -> np.ndarray:
    return BUDGET.meet(corrected(start, UP, strength))


def test_a_correction_that_can_only_harm_gets_strength_zero() -> None:
    found = search(distance_from(BASE))
    np.testing.assert_array_equal(found.sparsity, BASE)
    assert [entry.chosen for entry in found.rounds] == [0.0]
    assert found.start == "base"
    assert found.loss == found.base_loss == 2.0 < found.uniform_loss


def test_a_correction_that_helps_is_taken() -> None:
    found = search(distance_from(step(BASE, 0.1)))
    np.testing.assert_allclose(found.sparsity, step(BASE, 0.1))
    assert found.rounds[0].chosen == 0.1
    assert found.loss == pytest.approx(2.0)


def test_a_signal_turned_round_gets_a_negative_strength() -> None:
    found = search(distance_from(step(BASE, -0.05)))
    assert found.rounds[0].chosen == -0.05
    np.testing.assert_allclose(found.sparsity, step(BASE, -0.05))
    assert found.loss < found.base_loss


def test_uniform_is_the_start_where_it_scores_better() -> None:
    found = search(distance_from(UNIFORM))
    assert found.start == "uniform"
    np.testing.assert_array_equal(found.sparsity, UNIFORM)
    assert found.loss == found.uniform_loss == 2.0 < found.base_loss
    further = search(distance_from(step(UNIFORM, 0.2)))
    assert further.start == "uniform" and further.rounds[0].chosen == 0.2
    np.testing.assert_allclose(further.sparsity, step(UNIFORM, 0.2))


def test_a_tie_goes_to_the_smaller_strength() -> None:
    """All strengths on the positive side help, the larger ones by a hair more."""

    def loss(allocation: np.ndarray) -> float:
        relief = BUDGET.sparsity - float(allocation[0])
        return 2.0 - 0.1 * (relief > 1e-6) - 0.9 * TIE * max(0.0, relief)

    smallest = min(beta for beta in STRENGTHS if beta > 0)
    assert search(loss, base=UNIFORM).rounds[0].chosen == smallest


def test_no_gain_beyond_a_tie_is_no_gain() -> None:
    def loss(allocation: np.ndarray) -> float:
        return 2.0 - 0.9 * TIE * float(allocation[0] < BUDGET.sparsity - 1e-6)

    found = search(loss, base=UNIFORM)
    assert min(found.rounds[0].losses) < 2.0
    assert found.rounds[0].chosen == 0.0


@pytest.mark.parametrize(
    "won, error, counts",
    [
        (0.1, 0.05, True),
        (0.1, 0.1, False),
        (1e-4, 0.0, False),
        (0.1, np.nan, True),
        (np.nan, np.nan, False),
    ],
)
def test_what_counts_as_a_gain(won: float, error: float, counts: bool) -> None:
    assert beyond(won, error) == counts


def test_a_gain_within_its_standard_error_is_no_gain() -> None:
    def score(candidates: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        moved = np.array(
            [c[0] < BUDGET.sparsity - 1e-6 for c in candidates], dtype=float
        )
        # one sample gains much, the others lose
        gains = np.array([-0.1, 0.4, -0.1])
        return (2.0 - moved[:, None] * gains) * TOKENS, TOKENS

    found = line_search(UNIFORM, BUDGET, lambda a: UP, score)
    mean = found.rounds[0].losses
    assert min(mean) < 2.0 - 10 * TIE  # the mean over all tokens would have taken it
    assert found.rounds[0].chosen == 0.0
    np.testing.assert_array_equal(found.sparsity, UNIFORM)


def test_one_direction_from_the_start_and_all_strengths_along_it() -> None:
    measured: list[np.ndarray] = []

    def measure(allocation: np.ndarray) -> np.ndarray:
        measured.append(allocation)
        return UP

    text = Text(distance_from(step(BASE, 0.2)))
    found = line_search(BASE, BUDGET, measure, text)
    np.testing.assert_array_equal(measured, [BASE])
    assert text.asked == 2  # base and uniform, then the strengths
    (entry,) = found.rounds
    assert entry.chosen == 0.2
    assert entry.strengths == sorted([0.0, *STRENGTHS])
    assert len(entry.losses) == len(entry.strengths)
    np.testing.assert_array_equal(found.direction, UP)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 0.9), min_size=4, max_size=4),
    st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_never_worse_than_base_or_uniform(
    wished: list[float], direction: list[float], slope: list[float]
) -> None:
    base = BUDGET.meet(np.array(wished))

    def loss(allocation: np.ndarray) -> float:
        return 5 + float(allocation @ np.array(slope)) + float((allocation**2).sum())

    found = search(loss, np.array(direction), base)
    assert found.loss <= found.base_loss + 1e-12
    assert found.loss <= found.uniform_loss + 1e-12
    assert found.loss == pytest.approx(loss(found.sparsity))
    assert BUDGET.mean(found.sparsity) == pytest.approx(BUDGET.sparsity, abs=1e-6)
