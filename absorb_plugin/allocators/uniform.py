"""Uniform: every block alike, the baseline of every other allocator."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from .base import Allocator, BaseAllocation, LinearGroup

__all__ = ["Uniform"]


class Uniform(Allocator):
    """
    s_b = S for every block, as Wanda (https://arxiv.org/abs/2306.11695) and SparseGPT
    prune where nothing else is said.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"
    cost: ClassVar[str] = "none"

    def allocate(
        self, groups: Sequence[LinearGroup], sparsity: float
    ) -> BaseAllocation:
        same = np.full(len(groups), sparsity)
        return BaseAllocation(metric=same, sparsity=same.copy())
