"""
The search for the correction, judged on held-out calibration text: never worse there
than the base allocation or than uniform, but for a descent of several stages, whose end
is for the pruner's own judge (`search.confirm`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from absorb_plugin.search.budget import Budget
from absorb_plugin.search.correction import corrected
from absorb_plugin.search.descent import Spreading, Stage, Step, descend_often
from absorb_plugin.search.standard_error import standard_error

__all__ = [
    "Judge",
    "Losses",
    "Measure",
    "Round",
    "SearchResult",
    "Start",
    "beyond",
    "descent_search",
    "gain",
    "line_search",
]

# The negative side is there because a signal can point the wrong way: the noise ratio
# does on some models.
STRENGTHS = (-0.05, 0.05, 0.1, 0.2)
# Losses closer than this, in nats per token, are a tie: the smaller strength wins.
TIE = 1e-3
# Points of a descent's path that are judged.
PARTS = 3

# Where a search may begin.
Start = Literal["base", "uniform"]
# Sums of cross-entropy (candidates, samples), and predicted tokens (samples,).
Losses = tuple[np.ndarray, np.ndarray]
Judge = Callable[[Sequence[np.ndarray]], Losses]
# An allocation -> the direction Δ in which to change it, both of shape (Linears,).
Measure = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Round:
    """
    Of a line search the direction measured and what each strength scored.

    :param direction: Δ of every Linear, shape (N,)
    :param strengths: β tried, 0 included, ascending
    :param losses: held-out cross-entropy in nats per token, one per strength
    :param chosen: the β taken; 0 where none beat the start
    """

    direction: np.ndarray
    strengths: list[float]
    losses: list[float]
    chosen: float


@dataclass(frozen=True)
class SearchResult:
    """
    :param sparsity: the allocation, one sparsity per Linear, shape (N,)
    :param start: "base", or "uniform" where uniform scored better
    :param base_loss: held-out cross-entropy of the base allocation, nats per token
    :param uniform_loss: the same of the uniform allocation
    :param loss: the same of the outcome
    :param direction: Δ of the first round or step, shape (N,)
    :param rounds: the one of a line search
    :param steps: of a descent
    :param judged: number of steps -> held-out loss of the allocation after them
    :param taken: number of steps of a descent that were taken
    """

    sparsity: np.ndarray
    start: Start
    base_loss: float
    uniform_loss: float
    loss: float
    direction: np.ndarray
    rounds: list[Round] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    judged: dict[int, float] = field(default_factory=dict)
    taken: int = 0


def line_search(
    base: np.ndarray, budget: Budget, measure: Measure, judge: Judge
) -> SearchResult:
    """
    From the better of base and uniform along the direction that is measured there. A
    strength is taken only if it beats the start by more than one standard error of the
    paired difference over samples.

    :param base: base allocation that meets the budget, shape (N,)
    :param budget: sizes, S and bounds of the Linears
    :param measure: the signal
    :param judge: the loss of allocations on held-out samples
    """
    found, own, _ = _started(base, budget, judge)
    current = found.sparsity
    direction = measure(current)
    wished = [corrected(current, direction, beta) for beta in STRENGTHS]
    candidates = [budget.whole(budget.meet(one)) for one in wished]
    sums, tokens = judge(candidates)
    best = _choose(own, sums, tokens)
    taken = 0.0 if best is None else STRENGTHS[best]
    done = [_round(direction, own, sums, tokens, taken)]
    if best is not None:
        current, own = candidates[best], sums[best]
    loss = float(own.sum() / tokens.sum())
    return replace(found, sparsity=current, loss=loss, direction=direction, rounds=done)


def descent_search(
    base: np.ndarray,
    budget: Budget,
    stages: Sequence[Stage],
    judge: Judge,
    *,
    groups: Spreading,
    start: Start | None = None,
    times: int = 1,
) -> SearchResult:
    """
    Descend from the better of base and uniform. Of the path of a single stage the best
    of some points on held-out samples is taken, if it beats the start by more than a
    standard error. Where a second stage knows more than the judge, its end is taken.

    :param stages: each from where the one before ended
    :param groups: spreads one number per group over the Linears
    :param start: "base" or "uniform", where it is not for the judge to say
    :param times: descents whose mean is taken, of each stage
    """
    found, own, tokens = _started(base, budget, judge, start)
    descents, current = [], found.sparsity
    for stage in stages:
        descents.append(descend_often(current, budget, stage, groups, times))
        path = [
            budget.meet(current + stage.share * (point - current))
            for point in descents[-1].path
        ]
        current = path[-1]
    made = [step for descent in descents for step in descent.steps]
    found = replace(found, direction=descents[0].direction, steps=made)
    if len(stages) == 1:
        return _best_of_path(found, path, budget, own, tokens, judge)
    return replace(
        found,
        sparsity=budget.whole(current),
        loss=float("nan"),
        judged={0: found.loss},
        taken=len(made),
    )


def _best_of_path(
    found: SearchResult,
    path: Sequence[np.ndarray],
    budget: Budget,
    own: np.ndarray,
    tokens: np.ndarray,
    judge: Judge,
) -> SearchResult:
    """
    :param found: with the start of the path
    :param own: loss sums of that, per sample
    """
    made = len(path) - 1
    points = sorted({made * part // PARTS for part in range(1, PARTS + 1)} - {0})
    if not points:
        return replace(found, judged={0: found.loss})
    candidates = [budget.whole(path[point]) for point in points]
    sums, tokens = judge(candidates)
    means = _means(sums, tokens)
    judged = {0: found.loss} | dict(zip(points, means, strict=True))
    least = int(np.argmin(means))
    won, error = gain(own, sums[least], tokens)
    if not beyond(won, error):
        return replace(found, judged=judged)
    return replace(
        found,
        sparsity=candidates[least],
        loss=means[least],
        judged=judged,
        taken=points[least],
    )


def _started(
    base: np.ndarray, budget: Budget, judge: Judge, start: Start | None = None
) -> tuple[SearchResult, np.ndarray, np.ndarray]:
    """
    The better of base and uniform, or the one asked for, its loss sums, and tokens, per
    sample.
    """
    uniform = budget.uniform()
    sums, tokens = judge([base, uniform])
    base_loss, uniform_loss = _means(sums, tokens)
    better = uniform_loss < base_loss if start is None else start == "uniform"
    found = SearchResult(
        uniform if better else base,
        "uniform" if better else "base",
        base_loss,
        uniform_loss,
        uniform_loss if better else base_loss,
        np.zeros_like(base),
    )
    return found, sums[1] if better else sums[0], tokens


def gain(own: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """
    :param own: loss sums per sample
    :param other: of another allocation, on the same samples
    :return: by how much the other is lower, nats per token, and its standard error
    """
    with np.errstate(invalid="ignore"):  # of two that overflow nothing is known
        difference = own - other
    error = standard_error(difference, tokens)
    return float(difference.sum() / tokens.sum()), float(error)


def beyond(won: float, error: float) -> bool:
    """
    Whether a gain is more than a tie and than its standard error. With one sample that
    is NaN, and any gain beyond a tie counts; a gain that is NaN itself does not.
    """
    return won > TIE and not won <= error


def _round(
    direction: np.ndarray,
    own: np.ndarray,
    sums: np.ndarray,
    tokens: np.ndarray,
    taken: float,
) -> Round:
    losses = dict(zip(STRENGTHS, _means(sums, tokens), strict=True))
    losses[0.0] = float(own.sum() / tokens.sum())
    tried = sorted(losses)
    return Round(direction, tried, [losses[beta] for beta in tried], taken)


def _means(sums: np.ndarray, tokens: np.ndarray) -> list[float]:
    return (sums.sum(axis=1) / tokens.sum()).tolist()


def _choose(own: np.ndarray, sums: np.ndarray, tokens: np.ndarray) -> int | None:
    """Index of the strength to take, None for none."""
    means = sums.sum(axis=1) / tokens.sum()
    if np.isinf(means).all():
        return None
    tied = [i for i, mean in enumerate(means) if mean <= means.min() + TIE]
    best = min(tied, key=lambda i: (abs(STRENGTHS[i]), -STRENGTHS[i]))
    mean, error = gain(own, sums[best], tokens)
    return best if beyond(mean, error) else None
