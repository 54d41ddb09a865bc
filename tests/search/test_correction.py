"""From a signal to a direction, and from a direction to a bounded change."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from absorb_plugin.search.correction import (
    corrected,
    direction_from_ratio,
    direction_from_response,
    relative_slopes,
)


def test_ratio_to_direction() -> None:
    ratio = np.array([9.0, 3.0, 1.0, 1 / 3, 1 / 100])
    direction = direction_from_ratio(ratio)
    # clipped at ln 3 on both sides: the first and the second count alike
    np.testing.assert_allclose(direction, np.log(3) * np.array([-1, -1, 0, 1, 1.0]))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_amplifying_blocks_are_protected(ratio: list[float]) -> None:
    direction = direction_from_ratio(np.array(ratio))
    assert abs(direction.sum()) < 1e-9
    assert (np.diff(direction[np.argsort(ratio)]) <= 1e-12).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_impossible_ratios_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        direction_from_ratio(np.array([1.0, bad]))


def test_response_to_direction() -> None:
    """Blocks whose relief helps most are protected most, outliers cut."""
    response = np.array([*np.arange(20.0), 1e9])
    direction = direction_from_response(response)
    assert abs(direction.sum()) < 1e-9
    assert (np.diff(direction) <= 0).all()
    assert direction[20] == direction[19]
    assert direction[0] == direction[1]
    np.testing.assert_allclose(np.diff(direction[1:20]), -1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_responses_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        direction_from_response(np.array([1.0, bad]))


def test_no_block_moves_by_more_than_the_strength() -> None:
    base = np.array([0.4, 0.5, 0.6])
    direction = np.array([-4.0, 1.0, 3.0])
    np.testing.assert_allclose(corrected(base, direction, 0.1), [0.3, 0.525, 0.675])
    np.testing.assert_allclose(corrected(base, direction, -0.1), [0.5, 0.475, 0.525])
    np.testing.assert_array_equal(corrected(base, direction, 0.0), base)


def test_a_flat_signal_changes_nothing() -> None:
    base = np.array([0.4, 0.6])
    np.testing.assert_array_equal(corrected(base, np.zeros(2), 0.1), base)
    np.testing.assert_array_equal(direction_from_response(np.ones(2)), np.zeros(2))
    np.testing.assert_array_equal(direction_from_ratio(np.ones(2)), np.zeros(2))


def test_base_and_direction_of_one_length() -> None:
    with pytest.raises(ValueError, match="differ"):
        corrected(np.zeros(2), np.zeros(3), 0.1)


def test_slopes_are_taken_relative_to_their_mean() -> None:
    slopes = np.array([2.0, 1.0, 0.5, 0.01, -3.0, 900.0])
    found = relative_slopes(slopes, 1.0)
    tenfold = np.log(10)
    expected = [np.log(2), 0, -np.log(2), -tenfold, -tenfold, tenfold]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(relative_slopes(7 * slopes, 7.0), expected)


@example([1.0], 2e-311)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=9), st.floats(-10, 10))
def test_relative_slopes_are_finite_and_keep_the_order(
    slopes: list[float], mean: float
) -> None:
    found = relative_slopes(np.array(slopes), mean)
    assert np.isfinite(found).all()
    assert (np.diff(found[np.argsort(slopes)]) >= 0).all()


def test_without_any_slope_nothing_moves() -> None:
    assert not relative_slopes(np.zeros(3), 0.0).any()
    with pytest.raises(ValueError, match="must be finite: check the weights"):
        relative_slopes(np.array([1.0, np.nan]), 1.0)
