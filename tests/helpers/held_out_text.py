"""A budget of four Linears, and held-out text that says what an allocation costs."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from absorb_plugin.search.budget import Budget

Loss = Callable[[np.ndarray], float]

SIZES = np.array([100.0, 200.0, 100.0, 200.0])
BUDGET = Budget(SIZES, 0.6, np.array([0.0, 0.1, 0.0, 0.0]), np.full(4, 0.9))
TOKENS = np.array([50, 100, 80])
UP = np.array([-1.0, -0.5, 0.5, 1.0])  # a direction: protect the early ones
BASE = BUDGET.meet(0.6 + 0.08 * np.array([1.0, -1.0, 1.0, -1.0]))
UNIFORM = np.full(4, 0.6)


class Text:
    """
    Held-out text on which an allocation costs `loss` nats per token. It refuses what
    does not meet the budget, and remembers what it was asked.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss, self.asked = loss, 0
        self.seen: list[np.ndarray] = []

    def __call__(
        self, candidates: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked += 1
        self.seen += candidates
        for candidate in candidates:
            assert BUDGET.mean(candidate) == pytest.approx(BUDGET.sparsity, abs=1e-6)
            assert (candidate >= BUDGET.low).all() and (candidate <= BUDGET.high).all()
        losses = np.array([self.loss(candidate) for candidate in candidates])
        return losses[:, None] * TOKENS, TOKENS


def distance_from(target: np.ndarray) -> Loss:
    return lambda allocation: 2 + float(np.abs(allocation - target).sum())
