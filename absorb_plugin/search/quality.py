"""The largest budget whose loss stays within a bound."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import numpy as np

__all__ = ["LEAST", "RESOLUTION", "SEARCHED", "Point", "Quality", "QuantizationCost"]
__all__ += ["largest_budget"]

SEARCHED = "searched"

# Budgets are told apart to this, and none below LEAST is tried.
RESOLUTION = 0.005
LEAST = 0.05
# The cheap curve: the distance of its points, increases that a logarithm is taken of,
# and how steep it may be believed to be, per unit of sparsity.
SCANNED = 0.1
TINY, HUGE = 1e-3, 1e6
STEEP = (4.0, 20.0)
# How far beyond it the first budget lies, and the next from that at most.
AHEAD = 0.02
AT_ONCE = 0.05


@dataclass(frozen=True)
class Point:
    """
    :param sparsity: S
    :param allocation: one sparsity per Linear, shape (N,)
    :param increase: of the loss over the dense model, nats per token
    :param error: standard error of that over samples; NaN for one sample
    :param name: of the allocation: "searched", "base" or "uniform"
    """

    sparsity: float
    allocation: np.ndarray
    increase: float
    error: float
    name: str = SEARCHED

    @property
    def cautious(self) -> float:
        """The increase and one standard error."""
        return self.increase + (0.0 if math.isnan(self.error) else self.error)


@dataclass(frozen=True)
class QuantizationCost:
    """
    What the quantisation that follows costs where nothing is pruned.

    :param modifiers: class names of what quantises, or prepares it
    :param increase: of the loss over the dense model, nats per token
    :param error: as of `Point`
    """

    modifiers: tuple[str, ...]
    increase: float
    error: float

    def __str__(self) -> str:
        return (
            f"the quantisation by {' and '.join(self.modifiers)} alone costs "
            f"{self.increase:.4g} ± {self.error:.2g} nats per token"
        )


@dataclass(frozen=True)
class Quality:
    """
    :param bound: on the increase of the loss and one standard error, nats per token
    :param points: all budgets tried, in that order
    :param found: the one taken
    :param quantization: that every increase is with; None where none follows
    """

    bound: float
    found: Point
    points: list[Point] = field(default_factory=list)
    quantization: QuantizationCost | None = None


def largest_budget(
    bound: float,
    upper: float,
    allocate: Callable[[float, np.ndarray | None], np.ndarray],
    judge: Callable[[np.ndarray], tuple[float, float]],
    scan: Callable[[Sequence[float]], Sequence[float]],
    least: float = 0.0,
    rivals: Mapping[str, Callable[[float], np.ndarray]] = MappingProxyType({}),
    quantization: QuantizationCost | None = None,
) -> Quality:
    """
    The first budget is tried where a cheap curve meets the bound, others around it,
    until one that keeps the bound and one that breaks it are a resolution apart. The
    logarithm of the increase is nearly straight in the sparsity. Then allocations that
    need no search are asked whether they bear more.

    :param bound: the largest increase
    :param upper: the largest budget
    :param allocate: (budget, allocation of the nearest budget known, or None) -> an
        allocation of that budget
    :param judge: an allocation -> increase of the loss and its standard error
    :param scan: budgets -> increase of the loss, roughly and without a correction
    :param least: the smallest budget that can be had
    :param rivals: name -> budget -> another allocation
    :param quantization: that `judge` and `scan` reckon with
    :raises ValueError: if even that, or LEAST, breaks the bound
    """
    floor = min(max(LEAST, least), upper)
    points: list[Point] = []

    def searched(sparsity: float) -> np.ndarray:
        known = [point for point in points if point.name == SEARCHED]
        near = min(known, key=lambda p: abs(p.sparsity - sparsity), default=None)
        return allocate(sparsity, None if near is None else near.allocation)

    def ask(name: str, sparsity: float) -> Point:
        allocation = rivals.get(name, searched)(sparsity)
        points.append(Point(sparsity, allocation, *judge(allocation), name))
        return points[-1]

    first, slope = _first(bound, floor, upper, scan)
    climb = partial(_climb, bound=bound, slope=slope, floor=floor, upper=upper)
    kept = climb(partial(ask, SEARCHED), first, None)
    for name in rivals:
        beyond = floor
        if kept is not None:
            beyond = min(upper, round(kept.sparsity + RESOLUTION, 6))
        if kept is None or kept.sparsity < upper:
            kept = climb(partial(ask, name), beyond, kept)
    if kept is not None:
        return Quality(bound, kept, points, quantization)
    last = min(
        (point for point in points if point.sparsity <= floor),
        key=lambda point: point.cautious,
    )
    fewer = ", or lower limits" if least > LEAST else ""
    of_that = f" ({quantization})" if quantization is not None else ""
    raise ValueError(
        f"max_loss_increase={bound:g} cannot be kept: at a sparsity of "
        f"{last.sparsity:.4g} already the loss grows by {last.increase:.4g} ± "
        f"{last.error:.2g} nats per token{of_that}. Raise it above "
        f"{last.cautious:.4g}, or take more calibration samples, whose standard error "
        f"is smaller{fewer}"
    )


def _climb(
    ask: Callable[[float], Point],
    sparsity: float,
    kept: Point | None,
    *,
    bound: float,
    slope: float,
    floor: float,
    upper: float,
) -> Point | None:
    """
    The largest budget that keeps the bound, to a resolution.

    :param ask: what judges a budget
    :param sparsity: the first to ask about, no less than a resolution above `kept`
    :param kept: one that keeps it, if one is known
    :return: None if there is none
    """
    broken: Point | None = None
    tried = 0
    while True:
        point, tried = ask(sparsity), tried + 1
        if point.cautious <= bound:
            kept = point
        else:
            broken = point
        if kept is not None and kept.sparsity >= upper:
            return kept
        if kept is None and point.sparsity <= floor:
            return None
        if kept is None or broken is None:
            sparsity = _beyond(point, bound, slope, tried, floor, upper)
        elif broken.sparsity - kept.sparsity > RESOLUTION + 1e-9:
            sparsity = _between(kept, broken, bound)
        else:
            return kept


def _first(
    bound: float,
    floor: float,
    upper: float,
    scan: Callable[[Sequence[float]], Sequence[float]],
) -> tuple[float, float]:
    """
    Where to begin, and how fast the logarithm of the increase grows there.

    A correction wins a little over the curve, so it is a little beyond.
    """
    if upper <= floor:
        return upper, STEEP[1]
    count = math.ceil((upper - floor) / SCANNED - 1e-9) + 1
    grid = np.linspace(floor, upper, count)
    logs = np.log(np.clip(scan(grid.tolist()), TINY, HUGE))
    logs = np.maximum.accumulate(logs)  # what is noise where little is lost
    aim = math.log(bound)
    above = np.flatnonzero(logs > aim)
    if not len(above):
        return upper, STEEP[0]
    if above[0] == 0:
        return floor, STEEP[1]
    cell = slice(above[0] - 1, above[0] + 1)
    at = float(np.interp(aim, logs[cell], grid[cell]))
    slope = float(np.diff(logs[cell])[0] / np.diff(grid[cell])[0])
    at = _multiple(at + AHEAD, floor, upper)
    return at, min(max(slope, STEEP[0]), STEEP[1])


def _beyond(
    last: Point, bound: float, slope: float, tried: int, floor: float, upper: float
) -> float:
    """As far on as the curve says, and farther each time it was not far enough."""
    most = AT_ONCE * 2.0 ** (tried - 1)
    # an increase that is none, or overflows, tells no distance
    told = 0 < last.cautious < math.inf
    way = math.log(bound / last.cautious) / slope if told else math.inf
    step = min(most, max(abs(way), 2 * RESOLUTION * tried))
    if last.cautious <= bound:
        return min(upper, _multiple(last.sparsity + step, last.sparsity, upper))
    return max(floor, _multiple(last.sparsity - step, floor, last.sparsity))


def _between(kept: Point, broken: Point, bound: float) -> float:
    """Strictly between the two, where the logarithm of the increase meets the bound."""
    low, high = kept.sparsity, broken.sparsity
    share = 0.5
    if kept.cautious > 0 and broken.cautious < math.inf:
        rise = math.log(broken.cautious / kept.cautious)
        share = math.log(bound / kept.cautious) / rise if rise > 0 else 0.5
        share = min(0.9, max(0.1, share))
    steps = round((high - low) / RESOLUTION * share)
    last = math.ceil((high - low) / RESOLUTION - 1e-9) - 1
    return _multiple(low + RESOLUTION * min(max(1, steps), max(1, last)), low, high)


def _multiple(at: float, low: float, high: float) -> float:
    """
    The nearest multiple of the resolution strictly between the two sides, or `at`
    within them: the least budget that can be had need not be one.
    """
    nearest = round(round(at / RESOLUTION) * RESOLUTION, 6)
    within = low + 1e-9 < nearest < high - 1e-9
    return nearest if within else min(max(at, low), high)
