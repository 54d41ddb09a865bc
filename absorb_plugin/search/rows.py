"""
Whole weights of a row. A pruner that takes so many weights of every row, int(columns *
s), loses half a weight of each on average, which is nearly 1 % of a row of 64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Rows"]

# Of a weight: what is no more beyond a whole one is rounding.
ROUNDING = 1e-6
# Share of all weights by which the whole ones stay below the budget, so that meeting it
# takes a shift upwards, and no digit that is rounded away costs a weight in every row.
SHORT = 1e-7


@dataclass(frozen=True)
class Rows:
    """
    :param columns: of every Linear, shape (Linears,)
    :param groups: index of each Linear's group, whose Linears have equally long rows
        and stay equal, shape (Linears,)
    """

    columns: np.ndarray
    groups: np.ndarray

    def taken(self, allocation: np.ndarray) -> np.ndarray:
        """Shares of zeros in the end, shape (Linears,)."""
        return np.floor(self.columns * allocation) / self.columns

    def rounded(
        self,
        allocation: np.ndarray,
        sizes: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        final: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """
        To whole weights, up or down, so that of all weights nearly as many go: up where
        most is missing to the next whole one. None goes below `low` or above `high`.

        :param allocation: one sparsity per Linear, equal within a group, shape (N,)
        :param sizes: numbers of weights, shape (N,)
        :param low: least sparsities, shape (N,)
        :param high: largest sparsities, shape (N,)
        :param final: shares of zeros in the end of sparsities, both of shape (N,)
        :return: in all at most what `allocation` is, and less by no more than a weight
            of the rows of one group, unless no group may go higher
        """
        exact = self.columns * allocation
        counts = np.floor(exact + ROUNDING)
        found = np.clip(counts / self.columns, low, high)
        over = exact - counts
        missing = float(sizes @ (final(allocation) - final(found)))
        missing -= SHORT * float(sizes.sum())
        _, first = np.unique(self.groups, return_index=True)
        order = sorted(first, key=lambda i: (-over[i], i))
        # what the bounds take from some goes to others, by more than a weight of these
        cut_off = False
        waiting = [index for index in order if over[index] > ROUNDING]
        while waiting:
            raised = False
            more = (np.floor(self.columns * found + ROUNDING) + 1) / self.columns
            weights = sizes * (final(more) - final(found))
            for index in waiting:
                own = self.groups == self.groups[index]
                taken = float(weights[own].sum())
                if not (more <= high)[own].all():
                    cut_off = True
                elif taken <= missing:
                    found[own] = more[own]
                    missing -= taken
                    raised = True
            again = cut_off and (raised or waiting is not order)
            waiting = order if again else []
        return found
