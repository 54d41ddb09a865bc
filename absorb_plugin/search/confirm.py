"""The last comparison: by the pruner's arithmetic, on samples that chose nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from absorb_plugin.search.budget import Budget
from absorb_plugin.search.line_search import Judge, Start, beyond, gain

__all__ = ["Confirmed", "confirm"]

# Standard errors between base and uniform that make the search begin anew, which costs
# as much as the first did.
CLEARLY = 2.0


@dataclass(frozen=True)
class Confirmed:
    """
    What the pruner's own arithmetic made of the allocations.

    :param sparsity: the allocation taken, one sparsity per Linear, shape (N,)
    :param chosen: its name: "base", "uniform", "searched" (the outcome of the search)
        or "halfway" (between the better of base and uniform and that)
    :param losses: held-out cross-entropy in nats per token, by name
    :param gain: by how much the one taken is below the base, nats per token
    :param standard_error: of that, over samples; NaN for one sample
    :param start: "base" or "uniform", which of the two beats the other clearly, by more
        than CLEARLY standard errors; None if neither does
    :param sums: losses that were judged, added up over each sample, by name
    :param anew: whether the search was begun anew for that, so that the samples of this
        comparison have chosen
    """

    sparsity: np.ndarray
    chosen: str
    losses: dict[str, float]
    gain: float
    standard_error: float
    start: Start | None = None
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    anew: bool = False

    @property
    def loss(self) -> float:
        """Of the one taken."""
        return self.losses[self.chosen]


def confirm(
    found: np.ndarray,
    base: np.ndarray,
    budget: Budget,
    judge: Judge,
    settled: bool = False,
) -> Confirmed:
    """
    The outcome of the search if it is no worse than base and uniform, else halfway if
    that beats the better of them by more than its standard error, else that one.

    :param found: the outcome of the search, shape (N,)
    :param base: the base allocation
    :param judge: the pruner's, on samples that no choice has seen
    :param settled: whether `found` is taken in any case, and only compared, with base
        and uniform of as many weights
    """
    ballot = _Ballot(judge)
    uniform = budget.uniform()
    if settled:  # and `found` may be one of these, in whole weights of a row
        base, uniform = budget.whole(base), budget.whole(uniform)
    ballot.ask({"base": base, "uniform": uniform, "searched": found})
    starts: tuple[Start, Start] = ("base", "uniform")
    best, other = sorted(starts, key=ballot.loss)
    chosen = ballot.twin("searched", starts)
    loss = ballot.loss("searched")
    if not (settled or (np.isfinite(loss) and loss <= ballot.loss(best))):
        middle = budget.meet((ballot.allocations[best] + found) / 2)
        ballot.ask({"halfway": budget.whole(middle)})
        chosen = "halfway" if ballot.beats("halfway", best) else best
    won, error = ballot.gain(chosen, "base")
    losses = {name: ballot.loss(name) for name in ballot.allocations}
    ahead, unsure = ballot.gain(best, other)
    # of one sample nothing is clear but an overflow
    clear = ahead == np.inf or ahead > CLEARLY * unsure
    start = best if clear else None
    sparsity = ballot.allocations[chosen]
    return Confirmed(sparsity, chosen, losses, won, error, start, ballot.sums)


class _Ballot:
    """Allocations that are judged, each once; equal ones share a judgement."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.allocations: dict[str, np.ndarray] = {}
        self.sums: dict[str, np.ndarray] = {}
        self._tokens = np.array([])

    def ask(self, allocations: dict[str, np.ndarray]) -> None:
        self.allocations |= allocations
        new: dict[str, np.ndarray] = {}
        twins: dict[str, str] = {}
        for name, one in allocations.items():
            twin = self.twin(name, [*new, *self.sums])
            if twin == name:
                new[name] = one
            else:
                twins[name] = twin
        if new:
            sums, self._tokens = self._judge(list(new.values()))
            self.sums |= dict(zip(new, sums, strict=True))
        self.sums |= {name: self.sums[twin] for name, twin in twins.items()}

    def twin(self, name: str, others: Sequence[str]) -> str:
        """One of the others that is the same allocation; itself if none is."""
        own = self.allocations[name]
        same = (n for n in others if np.array_equal(self.allocations[n], own))
        return next(same, name)

    def loss(self, name: str) -> float:
        """Nats per token."""
        return float(self.sums[name].sum() / self._tokens.sum())

    def gain(self, name: str, other: str) -> tuple[float, float]:
        """By how much `name` is below `other`, and the standard error of that."""
        return gain(self.sums[other], self.sums[name], self._tokens)

    def beats(self, name: str, other: str) -> bool:
        """By more than a tie and than the standard error."""
        return beyond(*self.gain(name, other))
