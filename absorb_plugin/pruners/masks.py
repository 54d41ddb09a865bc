"""Pruned weights by masks, which dense statistics allow without a run of their own."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from torch.nn import Linear

from absorb_plugin.blocks import BlockMap
from absorb_plugin.forward.joined import joined_rows
from absorb_plugin.forward.linears import Weights, all_given, replaced_weights
from absorb_plugin.forward.resident import own_rows
from absorb_plugin.groups import named
from absorb_plugin.pruners.base import MaskPruner

__all__ = ["MaskedWeights", "block_sparsities"]


def block_sparsities(
    blocks: BlockMap, allocation: np.ndarray
) -> dict[int, dict[str, float]]:
    """
    An allocation, one sparsity per prunable Linear, by block and relative name.
    """
    by_name = named(blocks, allocation)
    return {
        index: {
            name: by_name[blocks.blocks[index].full_name(name)]
            for name in blocks.blocks[index].linears
        }
        for index in blocks.prunable
    }


class MaskedWeights:
    """
    Masks of a model's Linears, made when a Linear runs. A threshold per row is kept, so
    that weights are ranked once for each sparsity.

    :param blocks: whose prunable Linears are masked
    :param pruner: ranks the weights
    :param input_square_sums: full name of a Linear -> a_j; a Linear without has seen no
        token and stays dense
    :param quantiles: what others with the same scores have found out about these, and
        these find out for others: full name of a Linear -> `MaskPruner.quantiles`. None
        to rank anew
    :param joined: whether each rank makes its rows alone of every weight, for a whole
        block at once; within a probe that is `in_step`
    """

    def __init__(
        self,
        blocks: BlockMap,
        pruner: MaskPruner,
        input_square_sums: Mapping[str, torch.Tensor],
        quantiles: dict[str, torch.Tensor] | None = None,
        joined: bool = False,
    ) -> None:
        self._blocks, self._pruner = blocks, pruner
        self._square_sums, self._quantiles = input_square_sums, quantiles
        self.joined = joined
        self._thresholds: dict[tuple[str, float], torch.Tensor] = {}

    def identity(self) -> list[object]:
        """What makes two of them equal (`fingerprint.digest`)."""
        return [self._blocks, self._pruner, self._square_sums]

    def seen(self, index: int) -> dict[str, Linear]:
        """Relative name -> Linear of a block, of those that can be masked."""
        block = self._blocks.blocks[index]
        return {
            name: linear
            for name, linear in block.linears.items()
            if block.full_name(name) in self._square_sums
        }

    def weights(self, index: int, sparsities: Mapping[str, float]) -> Weights:
        """:param sparsities: relative name -> sparsity in [0, 1]"""
        if self.joined:
            own = {k: self.weight(index, k, sparsities[k]) for k in self.seen(index)}
            return all_given(joined_rows(self.seen(index), own))
        return {
            name: partial(self.weight, index, name, sparsities[name])
            for name in self.seen(index)
        }

    def applied(
        self, index: int, sparsities: Mapping[str, float]
    ) -> AbstractContextManager[None]:
        """Within the context the Linears of a block compute with their weights."""
        linears = self._blocks.blocks[index].linears
        return replaced_weights(linears, self.weights(index, sparsities))

    def weight(self, index: int, name: str, sparsity: float) -> torch.Tensor:
        """The masked weight of one Linear; of one that is joined this rank's rows."""
        weight, observed, (at,) = self._ranked(index, name, [sparsity])
        return self._pruner.masked(weight, observed, at)

    def weight_and_between(
        self, index: int, name: str, sparsity: float, low: float, high: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the weights that go between two other sparsities."""
        weight, observed, at = self._ranked(index, name, [sparsity, low, high])
        return self._pruner.masked_and_between(weight, observed, *at)

    def _ranked(
        self, index: int, name: str, sparsities: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Weight, a_j, and the threshold per row of every sparsity."""
        weight, full = self._own(index, name)
        new = [s for s in sparsities if (full, s) not in self._thresholds]
        if new:
            self.rank(index, name, new)
        at = [self._thresholds[full, s].to(weight.device) for s in sparsities]
        return weight, self._square_sums[full].to(weight.device), at

    def rank(self, index: int, name: str, sparsities: Sequence[float]) -> None:
        """Find the thresholds of several sparsities at once, which costs as one."""
        weight, full = self._own(index, name)
        observed = self._square_sums[full].to(weight.device)
        known = self._known(full, weight, observed)
        found = self._pruner.thresholds(weight, observed, sparsities, known)
        for sparsity, at in zip(sparsities, found.split(1, dim=1), strict=True):
            self._thresholds[full, sparsity] = at

    def _own(self, index: int, name: str) -> tuple[torch.Tensor, str]:
        """The dense weight of a Linear, or this rank's rows, and its full name."""
        block = self._blocks.blocks[index]
        linear, full = block.linears[name], block.full_name(name)
        return own_rows(linear) if self.joined else linear.weight.detach(), full

    def _known(
        self, full: str, weight: torch.Tensor, observed: torch.Tensor
    ) -> torch.Tensor | None:
        # on a CPU a sort takes no longer than to pick out what lies between quantiles
        if self._quantiles is None or weight.device.type == "cpu":
            return None
        if full not in self._quantiles:
            self._quantiles[full] = self._pruner.quantiles(weight, observed)
        return self._quantiles[full]
