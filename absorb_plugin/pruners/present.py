"""Zeros that a model has before it is pruned, as its pruner takes them."""

from collections.abc import Mapping

import numpy as np
import torch
from loguru import logger

from absorb_plugin.blocks import BlockMap
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.present import LinearZeros, PresentZeros

__all__ = ["with_present_zeros"]

# Zeros below this share are those of rounding, and change nothing.
FEW = 1e-3
# llm-compressor compares shares in float32, of numbers that float32 does not hold.
ROUNDING = 1 + 2.0**-20


def with_present_zeros(
    budget: Budget,
    blocks: BlockMap,
    pruner: Pruner,
    statistics: Mapping[str, torch.Tensor],
) -> Budget:
    """
    The budget of what is zero in the end. Where the pruner keeps zeros, what a Linear
    has is the least that it may get.

    :param statistics: full name of a Linear -> a_j, or empty; SparseGPT counts weights
        of features that are always zero as zero
    :raises ValueError: if there are more zeros than the budget
    """
    zeros, shares = [], []
    for name, linear in blocks.linears().items():
        zero, unused = linear.weight.detach() == 0, None
        if pruner.zeroes_unused and name in statistics:
            unused = (statistics[name] == 0).to(zero.device)
        parts, sizes = pruner.present(zero, unused)
        zeros.append(LinearZeros.of(parts.cpu().double().numpy(), sizes.numpy()))
        if unused is not None:
            zero |= unused
        shares.append(float(zero.count_nonzero()) / zero.numel())
    present = PresentZeros(zeros)
    if max(shares) == 0 or (max(shares) < FEW and not pruner.keeps_zeros):
        return budget
    # less than the fullest part needs not be asked for, and never more than the cap
    least = np.minimum([zero.shares[0] for zero in zeros], budget.high)
    if pruner.keeps_zeros:
        least = np.minimum(1.0, np.array(shares) * ROUNDING)
    share = budget.mean(np.array(shares))
    if share > FEW and not statistics:  # else it was said before
        logger.warning(
            f"{share:.1%} of the weights to prune are zero already: they count towards "
            f"sparsity={budget.sparsity:g}, which is what the model ends with"
        )
    return budget.above(least, present)
