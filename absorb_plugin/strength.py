"""
The strength of the correction, tuned on held-out calibration text: never worse there
than the base allocation or than uniform. What the masks of the search promise is
rehearsed with the pruner's own arithmetic where that is another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from loguru import logger

from absorb_plugin import distributed
from absorb_plugin.budget import meet_budget
from absorb_plugin.correction import corrected
from absorb_plugin.sampling import standard_error

__all__ = ["Rehearsed", "Round", "Score", "Search", "search_strength"]

# The negative side is there because a signal can point the wrong way: the noise ratio
# does on some models. Whether it does shows in the first round, so later ones leave it
# out. A round that does not take the largest is near the optimum along its direction,
# and the next one tries half of everything.
STRENGTHS = (-0.05, 0.05, 0.1, 0.2)
# Losses closer than this, in nats per token, are a tie: the smaller strength wins.
TIE = 1e-3

Measure = Callable[[np.ndarray], np.ndarray]
Score = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Round:
    """
    One round: the direction measured and what each strength scored.

    :param direction: Δ, shape (L,)
    :param strengths: β tried, 0 included, ascending
    :param losses: held-out cross-entropy in nats per token, one per strength
    :param chosen: the β taken; 0 where none beat the start of the round
    """

    direction: np.ndarray
    strengths: list[float]
    losses: list[float]
    chosen: float


@dataclass(frozen=True)
class Rehearsed:
    """
    What the pruner's own arithmetic made of the allocations.

    :param losses: held-out cross-entropy in nats per token, of those rehearsed among
        "base", "uniform", "searched" (the outcome of all rounds) and "halfway" (between
        the better of base and uniform and that)
    :param chosen: the one taken
    """

    losses: dict[str, float]
    chosen: str


@dataclass(frozen=True)
class Search:
    """
    Outcome of the search.

    :param sparsity: the allocation, shape (L,)
    :param start: "base", or "uniform" where uniform scored better
    :param base_loss: held-out cross-entropy of the base allocation, nats per token
    :param uniform_loss: the same of the uniform allocation
    :param loss: the same of the outcome of all rounds
    :param rehearsed: what the pruner made of that, where it was asked
    """

    sparsity: np.ndarray
    start: str
    base_loss: float
    uniform_loss: float
    loss: float
    rounds: list[Round] = field(default_factory=list)
    rehearsed: Rehearsed | None = None


def search_strength(
    base: np.ndarray,
    parameters: np.ndarray,
    sparsity: float,
    max_sparsity: float,
    measure: Measure,
    score: Score,
    rounds: int,
    rehearse: Score | None = None,
) -> Search:
    """
    Line search along the correction, judged on held-out text; each round starts from
    the allocation that the one before chose, and measures its direction there.

    A strength is taken only if it beats the start of the round by more than one
    standard error of the paired difference over samples.

    :param base: base allocation that meets the budget, shape (L,)
    :param measure: allocation -> direction Δ
    :param score: allocations -> (loss sums (allocations, samples), tokens (samples,))
    :param rounds: at most so many; the search stops when a round chooses 0
    :param rehearse: scores as `score` does, by the arithmetic of a pruner that does
        more than mask. Where masks would start from uniform it may say that the base
        is clearly better, and it has the last word on the outcome, which must not be
        worse than the base or the start
    """
    uniform = meet_budget(
        np.full_like(base, sparsity), parameters, sparsity, max_sparsity
    )
    sums, tokens = _finite(*score([base, uniform]))
    base_loss, uniform_loss = (sums.sum(axis=1) / tokens.sum()).tolist()
    stage = None if rehearse is None else _Stage(rehearse, base, uniform)
    better = uniform_loss < base_loss
    if stage is not None and better:
        # the search goes by masks, so theirs is the word unless this is clearly another
        better = not stage.gains("base", "uniform")
    start = distributed.from_first("uniform" if better else "base")
    current = uniform if start == "uniform" else base
    own = sums[1] if start == "uniform" else sums[0]

    done: list[Round] = []
    scale = 1.0
    for number in range(rounds):
        direction = measure(current)
        strengths = [beta * scale for beta in STRENGTHS if beta > 0 or number == 0]
        candidates = [
            meet_budget(
                corrected(current, direction, beta), parameters, sparsity, max_sparsity
            )
            for beta in strengths
        ]
        sums, tokens = _finite(*score(candidates))
        best = distributed.from_first(_choose(own, sums, tokens, strengths))
        losses = {0.0: float(own.sum() / tokens.sum())}
        losses |= dict(
            zip(strengths, (sums.sum(axis=1) / tokens.sum()).tolist(), strict=True)
        )
        tried = sorted(losses)
        done.append(
            Round(
                direction,
                tried,
                [losses[beta] for beta in tried],
                0.0 if best is None else strengths[best],
            )
        )
        if best is None:
            break
        current, own = candidates[best], sums[best]
        if strengths[best] < max(strengths):
            scale /= 2
    loss = float(own.sum() / tokens.sum())
    logger.info(
        f"Held-out loss {base_loss:.3f} (base), {uniform_loss:.3f} (uniform) -> "
        f"{loss:.3f}: started from {start}, took {[entry.chosen for entry in done]}"
    )
    search = Search(current, start, base_loss, uniform_loss, loss, done)
    if stage is None or current is base:
        return search
    return stage.last_word(search, parameters, sparsity, max_sparsity)


class _Stage:
    """Allocations that are rehearsed, each once."""

    def __init__(self, rehearse: Score, base: np.ndarray, uniform: np.ndarray) -> None:
        self._rehearse = rehearse
        self._allocations = {"base": base, "uniform": uniform}
        self._sums: dict[str, np.ndarray] = {}
        self._tokens = np.array([])

    def gains(self, one: str, other: str) -> bool:
        """
        Whether the one has the lower held-out loss, by more than a tie and than the
        standard error.
        """
        self._ask(one, other)
        sums = self._sums[one][None]
        return _choose(self._sums[other], sums, self._tokens, [1.0]) is not None

    def loss(self, name: str) -> float:
        """Held-out cross-entropy of what has been asked for, nats per token."""
        return float(self._sums[name].sum() / self._tokens.sum())

    def last_word(
        self,
        search: Search,
        parameters: np.ndarray,
        sparsity: float,
        max_sparsity: float,
    ) -> Search:
        """
        The outcome of the search if it is no worse than the base allocation (and than
        uniform, where that was rehearsed), else halfway if that is better by more than
        its standard error, else the better of those two.
        """
        outcome = "uniform"
        if search.sparsity is not self._allocations[outcome]:
            outcome = "searched"
            self._allocations[outcome] = search.sparsity
        self._ask("base", outcome)
        best = min((name for name in self._sums if name != outcome), key=self.loss)
        chosen = outcome
        if distributed.from_first(self.loss(outcome) > self.loss(best)):
            middle = (self._allocations[best] + search.sparsity) / 2
            self._allocations["halfway"] = meet_budget(
                middle, parameters, sparsity, max_sparsity
            )
            chosen = "halfway" if self.gains("halfway", best) else best
        chosen = distributed.from_first(chosen)
        losses = {name: self.loss(name) for name in self._sums}
        told = ", ".join(f"{loss:.3f} ({name})" for name, loss in losses.items())
        logger.info(f"Rehearsed: {told}; taking {chosen}")
        return replace(
            search,
            sparsity=self._allocations[chosen],
            rehearsed=Rehearsed(losses, chosen),
        )

    def _ask(self, *names: str) -> None:
        new = [name for name in names if name not in self._sums]
        if new:
            asked = self._rehearse([self._allocations[name] for name in new])
            sums, self._tokens = _finite(*asked)
            self._sums |= dict(zip(new, sums, strict=True))


def _finite(sums: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An overflow is the worst of losses, not none."""
    return np.where(np.isnan(sums), np.inf, sums), tokens


def _choose(
    own: np.ndarray, sums: np.ndarray, tokens: np.ndarray, strengths: Sequence[float]
) -> int | None:
    """Index of the strength to take, None for none."""
    means = sums.sum(axis=1) / tokens.sum()
    if np.isinf(means).all():
        return None
    tied = [i for i, mean in enumerate(means) if mean <= means.min() + TIE]
    best = min(tied, key=lambda i: (abs(strengths[i]), -strengths[i]))
    gain = own - sums[best]
    mean = gain.sum() / tokens.sum()
    # with one sample the error is NaN, and any gain beyond a tie is taken
    if mean <= TIE or mean <= standard_error(gain, tokens):
        return None
    return best
