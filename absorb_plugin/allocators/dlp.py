"""DLP: sparsity by a block's share in the importance of all weights."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from .base import Allocator, BaseAllocation, Granularity, LinearGroup, Needs
from .owl import mean_importance, of_all, spread_metric

__all__ = ["Dlp"]


class Dlp(Allocator):
    """
    DLP (https://arxiv.org/abs/2505.23807): with M_b all |W|·√a over the Linears of a
    block, q_b = 1 − mean(M_b)/Σ mean(M), u_b = 2α·(q_b − min q)/(max q − min q) and
    s_b = 1 − (u_b − mean u + 1 − S). Its metric is q.

    :param alpha: α; the sparsities spread over 2α
    """

    name: ClassVar[str] = "dlp"
    needs: ClassVar[Needs] = "activations"
    granularities: ClassVar[tuple[Granularity, ...]] = ("block", "linear")
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23807"
    cost: ClassVar[str] = "one forward pass, one read of the weights"

    alpha: float = Field(default=0.15, ge=0.0, le=0.5, allow_inf_nan=False)

    def allocate(
        self, groups: Sequence[LinearGroup], sparsity: float
    ) -> BaseAllocation:
        means = of_all(groups, mean_importance)
        total = float(means.sum())
        share = means / total if total > 0 else np.full_like(means, 1 / len(means))
        unimportance = 1 - share
        base = spread_metric(unimportance, self.alpha, sparsity)
        return BaseAllocation(unimportance, base)
