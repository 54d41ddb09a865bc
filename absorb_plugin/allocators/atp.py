"""ATP: sparsity that rises along a straight line over depth."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from .base import Allocator, BaseAllocation, LinearGroup

__all__ = ["Atp"]


class Atp(Allocator):
    """
    ATP (https://arxiv.org/abs/2502.14770): s_b = S − β(L−1)/2 + b·β for b = 0 … L−1.
    Looks at neither weights nor text, and is the control for every signal that claims
    to know more than the depth of a block. Its metric is b − (L−1)/2, the distance to
    the middle in blocks.

    A β too steep for the depth leaves [0, 1]; what does is clipped, and the budget step
    redistributes the rest.

    :param beta: β, rise in sparsity from one block to the next
    """

    name: ClassVar[str] = "atp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.14770"
    cost: ClassVar[str] = "none"

    beta: float = Field(default=0.005, ge=0.0, le=1.0, allow_inf_nan=False)

    def allocate(
        self, groups: Sequence[LinearGroup], sparsity: float
    ) -> BaseAllocation:
        position = np.arange(len(groups)) - (len(groups) - 1) / 2
        base = np.clip(sparsity + self.beta * position, 0.0, 1.0)
        return BaseAllocation(metric=position, sparsity=base)
