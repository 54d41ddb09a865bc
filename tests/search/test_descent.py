"""The descent: what a step is, and that its outcome is never worse than its start."""

from collections.abc import Callable

import numpy as np
import pytest
from helpers.held_out_text import BASE, BUDGET, SIZES, UNIFORM, Text, distance_from
from hypothesis import given, settings
from hypothesis import strategies as st

from absorb_plugin.search.budget import Budget
from absorb_plugin.search.descent import (
    LENGTHS,
    Descent,
    Slopes,
    Stage,
    descend,
    descend_often,
    shrunk,
)
from absorb_plugin.search.line_search import SearchResult, descent_search

MANY = 60  # Linears


class EachAlone:
    """Every Linear a group of its own, in two blocks."""

    block_of = np.array([0, 0, 1, 1])

    def spread(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values)


class OneBlock(EachAlone):
    """Of many Linears."""

    block_of = np.zeros(MANY, dtype=int)


class Pairs:
    """Two groups of two Linears, each a block."""

    block_of = np.array([0, 1])

    def spread(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values)[[0, 0, 1, 1]]


def late(allocation: np.ndarray) -> np.ndarray:
    """The loss rises least in the last."""
    return SIZES * [3, 1, -1, -2]


def slopes_of(gradient: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """:param gradient: ∂loss/∂s of every Linear"""

    def measure(allocation: np.ndarray) -> Slopes:
        share = SIZES / SIZES.sum()
        mean = gradient(allocation) / share
        return Slopes(mean, np.full(4, np.nan), float(allocation.sum()))

    return measure


def down(
    measure: Callable, text: Text, base: np.ndarray = BASE, rounds: int = 8
) -> SearchResult:
    return descent_search(
        base, BUDGET, [Stage(measure, rounds)], text, groups=EachAlone()
    )


def stepped(
    measure: Callable,
    groups: EachAlone | Pairs,
    rounds: int,
    start: np.ndarray = UNIFORM,
    budget: Budget = BUDGET,
) -> Descent:
    return descend(start, budget, Stage(measure, rounds), groups)


@pytest.mark.parametrize("spread", [2.0, 30.0])
def test_an_exponential_loss_is_brought_to_equal_slopes(spread: float) -> None:
    """However unlike the sensitivities are: the steepest do not hold up the rest."""
    sensitivity = np.geomspace(1 / spread, spread, MANY)
    np.random.default_rng(0).shuffle(sensitivity)

    def slopes(allocation: np.ndarray) -> np.ndarray:
        return sensitivity * np.exp(12 * allocation)

    def measure(allocation: np.ndarray) -> Slopes:
        return Slopes(slopes(allocation), np.full(MANY, np.nan), 0.0)

    sizes = np.full(MANY, 100.0)
    budget = Budget(sizes, 0.6, np.zeros(MANY), np.full(MANY, 0.95))
    found = descend(budget.uniform(), budget, Stage(measure, 12), OneBlock())
    before, after = (np.std(np.log(slopes(x))) for x in found.path[:: len(found.steps)])
    assert after < 0.2 * before


def test_every_step_meets_the_budget_and_goes_downhill() -> None:
    goal = BUDGET.meet(np.array([0.3, 0.8, 0.5, 0.5]))

    def gradient(allocation: np.ndarray) -> np.ndarray:
        return 2 * SIZES * (allocation - goal)

    found = stepped(slopes_of(gradient), EachAlone(), 30, BASE)
    assert len(found.path) == 31 and len(found.steps) == 30
    for allocation in found.path:
        assert BUDGET.mean(allocation) == pytest.approx(BUDGET.sparsity, abs=1e-6)
        assert (allocation >= BUDGET.low).all() and (allocation <= BUDGET.high).all()
    far = [np.sqrt(BUDGET.mean((one - goal) ** 2)) for one in found.path]
    assert far[-1] < 0.5 * far[0] and far[-1] < LENGTHS[-1]


def test_lengths_of_the_steps() -> None:
    """As far as no bound is in the way, each is as long as it should be."""
    wide = BUDGET.at(0.5)
    measure = slopes_of(
        lambda a: SIZES * np.sign(np.sin(1e3 * a.sum()) + [1, -1, 2, -2])
    )
    found = stepped(measure, EachAlone(), 3, np.full(4, 0.5), wide)
    lengths = [step.length for step in found.steps]
    assert lengths[0] == pytest.approx(LENGTHS[0], rel=1e-6)
    assert sorted(lengths, reverse=True) == lengths
    for step, one, two in zip(found.steps, found.path, found.path[1:]):
        assert step.length == pytest.approx(np.sqrt(wide.mean((two - one) ** 2)))
        assert step.largest == pytest.approx(np.abs(two - one).max())


def test_direction_is_that_of_the_first_step() -> None:
    found = stepped(slopes_of(late), EachAlone(), 2)
    moved = found.path[1] - found.path[0]
    np.testing.assert_allclose(
        moved / np.abs(moved).max(), found.direction / np.abs(found.direction).max()
    )
    assert found.direction[0] < 0 < found.direction[3]


def test_linears_of_a_group_move_alike() -> None:
    def measure(allocation: np.ndarray) -> Slopes:
        return Slopes(np.array([1.0, -1.0]), np.full(2, 0.1), 3.0)

    found = stepped(measure, Pairs(), 3)
    for allocation in found.path:
        assert allocation[0] == allocation[1] and allocation[2] == allocation[3]
    assert found.path[-1][0] < found.path[-1][2]
    assert [step.loss for step in found.steps] == [3.0] * 3


def test_a_flat_loss_ends_it() -> None:
    text = Text(distance_from(BASE))
    found = down(slopes_of(lambda a: SIZES * 0.7), text)
    assert found.taken == 0 and found.steps == [] and not found.direction.any()
    np.testing.assert_array_equal(found.sparsity, BASE)
    assert text.asked == 1  # base and uniform


def test_noise_is_shrunk_away_and_differences_are_not() -> None:
    family, random = np.zeros(200, dtype=int), np.random.default_rng(0)
    noise = random.normal(size=200)
    only_noise = shrunk(5 + noise, np.ones(200), family)
    assert np.ptp(only_noise) < 0.5 * np.ptp(noise)
    np.testing.assert_allclose(only_noise.mean(), (5 + noise).mean(), rtol=1e-6)
    clear = shrunk(100 * noise, np.ones(200), family)
    np.testing.assert_allclose(clear, 100 * noise, rtol=1e-2, atol=0.5)
    # what has no error of its own, and families of few, stay as they are
    exact = shrunk(noise, np.full(200, np.nan), family)
    np.testing.assert_allclose(exact, noise)
    few = shrunk(noise[:2], np.full(2, 1e3), np.zeros(2, dtype=int))
    np.testing.assert_array_equal(few, noise[:2])


def test_families_are_shrunk_apart() -> None:
    means = np.array([1.0, 1.1, 0.9, 9.0, 9.1, 8.9])
    found = shrunk(means, np.full(6, 10.0), np.array([0, 0, 0, 1, 1, 1]))
    np.testing.assert_allclose(found, [1.0] * 3 + [9.0] * 3)


def test_what_the_judge_says_of_the_path_decides() -> None:
    """Slopes that lead astray cost nothing: the start stays."""
    text = Text(distance_from(BASE))
    found = down(slopes_of(late), text)
    assert found.taken == 0 and len(found.steps) == 8
    np.testing.assert_array_equal(found.sparsity, BASE)
    assert found.judged[0] == found.loss == found.base_loss
    assert min(list(found.judged)) == 0 and max(found.judged) == 8
    target = stepped(slopes_of(late), EachAlone(), 8, BASE).path[-1]
    found = down(slopes_of(late), Text(distance_from(target)))
    assert found.taken == 8
    np.testing.assert_array_equal(found.sparsity, target)
    assert found.loss == found.judged[8] == pytest.approx(2.0)


def test_a_second_stage_starts_part_of_the_way_and_is_not_judged() -> None:
    """It knows more than the judge; the last comparison may take it back."""
    text, seen = Text(distance_from(BASE)), []

    def back(allocation: np.ndarray) -> np.ndarray:
        seen.append(allocation)
        return -late(allocation)

    stages = [
        Stage(slopes_of(late), 4, share=0.25),
        Stage(slopes_of(back), 2, lengths=(0.02, 0.01)),
    ]
    found = descent_search(BASE, BUDGET, stages, text, groups=EachAlone())
    assert text.asked == 1  # base and uniform
    first = stepped(slopes_of(late), EachAlone(), 4, BASE)
    quarter = BUDGET.meet(BASE + 0.25 * (first.path[-1] - BASE))
    np.testing.assert_allclose(seen[0], quarter)
    second = descend(quarter, BUDGET, stages[1], EachAlone())
    np.testing.assert_allclose(found.sparsity, second.path[-1])
    assert second.steps[0].length == pytest.approx(0.02, rel=1e-3)
    assert found.steps == first.steps + second.steps and found.taken == 6
    np.testing.assert_array_equal(found.direction, first.direction)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 0.9), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.integers(1, 12),
)
def test_never_worse_than_base_or_uniform(
    wished: list[float], told: list[float], slope: list[float], rounds: int
) -> None:
    """Whatever the signal tells."""
    base = BUDGET.meet(np.array(wished))

    def loss(allocation: np.ndarray) -> float:
        return 5 + float(allocation @ np.array(slope)) + float((allocation**2).sum())

    found = down(slopes_of(lambda a: np.array(told)), Text(loss), base, rounds)
    assert found.loss <= min(found.base_loss, found.uniform_loss) + 1e-12
    assert found.loss == pytest.approx(loss(found.sparsity))
    assert BUDGET.mean(found.sparsity) == pytest.approx(BUDGET.sparsity, abs=1e-6)


def noisy(rng: np.random.Generator, error: float) -> Callable:
    """Of an exponential loss, as few samples tell them."""
    sensitivity = np.geomspace(0.3, 3, MANY)

    def measure(allocation: np.ndarray) -> Slopes:
        true = sensitivity * np.exp(8 * allocation)
        noise = error * true * rng.normal(size=MANY)
        return Slopes(true + noise, np.abs(error * true), float(allocation.mean()))

    return measure


def test_the_mean_of_several_descents_is_nearer_to_where_they_lead() -> None:
    sizes = np.geomspace(50.0, 200.0, MANY)
    budget = Budget(sizes, 0.6, np.zeros(MANY), np.full(MANY, 0.95))
    ideal = budget.meet(0.6 - np.log(np.geomspace(0.3, 3, MANY)) / 8)

    def away(times: int, seed: int) -> float:
        stage = Stage(noisy(np.random.default_rng(seed), 1.0), 12)
        end = descend_often(budget.uniform(), budget, stage, OneBlock(), times).path[-1]
        assert budget.mean(end) == pytest.approx(0.6, abs=1e-9)
        return float(np.sqrt(budget.mean((end - ideal) ** 2)))

    once, often = ([away(times, seed) for seed in range(5)] for times in (1, 3))
    assert np.mean(often) < 0.8 * np.mean(once)


def test_the_mean_of_descents_step_by_step() -> None:
    sizes = np.full(MANY, 100.0)
    budget = Budget(sizes, 0.6, np.zeros(MANY), np.full(MANY, 0.95))
    start = budget.uniform()
    stage = Stage(noisy(np.random.default_rng(0), 0.5), 4)
    mean = descend_often(start, budget, stage, OneBlock(), 2)
    again = Stage(noisy(np.random.default_rng(0), 0.5), 4)
    one, other = (descend(start, budget, again, OneBlock()) for _ in range(2))
    for found, *both in zip(mean.path, one.path, other.path, strict=True):
        np.testing.assert_allclose(found, np.mean(both, axis=0), atol=1e-9)
    for step, *both in zip(mean.steps, one.steps, other.steps, strict=True):
        assert step.loss == pytest.approx(np.mean([x.loss for x in both]))
        # what is not common to both is halved
        assert step.length <= max(x.length for x in both)
    np.testing.assert_allclose(mean.direction, (one.direction + other.direction) / 2)
    alone = Stage(noisy(np.random.default_rng(0), 0.5), 4)
    single = descend_often(start, budget, alone, OneBlock(), 1)
    assert all(map(np.array_equal, single.path, one.path))


def test_each_stage_starts_where_the_mean_of_the_one_before_ended() -> None:
    starts: list[np.ndarray] = []

    def measure(allocation: np.ndarray) -> Slopes:
        starts.append(allocation)
        return slopes_of(late)(allocation)

    stages = [Stage(measure, 2, share=0.5), Stage(measure, 1)]
    text = Text(distance_from(UNIFORM))
    descent_search(BASE, BUDGET, stages, text, groups=EachAlone(), times=2)
    assert len(starts) == 6
    assert np.array_equal(starts[0], starts[2]) and np.array_equal(starts[4], starts[5])
    assert not np.array_equal(starts[0], starts[4])
