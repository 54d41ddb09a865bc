"""
Down the slope of the loss in the sparsities, in many short steps of decreasing length.

A step follows the slopes of one round's few samples, which are noisy. Short steps, a
running mean over the rounds and shrinkage towards the mean of the block average that
noise out; a judge in every round, as a line search has, costs as much as the slopes and
follows the noise of its own samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from absorb_plugin.search.budget import Budget
from absorb_plugin.search.correction import winsorised

__all__ = ["LENGTHS", "Descent", "Slopes", "Spreading", "Step", "descend", "refined"]
__all__ += ["shrunk"]

# Root mean square change of a sparsity over all weights, in the first and last step.
LENGTHS = (0.08, 0.03)
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
    measure: Callable[[np.ndarray], Slopes],
    groups: Spreading,
    *,
    rounds: int,
    lengths: tuple[float, float] = LENGTHS,
) -> Descent:
    """
    :param start: an allocation that meets the budget, shape (Linears,)
    :param measure: the slopes under an allocation
    :param groups: spreads one number per group over the Linears; the slopes of a
        block's groups are shrunk towards their mean
    :param rounds: number of steps
    :param lengths: of the first and the last step, geometric between
    """
    found = Descent([start], np.zeros_like(start))
    mean, variance, seen = np.zeros(()), np.zeros(()), 0.0
    for number in range(rounds):
        slopes = measure(found.path[-1])
        mean = MEMORY * mean + (1 - MEMORY) * slopes.mean
        variance = MEMORY**2 * variance + (1 - MEMORY) ** 2 * slopes.error**2
        seen = MEMORY * seen + 1 - MEMORY
        known = shrunk(mean / seen, np.sqrt(variance) / seen, groups.block_of)
        direction = _centred(groups.spread(-winsorised(known)), budget)
        length = _length(number, rounds, lengths)
        size = float(np.sqrt(budget.mean(direction**2)))
        if size == 0.0:
            break
        following = budget.meet(found.path[-1] + direction * (length / size))
        if number == 0:
            found.direction[:] = direction
        change = np.abs(following - found.path[-1])
        made = float(np.sqrt(budget.mean(change**2)))
        found.steps.append(Step(slopes.loss, made, float(change.max())))
        found.path.append(following)
    return found


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
    start: np.ndarray,
    budget: Budget,
    measure: Callable[[np.ndarray], Slopes],
    groups: Spreading,
    *,
    rounds: int,
    length: float = LENGTHS[1],
) -> np.ndarray:
    """
    A descent from what is near the end of one already.

    :param length: of the last step of that one, and the first of this
    """
    lengths = (length, length / 2)
    found = descend(start, budget, measure, groups, rounds=rounds, lengths=lengths)
    return found.path[-1]


def _length(number: int, rounds: int, lengths: tuple[float, float]) -> float:
    first, last = lengths
    return first * (last / first) ** (number / max(1, rounds - 1))
