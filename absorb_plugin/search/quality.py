"""The largest budget whose loss stays within a bound."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

__all__ = ["LEAST", "RESOLUTION", "Point", "Quality", "largest_budget"]

# Budgets are told apart to this, and none below LEAST is tried.
RESOLUTION = 0.005
LEAST = 0.05


@dataclass(frozen=True)
class Point:
    """
    :param sparsity: S
    :param allocation: one sparsity per Linear, shape (N,)
    :param increase: of the loss over the dense model, nats per token
    :param error: standard error of that over samples; NaN for one sample
    """

    sparsity: float
    allocation: np.ndarray
    increase: float
    error: float

    @property
    def cautious(self) -> float:
        """The increase and one standard error."""
        return self.increase + (0.0 if math.isnan(self.error) else self.error)


@dataclass(frozen=True)
class Quality:
    """
    :param bound: on the increase of the loss and one standard error, nats per token
    :param points: all budgets tried, in that order
    :param found: the one taken
    """

    bound: float
    found: Point
    points: list[Point] = field(default_factory=list)


def largest_budget(
    bound: float,
    upper: float,
    allocate: Callable[[float, np.ndarray | None], np.ndarray],
    judge: Callable[[np.ndarray], tuple[float, float]],
    least: float = 0.0,
) -> Quality:
    """
    Bisection between budgets that keep the bound and budgets that break it. Where both
    sides are known the next one lies where the logarithm of the increase, which is
    nearly straight in the sparsity, meets the bound.

    :param bound: the largest increase
    :param upper: the largest budget
    :param allocate: (budget, allocation of the nearest budget known, or None) -> an
        allocation of that budget
    :param judge: an allocation -> increase of the loss and its standard error
    :param least: the smallest budget that can be had
    :raises ValueError: if even that, or LEAST, breaks the bound
    """
    points: list[Point] = []

    def ask(sparsity: float) -> Point:
        near = min(points, key=lambda p: abs(p.sparsity - sparsity), default=None)
        start = None if near is None else near.allocation
        allocation = allocate(sparsity, start)
        points.append(Point(sparsity, allocation, *judge(allocation)))
        return points[-1]

    most = ask(upper)
    if most.cautious <= bound:
        return Quality(bound, most, points)
    kept: Point | None = None
    broken = most
    floor = min(max(LEAST, least), upper)
    while True:
        low = floor if kept is None else kept.sparsity
        if broken.sparsity - low <= RESOLUTION + 1e-9:
            break
        point = ask(_next(low, kept, broken, bound))
        if point.cautious <= bound:
            kept = point
        else:
            broken = point
    if kept is None and broken.sparsity > floor:
        point = ask(floor)
        kept = point if point.cautious <= bound else None
    if kept is None:
        last = points[-1]
        fewer = ", or lower limits" if least > LEAST else ""
        raise ValueError(
            f"max_loss_increase={bound:g} cannot be kept: at a sparsity of "
            f"{last.sparsity:.4g} already the loss grows by {last.increase:.4g} ± "
            f"{last.error:.2g} nats per token. Raise it above {last.cautious:.4g}, or "
            f"take more calibration samples, whose standard error is smaller{fewer}"
        )
    return Quality(bound, kept, points)


def _next(low: float, kept: Point | None, broken: Point, bound: float) -> float:
    """A multiple of the resolution strictly between the two sides."""
    share = 0.5
    if kept is not None and kept.cautious > 0:
        rise = math.log(broken.cautious / kept.cautious)
        share = math.log(bound / kept.cautious) / rise if rise > 0 else 0.5
        share = min(0.9, max(0.1, share))
    steps = round((broken.sparsity - low) / RESOLUTION * share)
    last = math.ceil((broken.sparsity - low) / RESOLUTION - 1e-9) - 1
    at = low + RESOLUTION * min(max(1, steps), max(1, last))
    return round(at / RESOLUTION) * RESOLUTION if low > 0 else at
