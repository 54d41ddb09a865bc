"""
A line search along the correction, judged on held-out calibration text: never worse
there than the base allocation or than uniform.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from absorb_plugin.search.budget import Budget
from absorb_plugin.search.correction import corrected
from absorb_plugin.search.standard_error import standard_error

__all__ = ["Judge", "Losses", "Measure", "Round", "SearchResult", "gain", "line_search"]

# The negative side is there because a signal can point the wrong way: the noise ratio
# does on some models. Whether it does shows in the first round, so later ones leave it
# out. A round that does not take the largest is near the optimum along its direction,
# and the next one tries half of everything.
STRENGTHS = (-0.05, 0.05, 0.1, 0.2)
# Losses closer than this, in nats per token, are a tie: the smaller strength wins.
TIE = 1e-3

# Sums of cross-entropy (candidates, samples), and predicted tokens (samples,).
Losses = tuple[np.ndarray, np.ndarray]
Judge = Callable[[Sequence[np.ndarray]], Losses]
# An allocation -> the direction Δ in which to change it, both of shape (Linears,).
Measure = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Round:
    """
    One round: the direction measured and what each strength scored.

    :param direction: Δ of every Linear, shape (N,)
    :param strengths: β tried, 0 included, ascending
    :param losses: held-out cross-entropy in nats per token, one per strength
    :param chosen: the β taken; 0 where none beat the start of the round
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
    :param loss: the same of the outcome of all rounds
    """

    sparsity: np.ndarray
    start: str
    base_loss: float
    uniform_loss: float
    loss: float
    rounds: list[Round] = field(default_factory=list)


def line_search(
    base: np.ndarray, budget: Budget, measure: Measure, judge: Judge, *, rounds: int
) -> SearchResult:
    """
    Each round starts from the allocation that the one before chose, and measures its
    direction there. A strength is taken only if it beats the start of the round by more
    than one standard error of the paired difference over samples.

    :param base: base allocation that meets the budget, shape (N,)
    :param budget: sizes, S and bounds of the Linears
    :param measure: the signal
    :param judge: the loss of allocations on held-out samples
    :param rounds: at most so many; the search stops when a round chooses 0
    """
    uniform = budget.uniform()
    sums, tokens = judge([base, uniform])
    base_loss, uniform_loss = _means(sums, tokens)
    start = "uniform" if uniform_loss < base_loss else "base"
    current, own = (uniform, sums[1]) if start == "uniform" else (base, sums[0])
    done: list[Round] = []
    scale = 1.0
    for number in range(rounds):
        direction = measure(current)
        strengths = [beta * scale for beta in STRENGTHS if beta > 0 or number == 0]
        candidates = [
            budget.meet(corrected(current, direction, beta)) for beta in strengths
        ]
        sums, tokens = judge(candidates)
        best = _choose(own, sums, tokens, strengths)
        taken = 0.0 if best is None else strengths[best]
        done.append(_round(direction, strengths, own, sums, tokens, taken))
        if best is None:
            break
        current, own = candidates[best], sums[best]
        if taken < max(strengths):
            scale /= 2
    loss = float(own.sum() / tokens.sum())
    return SearchResult(current, start, base_loss, uniform_loss, loss, done)


def gain(own: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """
    :param own: loss sums per sample
    :param other: of another allocation, on the same samples
    :return: by how much the other is lower, nats per token, and its standard error
    """
    difference = own - other
    error = standard_error(difference, tokens)
    return float(difference.sum() / tokens.sum()), float(error)


def _round(
    direction: np.ndarray,
    strengths: list[float],
    own: np.ndarray,
    sums: np.ndarray,
    tokens: np.ndarray,
    taken: float,
) -> Round:
    losses = dict(zip(strengths, _means(sums, tokens), strict=True))
    losses[0.0] = float(own.sum() / tokens.sum())
    tried = sorted(losses)
    return Round(direction, tried, [losses[beta] for beta in tried], taken)


def _means(sums: np.ndarray, tokens: np.ndarray) -> list[float]:
    return (sums.sum(axis=1) / tokens.sum()).tolist()


def _choose(
    own: np.ndarray, sums: np.ndarray, tokens: np.ndarray, strengths: Sequence[float]
) -> int | None:
    """Index of the strength to take, None for none."""
    means = sums.sum(axis=1) / tokens.sum()
    if np.isinf(means).all():
        return None
    tied = [i for i, mean in enumerate(means) if mean <= means.min() + TIE]
    best = min(tied, key=lambda i: (abs(strengths[i]), -strengths[i]))
    mean, error = gain(own, sums[best], tokens)
    # with one sample the error is NaN, and any gain beyond a tie is taken
    if mean <= TIE or mean <= error:
        return None
    return best
