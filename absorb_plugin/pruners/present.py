"""Zeros that a model has before it is pruned, as its pruner takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from loguru import logger

from absorb_plugin.blocks import BlockMap
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.present import LinearZeros, PresentZeros

__all__ = ["ModelZeros"]

# Zeros below this share are those of rounding, and change nothing.
FEW = 1e-3
# llm-compressor compares shares in float32, of numbers that float32 does not hold.
ROUNDING = 1 + 2.0**-20


@dataclass(frozen=True)
class ModelZeros:
    """
    :param linears: zeros of every prunable Linear, in model order
    :param shares: of its weights, with those of features that are always zero where the
        pruner zeroes them: (Linears,)
    :param kept: whether the pruner refuses to leave a Linear with fewer
    """

    linears: Sequence[LinearZeros]
    shares: np.ndarray
    kept: bool

    @classmethod
    def of(
        cls,
        blocks: BlockMap,
        pruner: Pruner,
        statistics: Mapping[str, torch.Tensor] | None = None,
    ) -> "ModelZeros":
        """
        :param statistics: full name of a Linear -> a_j, for a pruner that
            `zeroes_unused`; None before they are known
        """
        zeros, shares = [], []
        for name, linear in blocks.linears().items():
            zero, unused = linear.weight.detach() == 0, None
            if pruner.zeroes_unused and statistics and name in statistics:
                unused = (statistics[name] == 0).to(zero.device)
            parts, sizes = pruner.present(zero, unused)
            zeros.append(LinearZeros.of(parts.cpu().double().numpy(), sizes.numpy()))
            if unused is not None:
                zero |= unused
            shares.append(float(zero.count_nonzero()) / zero.numel())
        return cls(zeros, np.array(shares), pruner.keeps_zeros)

    def within(self, budget: Budget, warn: bool = False) -> Budget:
        """
        The budget of what is zero in the end. Where the pruner keeps zeros, what a
        Linear has is the least that it may get.

        :param warn: where they are more than a few
        :raises ValueError: if there are more zeros than the budget
        """
        most = self.shares.max()
        if most == 0 or (most < FEW and not self.kept):
            return budget
        # less than the fullest part needs not be asked for, and never more than the cap
        least = np.minimum([zero.shares[0] for zero in self.linears], budget.high)
        if self.kept:
            least = np.minimum(1.0, self.shares * ROUNDING)
        share = budget.mean(self.shares)
        if warn and share > FEW:
            logger.warning(
                f"{share:.1%} of the weights to prune are zero already: they count "
                f"towards sparsity={budget.sparsity:g}, which is what the model ends "
                "with"
            )
        over = int((self.shares > budget.high + FEW).sum())
        if warn and over:
            logger.warning(
                f"{over} Linears have more zeros of their own than max_sparsity or "
                "limits let them have, and keep them: pruning brings no weight back"
            )
        return budget.above(least, PresentZeros(self.linears))
