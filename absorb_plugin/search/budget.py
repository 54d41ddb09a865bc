"""The budget: how many weights may go in all, and how far a single Linear may."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from absorb_plugin.search.present import PresentZeros
from absorb_plugin.search.rows import Rows

__all__ = ["Budget", "OutOfReach", "check_budget", "meet_budget"]

# Sparsities are rounded to this many decimals: the pruners take int(columns * s), and
# 0.4999999999999999 would cost a weight in every row where 0.5 was meant.
DECIMALS = 10
# A budget that is missed by no more than this is met, as with rows of 2,500 or longer.
NEAR = 2e-4
# Bounds that miss the budget by no more than rounding.
SLACK = 1e-9


class OutOfReach(ValueError):
    """
    A budget that the bounds do not allow.

    :param least: what they leave
    :param most: likewise
    """

    def __init__(self, told: str, least: float, most: float) -> None:
        super().__init__(told)
        self.least, self.most = least, most


@dataclass(frozen=True)
class Budget:
    """
    :param sizes: number of weights of every Linear, p, shape (Linears,)
    :param sparsity: S: Σ p·s = S·Σ p must hold
    :param low: least sparsity of every Linear, shape (Linears,)
    :param high: largest sparsity of every Linear, shape (Linears,)
    :param present: zeros that are there already and count; None where there are none
    :param rows: what the Linears' rows can lose; None where any sparsity can be had
    """

    sizes: np.ndarray
    sparsity: float
    low: np.ndarray
    high: np.ndarray
    present: PresentZeros | None = None
    rows: Rows | None = None

    @classmethod
    def of(cls, sizes: np.ndarray, sparsity: float, max_sparsity: float) -> "Budget":
        """
        The same cap for every Linear.

        :raises ValueError: if the cap leaves the budget out of reach
        """
        check_budget(sparsity, max_sparsity)
        shape = np.shape(sizes)
        return cls(
            np.asarray(sizes, dtype=np.float64),
            float(sparsity),
            np.zeros(shape),
            np.full(shape, float(max_sparsity)),
        )

    def within(self, low: np.ndarray, high: np.ndarray) -> "Budget":
        """
        With bounds of every Linear, of shape (Linears,), beside those it has.

        :raises ValueError: if they leave the budget out of reach
        """
        narrow = replace(
            self, low=np.maximum(self.low, low), high=np.minimum(self.high, high)
        )
        narrow.uniform()
        return narrow

    def above(self, low: np.ndarray, present: PresentZeros) -> "Budget":
        """
        The same for a model that has zeros already; if these are NEAR enough to S and
        more, that is met.

        :param low: least sparsity of every Linear, beside the one it has; one beyond
            the cap lifts that
        :raises ValueError: if there are more zeros than the budget
        """
        low = np.maximum(self.low, low)
        high = np.maximum(self.high, low)
        budget = replace(self, low=low, high=high, present=present)
        if 0 < budget.least() - self.sparsity <= NEAR:
            # SparseGPT takes a weight more of its columns, and may be run again
            budget = budget.at(budget.least())
        budget.uniform()  # says if it is out of reach
        return budget

    def at(self, sparsity: float) -> "Budget":
        """The same Linears and bounds under another S."""
        return replace(self, sparsity=sparsity)

    def meet(self, wished: np.ndarray) -> np.ndarray:
        """The wish, shifted and clipped so that the budget is met (`meet_budget`)."""
        final = None if self.present is None else self.present.final
        return meet_budget(
            wished, self.sizes, self.sparsity, self.high, self.low, final
        )

    def whole(self, allocation: np.ndarray) -> np.ndarray:
        """
        An allocation that meets the budget, changed so that what whole weights of a row
        make of it does as well (`search.rows`). Itself, where that misses by no more
        than NEAR.
        """
        rows = self.rows
        if rows is None:
            return allocation
        if abs(self.achieved(rows.taken(allocation)) - self.sparsity) <= NEAR:
            return allocation
        low, high, final = self.low, self.high, self._final
        return self.meet(rows.rounded(allocation, self.sizes, low, high, final))

    def uniform(self) -> np.ndarray:
        """S for every Linear, as far as the bounds let it."""
        return self.meet(np.full(self.sizes.shape, self.sparsity))

    def least(self) -> float:
        """The smallest S that the bounds allow."""
        return self.achieved(self.low)

    def achieved(self, sparsities: np.ndarray) -> float:
        """Share of all weights that are zero in the end."""
        return self.mean(self._final(sparsities))

    def _final(self, sparsities: np.ndarray) -> np.ndarray:
        """The same of every Linear."""
        return sparsities if self.present is None else self.present.final(sparsities)

    def mean(self, sparsities: np.ndarray) -> float:
        """Mean over all weights of one number per Linear."""
        return float(self.sizes @ sparsities / self.sizes.sum())


def check_budget(sparsity: float, max_sparsity: float) -> None:
    """
    :raises ValueError: if no allocation under `max_sparsity` can reach `sparsity`
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1)")
    if sparsity > max_sparsity:
        raise ValueError(
            f"sparsity={sparsity} cannot be met with max_sparsity={max_sparsity}: even "
            "with every block at the cap the model stays denser. Raise max_sparsity or "
            "lower the pruning modifier's sparsity."
        )


def meet_budget(
    sparsities: np.ndarray,
    parameters: np.ndarray,
    sparsity: float,
    high: np.ndarray | float = 1.0,
    low: np.ndarray | float = 0.0,
    final: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """
    Shift all by one number, clip, and so meet Σ p·s = S·Σ p.

    The shift is found by bisection on a monotone function, so equals with equal bounds
    stay equal and the order is kept where no bound is met.

    :param sparsities: finite wished-for sparsities, any range, shape (N,)
    :param parameters: p, number of prunable weights of each, shape (N,)
    :param sparsity: global target S
    :param high: upper bound of every s, one for all or shape (N,)
    :param low: lower bound, likewise
    :param final: shares of zeros in the end, not falling in any s, of which the mean is
        taken; None for s itself
    :return: s in [low, high], weighted mean within 1e-9 of S, shape (N,)
    :raises ValueError: on non-finite input, no weights, or a budget that the bounds
        leave out of reach
    """
    wished = np.asarray(sparsities, dtype=np.float64)
    weights = np.asarray(parameters, dtype=np.float64)
    if wished.shape != weights.shape or wished.ndim != 1 or wished.size == 0:
        raise ValueError(
            f"sparsities {wished.shape} and parameters {weights.shape} must be equally "
            "long, non-empty vectors"
        )
    if not np.isfinite(wished).all():
        raise ValueError(f"sparsities must be finite, got {wished.tolist()}")
    if not (weights > 0).all():
        raise ValueError(f"parameters must be positive, got {weights.tolist()}")
    weights = weights / weights.sum()
    low, high = (
        np.broadcast_to(np.asarray(x, dtype=float), wished.shape) for x in (low, high)
    )
    count = (lambda x: x) if final is None else final
    _check_bounds(weights, sparsity, count(low), count(high))

    # Beyond the bounds nothing but the clipping survives; clamping the range keeps the
    # bisection exact for absurd inputs such as 1e300.
    center = float(np.clip(weights @ np.clip(wished, -1e6, 1e6), -1e6, 1e6))
    wished = np.clip(wished, center - 1e6, center + 1e6)

    def shifted(shift: float) -> np.ndarray:
        return np.clip(wished + shift, low, high)

    least, most = -float(wished.max()), float(high.max()) - float(wished.min())
    shift = sparsity - float(weights @ wished)
    if abs(float(weights @ count(shifted(shift))) - sparsity) > 1e-13:
        while True:
            shift = 0.5 * (least + most)
            if shift in (least, most):
                break
            if float(weights @ count(shifted(shift))) < sparsity:
                least = shift
            else:
                most = shift
        shift = most
    found = np.round(shifted(shift), DECIMALS)
    # a third rounded is less, and would cost a weight in every row of 48
    found[found == round(sparsity, DECIMALS)] = sparsity
    return np.clip(found, low, high)


def _check_bounds(
    weights: np.ndarray, sparsity: float, low: np.ndarray, high: np.ndarray
) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1)")
    least, most = float(weights @ low), float(weights @ high)
    if not least - SLACK <= sparsity <= most + SLACK:
        raise OutOfReach(
            f"sparsity={sparsity} cannot be met: max_sparsity, limits and zeros that "
            f"are there already leave between {least:.4f} and {most:.4f}. Widen them, "
            "or change the pruning modifier's sparsity",
            least,
            most,
        )
