"""DLP: sparsity by a block's share in the importance of all weights."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from absorb_plugin.names import Granularity

from .base import Allocator, BaseAllocation, LinearGroup, Needs
from .base import LinearStatistics as Linear
from .owl import importance, mean_importance, of_all, spread_metric

__all__ = ["Dlp", "median_importance"]

# A float32 that is not negative has 31 bits: the upper ones make a coarse histogram.
LOWER_BITS = 16
UPPER_BINS = 1 << (31 - LOWER_BITS)
LOWER_BINS = 1 << LOWER_BITS


class Dlp(Allocator):
    """
    DLP (https://arxiv.org/abs/2505.23807): with M_b all |W|·√a over the Linears of a
    block, q_b = 1 − mean(M_b)/Σ mean(M), u_b = 2α·(q_b − min q)/(max q − min q) and
    s_b = 1 − (u_b − mean u + 1 − S). Its metric is q.

    The paper describes the median of M_b; the authors' code for unstructured pruning
    takes the mean, and so does the default here.

    :param alpha: α; the sparsities spread over 2α
    :param reduce: "mean" or "median" of M_b
    """

    name: ClassVar[str] = "dlp"
    needs: ClassVar[Needs] = "activations"
    granularities: ClassVar[tuple[Granularity, ...]] = ("block", "linear")
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23807"
    cost: ClassVar[str] = "one forward pass, one read of the weights (median: two)"

    alpha: float = Field(default=0.15, ge=0.0, le=0.5, allow_inf_nan=False)
    reduce: Literal["mean", "median"] = "mean"

    def allocate(
        self, groups: Sequence[LinearGroup], sparsity: float
    ) -> BaseAllocation:
        reduce = median_importance if self.reduce == "median" else mean_importance
        values = of_all(groups, reduce)
        total = float(values.sum())
        share = values / total if total > 0 else np.full_like(values, 1 / len(values))
        change = spread_metric(1 - share, self.alpha)
        return BaseAllocation(1 - share, np.clip(sparsity + change, 0.0, 1.0))


def median_importance(group: LinearGroup) -> float:
    """
    Median of |W|·√a over all Linears of a group, the lower one of two. It is exact, and
    no more than one Linear is held: numbers that are not negative are ordered as their
    bits are, so two histograms find it.
    """
    linears = list(group.linears.values())
    upper = sum(_upper_histogram(linear) for linear in linears)
    assert isinstance(upper, np.ndarray)
    rank = (upper.sum() - 1) // 2
    above = int(np.searchsorted(upper.cumsum(), rank, side="right"))
    rank -= upper[:above].sum()
    lower = sum(_lower_histogram(linear, above) for linear in linears)
    assert isinstance(lower, np.ndarray)
    below = int(np.searchsorted(lower.cumsum(), rank, side="right"))
    bits = np.array([above << LOWER_BITS | below], dtype=np.int32)
    return float(bits.view(np.float32)[0])


def _upper_histogram(linear: Linear) -> np.ndarray:
    bits = importance(linear).view(torch.int32).flatten() >> LOWER_BITS
    return torch.bincount(bits, minlength=UPPER_BINS).cpu().numpy()


def _lower_histogram(linear: Linear, above: int) -> np.ndarray:
    """Of the numbers with these upper bits."""
    bits = importance(linear).view(torch.int32).flatten()
    inside = bits[bits >> LOWER_BITS == above] & (LOWER_BINS - 1)
    return torch.bincount(inside, minlength=LOWER_BINS).cpu().numpy()
