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
    loss: Loss, direction: np.ndarray = UP, rounds: int = 3, base: np.ndarray = BASE
) -> SearchResult:
    return line_search(
        base, BUDGET, lambda allocation: direction, Text(loss), rounds=rounds
    )


def step(start: np.ndarray, strength: float) -> np.ndarray:
    return BUDGET.meet(corrected(start, UP, strength))


def test_a_correction_that_can_only_harm_gets_strength_zero() -> None:
    found = search(distance_from(BASE))
    np.testing.assert_array_equal(found.sparsity, BASE)
    assert [entry.chosen for entry in found.rounds] == [0.0]
    assert found.start == "base"
    assert found.loss == found.base_loss == 2.0 < found.uniform_loss


def test_a_correction_that_helps_is_taken() -> None:
    found = search(distance_from(step(BASE, 0.1)), rounds=1)
    np.testing.assert_allclose(found.sparsity, step(BASE, 0.1))
    assert found.rounds[0].chosen == 0.1
    assert found.loss == pytest.approx(2.0)


def test_a_signal_turned_round_gets_a_negative_strength() -> None:
    found = search(distance_from(step(BASE, -0.05)), rounds=1)
    assert found.rounds[0].chosen == -0.05
    np.testing.assert_allclose(found.sparsity, step(BASE, -0.05))
    assert found.loss < found.base_loss


def test_uniform_is_the_start_where_it_scores_better() -> None:
    found = search(distance_from(UNIFORM))
    assert found.start == "uniform"
    np.testing.assert_array_equal(found.sparsity, UNIFORM)
    assert found.loss == found.uniform_loss == 2.0 < found.base_loss
    further = search(distance_from(step(UNIFORM, 0.2)), rounds=1)
    assert further.start == "uniform" and further.rounds[0].chosen == 0.2
    np.testing.assert_allclose(further.sparsity, step(UNIFORM, 0.2))


def test_a_tie_goes_to_the_smaller_strength() -> None:
    """All strengths on the positive side help, the larger ones by a hair more."""

    def loss(allocation: np.ndarray) -> float:
        relief = BUDGET.sparsity - float(allocation[0])
        return 2.0 - 0.1 * (relief > 1e-6) - 0.9 * TIE * max(0.0, relief)

    smallest = min(beta for beta in STRENGTHS if beta > 0)
    assert search(loss, rounds=1, base=UNIFORM).rounds[0].chosen == smallest


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

    found = line_search(UNIFORM, BUDGET, lambda a: UP, score, rounds=1)
    mean = found.rounds[0].losses
    assert min(mean) < 2.0 - 10 * TIE  # the mean over all tokens would have taken it
    assert found.rounds[0].chosen == 0.0
    np.testing.assert_array_equal(found.sparsity, UNIFORM)


def test_rounds_start_where_the_last_one_ended() -> None:
    """A round that does not take the largest strength is followed by half of all."""
    measured: list[np.ndarray] = []

    def measure(allocation: np.ndarray) -> np.ndarray:
        measured.append(allocation)
        return UP

    first = step(BASE, 0.2)
    target = step(first, 0.1)
    text = Text(distance_from(target))
    found = line_search(BASE, BUDGET, measure, text, rounds=5)
    assert [entry.chosen for entry in found.rounds] == [0.2, 0.1, 0.0]
    np.testing.assert_allclose(measured, [BASE, first, target])
    np.testing.assert_allclose(found.sparsity, target)
    largest = [max(entry.strengths) for entry in found.rounds]
    assert largest == [0.2, 0.2, 0.1]
    for entry in found.rounds:
        assert entry.strengths == sorted(entry.strengths)
        assert len(entry.losses) == len(entry.strengths)
    # whether the signal points the wrong way shows in the first round
    assert found.rounds[0].strengths == sorted([0.0, *STRENGTHS])
    assert [min(entry.strengths) for entry in found.rounds] == [-0.05, 0.0, 0.0]


def test_the_search_stops_after_a_round_of_zero() -> None:
    text = Text(distance_from(BASE))
    line_search(BASE, BUDGET, lambda a: UP, text, rounds=5)
    assert text.asked == 2  # base and uniform, then one round


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 0.9), min_size=4, max_size=4),
    st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.integers(1, 3),
)
def test_never_worse_than_base_or_uniform(
    wished: list[float], direction: list[float], slope: list[float], rounds: int
) -> None:
    base = BUDGET.meet(np.array(wished))

    def loss(allocation: np.ndarray) -> float:
        return 5 + float(allocation @ np.array(slope)) + float((allocation**2).sum())

    found = search(loss, np.array(direction), rounds, base)
    assert found.loss <= found.base_loss + 1e-12
    assert found.loss <= found.uniform_loss + 1e-12
    assert found.loss == pytest.approx(loss(found.sparsity))
    assert BUDGET.mean(found.sparsity) == pytest.approx(BUDGET.sparsity, abs=1e-6)
