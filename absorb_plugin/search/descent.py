"""
Down the slope of the loss in the sparsities, in many short steps of decreasing length.

A step goes by the logarithms of the slopes, so that all of them become equal. They are
of one round's few samples, and noisy. Short steps, a running mean over the rounds and
shrinkage towards the mean of the block average that noise out; a judge in every round,
as a line search has, costs as much as the slopes and follows the noise of its own
samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from absorb_plugin.search.budget import Budget
from absorb_plugin.search.correction import relative_slopes

__all__ = [
    "LENGTHS",
    "Descent",
    "Slopes",
    "Spreading",
    "Stage",
    "Step",
    "descend",
    "descend_often",
    "refined",
    "shrunk",
]

# Root mean square change of a sparsity over all weights, in the first and last step.
LENGTHS = (0.06, 0.01)
# Weight of what was known before in the running mean of the slopes.
MEMORY = 0.5
# Groups of a family needed to tell their spread from their noise.
FEW = 3


class Spreading(Protocol):
    """Of `Groups`, what a descent needs."""

    @property
    def block_of(self) -> np.ndarray:
        """Index of each group's block, shape (G,)."""

    def spread(self, values: np.ndarray) -> np.ndarray:
        """(G,) -> (Linears,)"""


@dataclass(frozen=True)
class Slopes:
    """
    ∂loss/∂s of every group, per share of all weights: that of the whole group by the
    group's share of the weights.

    :param mean: nats per token, shape (G,)
    :param error: standard error over samples, shape (G,); NaN where it is not known
    :param loss: cross-entropy where it was measured, nats per token
    """

    mean: np.ndarray
    error: np.ndarray
    loss: float


@dataclass(frozen=True)
class Stage:
    """
    A descent, and the fraction of its path that is taken.

    :param measure: the slopes of every group under an allocation
    :param rounds: number of steps
    :param lengths: of the first and the last step, geometric between
    :param share: of the way from its start to its end, between 0 and 1
    """

    measure: Callable[[np.ndarray], Slopes]
    rounds: int
    lengths: tuple[float, float] = LENGTHS
    share: float = 1.0


@dataclass(frozen=True)
class Step:
    """
    :param loss: calibration loss before the step, nats per token; each step is measured
        on other samples
    :param length: root mean square change of a sparsity over all weights
    :param largest: largest change of one
    """

    loss: float
    length: float
    largest: float


@dataclass(frozen=True)
class Descent:
    """
    :param path: allocations before the first and after every step, each (Linears,)
    :param direction: Δ of the first step, shape (Linears,)
    """

    path: list[np.ndarray]
    direction: np.ndarray
    steps: list[Step] = field(default_factory=list)


def descend(
    start: np.ndarray,
    budget: Budget,
    stage: Stage,
    groups: Spreading,
) -> Descent:
    """
    :param start: an allocation that meets the budget, shape (Linears,)
    :param stage: what is measured, and how far each step goes
    :param groups: spreads one number per group over the Linears; the slopes of a
        block's groups are shrunk towards their mean
    """
    found = Descent([start], np.zeros_like(start))
    mean, variance, seen = np.zeros(()), np.zeros(()), 0.0
    for number in range(stage.rounds):
        slopes = stage.measure(found.path[-1])
        mean = MEMORY * mean + (1 - MEMORY) * slopes.mean
        variance = MEMORY**2 * variance + (1 - MEMORY) ** 2 * slopes.error**2
        seen = MEMORY * seen + 1 - MEMORY
        known = shrunk(mean / seen, np.sqrt(variance) / seen, groups.block_of)
        spread = groups.spread(known)
        direction = _centred(-relative_slopes(spread, budget.mean(spread)), budget)
        length = _length(number, stage)
        size = float(np.sqrt(budget.mean(direction**2)))
        if size == 0.0:
            break
        following = budget.meet(found.path[-1] + direction * (length / size))
        if number == 0:
            found.direction[:] = direction
        found.steps.append(_step(slopes.loss, found.path[-1], following, budget))
        found.path.append(following)
    return found


def descend_often(
    start: np.ndarray, budget: Budget, stage: Stage, groups: Spreading, times: int
) -> Descent:
    """
    The mean of several descents from one start, each by samples of its own: where a
    single one ends is in part what its samples happened to say, and that averages out.
    """
    found = [descend(start, budget, stage, groups) for _ in range(times)]
    if times == 1:
        return found[0]
    points = zip(*(one.path for one in found), strict=False)
    path = [budget.meet(np.mean(point, axis=0)) for point in points]
    path[0] = start
    steps = []
    for number, same in enumerate(zip(*(one.steps for one in found), strict=False)):
        loss = float(np.mean([step.loss for step in same]))
        steps.append(_step(loss, path[number], path[number + 1], budget))
    return Descent(path, np.mean([one.direction for one in found], axis=0), steps)


def shrunk(mean: np.ndarray, error: np.ndarray, families: np.ndarray) -> np.ndarray:
    """
    Empirical Bayes: each slope moves towards the mean of its family, the more the
    larger its error is beside the spread of the family's true slopes.

    :param mean: slopes, shape (G,)
    :param error: their standard errors, shape (G,); one that is NaN counts as 0
    :param families: shape (G,)
    """
    noise, found = np.nan_to_num(error) ** 2, mean.copy()
    for family in np.unique(families):
        own = families == family
        if own.sum() < FEW:
            continue
        centre = mean[own].mean()
        deviation = mean[own] - centre
        true = max(0.0, float((deviation**2).mean() - noise[own].mean()))
        total = true + noise[own]
        share = np.divide(true, total, out=np.ones_like(total), where=total > 0)
        found[own] = centre + deviation * share
    return found


def _centred(direction: np.ndarray, budget: Budget) -> np.ndarray:
    return direction - budget.mean(direction)


def refined(
    start: np.ndarray, budget: Budget, stage: Stage, groups: Spreading
) -> np.ndarray:
    """
    From what is near the end of a descent already: a few steps more, from the length of
    its last one on.

    :param stage: the descent's last
    """
    last = stage.lengths[1]
    rounds = max(1, stage.rounds // 4)
    more = replace(stage, rounds=rounds, lengths=(last, last / 2), share=1.0)
    return descend(start, budget, more, groups).path[-1]


def _step(loss: float, before: np.ndarray, after: np.ndarray, budget: Budget) -> Step:
    change = np.abs(after - before)
    return Step(loss, float(np.sqrt(budget.mean(change**2))), float(change.max()))


def _length(number: int, stage: Stage) -> float:
    first, last = stage.lengths
    return first * (last / first) ** (number / max(1, stage.rounds - 1))
