"""Zeros that a model has before it is pruned: they stay, and count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["LinearZeros", "PresentZeros"]


@dataclass(frozen=True)
class LinearZeros:
    """
    Zeros of one Linear in the parts (its rows, or groups of columns) that a pruner
    prunes each to the same sparsity. A part that has more keeps them, so that of the
    weights in the end Σ w·max(z, s) are zero.

    :param shares: z of every part, ascending, shape (parts,)
    :param weights: w, the share of the Linear's weights that a part holds
    """

    shares: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, shares: np.ndarray, weights: np.ndarray) -> "LinearZeros":
        """In any order, weights of any sum."""
        order = np.argsort(shares)
        return cls(shares[order], weights[order] / weights.sum())

    def final(self, sparsity: float) -> float:
        """Share of zeros where `sparsity` is asked for."""
        reached = int(np.searchsorted(self.shares, sparsity, side="right"))
        kept = self.weights[reached:] @ self.shares[reached:]
        return float(self.weights[:reached].sum() * sparsity + kept)


@dataclass(frozen=True)
class PresentZeros:
    """:param linears: one per prunable Linear, in model order"""

    linears: Sequence[LinearZeros]

    def final(self, sparsities: np.ndarray) -> np.ndarray:
        """Shares of zeros in the end, where `sparsities` are asked for: (Linears,)."""
        pairs = zip(self.linears, sparsities.tolist(), strict=True)
        return np.array([zeros.final(sparsity) for zeros, sparsity in pairs])
